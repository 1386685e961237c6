"""Compare two disks by content, whatever their formats."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.convert import buffers
from diskmorph.convert.buffers import PIECE, layout, new_buffer
from diskmorph.convert.moves import Reader
from diskmorph.convert.opening import open_source
from diskmorph.convert.options import Comparison, Progress
from diskmorph.convert.windows import Grid, Window, pair_windows, windows
from diskmorph.convert.workers import Crew
from diskmorph.formats.errors import OptionError
from diskmorph.formats.extents import HOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.policy import Allowed

_CAPACITY = 1 << 20
_STEP = 4096
_SECTOR = 512


def compare(
    a: str | os.PathLike[str] | Disk,
    b: str | os.PathLike[str] | Disk,
    *,
    max_ranges: int | None = None,
    strict: bool = False,
    formats: tuple[str | None, str | None] = (None, None),
    parents: Allowed = None,
    limits: Limits | None = None,
    threads: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Compare what guests see; ranges of differing bytes come in order, the first `max_ranges` of them (None: all).

    Differences less than a sector apart make one range. Of unequal sizes the longer disk's tail must read zero;
    `strict` demands equal sizes. What both sides store in the same bytes of the same file is not read. Raises what
    opening and reading raise, and OptionError where both are standard input.
    """
    if all(isinstance(one, str | os.PathLike) and os.fspath(one) == "-" for one in (a, b)):
        raise OptionError("standard input can be read once: it is one image of the two, not both")
    with (
        open_source(a, format=formats[0], parents=parents, limits=limits) as left,
        open_source(b, format=formats[1], parents=parents, limits=limits) as right,
    ):
        return compare_disks(
            left.disk, right.disk, max_ranges=max_ranges, strict=strict, threads=threads, on_progress=on_progress
        )


def compare_disks(
    a: Disk,
    b: Disk,
    *,
    max_ranges: int | None = None,
    strict: bool = False,
    threads: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Compare open disks; see `compare`."""
    size = max(a.size, b.size)
    found = _Differences(max_ranges)

    def tick(done: int) -> None:
        if on_progress is not None:
            on_progress(Progress("compare", min(done, size), size))

    tick(0)
    if size:
        with contextlib.ExitStack() as stack:
            readers = stack.enter_context(Reader(a)), stack.enter_context(Reader(b))
            hands = [_Hand(*readers, found) for _ in range(threads or len(os.sched_getaffinity(0)))]
            crew: Crew[Any] = Crew(hands, found.until_enough(_pairs(a, b, size)), None)
            crew.run(tick)
    tick(size)
    a.verify_unchanged()
    b.verify_unchanged()
    return found.result((a.size, b.size), strict=strict)


def _pairs(a: Disk, b: Disk, size: int) -> Iterator[Window]:
    # A larger disk on the left keeps `paired` simple: both sides are padded with holes anyway.
    return pair_windows(a, b, Grid(size, _STEP, _STEP, _CAPACITY, _STEP), HOLE)


class _Differences:
    """The ranges found so far, ascending; merged where less than a sector lies between them."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._ranges: list[tuple[int, int]] = []  # start, stop

    def add(self, starts: list[int], stops: list[int]) -> None:
        for start, stop in zip(starts, stops, strict=True):
            if self._ranges and start - self._ranges[-1][1] < _SECTOR:
                self._ranges[-1] = (self._ranges[-1][0], stop)
            else:
                self._ranges.append((start, stop))

    def until_enough(self, source: Iterator[Window]) -> Iterator[Window]:
        for window in source:
            if self._most is not None and len(self._ranges) > self._most:
                return
            if window.read:
                yield window

    def result(self, sizes: tuple[int, int], *, strict: bool) -> Comparison:
        ranges = [(start, stop - start) for start, stop in self._ranges]
        if strict and sizes[0] != sizes[1]:
            shorter = min(sizes)
            ranges = [(start, min(length, shorter - start)) for start, length in ranges if start < shorter]
            ranges.append((shorter, max(sizes) - shorter))
        kept = ranges if self._most is None else ranges[: self._most]
        return Comparison(not ranges, ranges[0][0] if ranges else None, tuple(kept), sizes)


class _Hand:
    """Reads both sides of a window and finds where they differ."""

    def __init__(self, a: Reader, b: Reader, found: _Differences) -> None:
        self._a, self._b, self._found = a, b, found
        self._left, self._right = new_buffer(_CAPACITY), new_buffer(_CAPACITY)
        self.done = 0

    def prepare(self, window: Window) -> tuple[Window, list[int], list[int]]:
        plan = layout(window.segments, _STEP)
        left, right = self._left[: plan.size], self._right[: plan.size]
        self._a.fill(window.rows, plan.pieces, left)
        assert window.base_rows is not None  # noqa: S101 - every window here is READ
        self._b.fill(window.base_rows, plan.pieces, right)
        if left == right if plan.size <= _STEP else np.array_equal(_words(left), _words(right)):
            return window, [], []
        sectors = buffers.differing(left, right, _SECTOR)
        rough = buffers.ranges(plan.pieces, sectors, _SECTOR)
        starts, stops = _trimmed(rough, left, right)
        return window, starts, stops

    def settle(self, batch: tuple[Window, list[int], list[int]]) -> None:
        self._found.add(batch[1], batch[2])

    def write(self, batch: tuple[Window, list[int], list[int]]) -> None:
        self.done = max(self.done, batch[0].stop)


def _words(buffer: memoryview) -> NDArray[np.uint64]:
    return np.frombuffer(buffer, np.uint64)


def _trimmed(rough: NDArray[np.void], left: memoryview, right: memoryview) -> tuple[list[int], list[int]]:
    """Return starts and stops of ranges of differing sectors, cut to the first and last byte that differs."""
    starts, stops = [], []
    for start, length, at in zip(*(rough[name].tolist() for name in PIECE.names or ()), strict=True):
        a = np.frombuffer(left[at : at + length], np.uint8)
        b = np.frombuffer(right[at : at + length], np.uint8)
        differs = np.flatnonzero(a != b)
        starts.append(start + int(differs[0]))
        stops.append(start + int(differs[-1]) + 1)
    return starts, stops


def first_data(disk: Disk, start: int) -> int | None:
    """Return the offset of the disk's first byte from `start` on that is not zero, or None."""
    if start >= disk.size:
        return None
    from diskmorph.formats.views import Slice  # noqa: PLC0415 - only here

    tail = Slice(disk, start, disk.size - start)
    buffer = new_buffer(_CAPACITY)
    with Reader(tail) as reader:
        for window in windows(tail, Grid(tail.size, _STEP, _STEP, _CAPACITY, _STEP)):
            if not window.read:
                continue
            plan = layout(window.segments, _STEP)
            view = buffer[: plan.size]
            reader.fill(window.rows, plan.pieces, view)
            found = np.flatnonzero(np.frombuffer(view, np.uint8))
            if len(found):
                piece = plan.pieces[np.searchsorted(plan.pieces["at"], found[0], side="right") - 1]
                return start + int(piece["start"]) + int(found[0]) - int(piece["at"])
    return None
