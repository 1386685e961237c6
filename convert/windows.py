"""From the extents of a source to windows: ranges of the disk that are read, placed and written in one go.

A window holds segments, which are the source's extents regrouped to the target's grain: what is skipped, what can be
cloned without reading, what must be read. Windows end on the target's units, so that all pieces of a unit meet in one
`place` call; one window makes a worker read at most about `capacity` bytes, whatever its length on the disk.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diskmorph.formats.extents import ABSENT, BATCH, DATA, EXTENT, HOLE, PLAIN, ZERO, clip, cut, row, stops
from diskmorph.formats.rows import copied, distinct, joined
from diskmorph.formats.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.source import ByteSource

SKIP, CLONE, READ = range(3)

# A range of the disk, on the target's grain: its kind as the extents tell it, and what is done with it.
SEGMENT = np.dtype([("start", "<u8"), ("length", "<u8"), ("kind", "u1"), ("mode", "u1")], align=True)

CLONE_LEAST = 256 << 10
"""Bytes of one extent from which cloning pays (a clone costs some 17 us, however long)."""
CLONE_ALIGN = 4096
_SPAN_UNITS = 1 << 17
"""Units that one window may ask a place for: bounds the tables that a writer holds at once."""
_PIECES = 1 << 16
"""Pieces that runs are cut into at once, some 100 bytes each."""


@dataclass(slots=True)
class Window:
    """Disk range start..stop, which `segments` cover; `rows` and `base_rows` are the extents that meet it, whole."""

    start: int
    stop: int
    segments: NDArray[np.void]
    rows: NDArray[np.void]
    base_rows: NDArray[np.void] | None
    read: int
    """Bytes to be read."""
    clones: bool
    """Whether any segment is CLONE."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How a target divides the disk, in bytes.

    `unit`s are placed together, a `step` has a kind of its own, pieces in a buffer of `capacity` bytes are padded to
    `pad`.
    """

    size: int
    unit: int
    step: int
    capacity: int
    pad: int
    stride: int = 0
    """Where not 0: windows end on its multiples, but for those inside a hole, of which the last one will do.

    A writer that settles its tables there, and only there, lays out the same content in the same way, whatever the
    source's extents were.
    """

    @property
    def span(self) -> int:
        """Return the bytes of the disk that one window may place, holes not counted."""
        return max(self.unit * _SPAN_UNITS, self.capacity)


def windows(
    disk: Disk, grid: Grid, clonable: Callable[[NDArray[np.void]], NDArray[np.bool_]] | None = None
) -> Iterator[Window]:
    """Yield the windows of a disk, ascending and gapless. `clonable` tells of extents whether they can be cloned."""
    for rows in _unit_batches(disk.extents(), grid):
        mask = clonable(rows) if clonable is not None else None
        yield from _split(regroup(rows, grid.step, mask), rows, None, grid)


def pair_windows(disk: Disk, base: Disk, grid: Grid, rest: int = ABSENT) -> Iterator[Window]:
    """Yield the windows of a disk as differences to a base: what may differ is READ, the rest is of the kind `rest`."""
    numbers = same_files(disk, base)
    for rows, below in _paired_units(disk, base, grid):
        segments = regroup(candidates(rows, below, numbers), grid.step, None)
        segments["kind"] = np.where(segments["kind"] == DATA, DATA, rest)
        yield from _split(segments, rows, below, grid)


def everything(disk: Disk, grid: Grid) -> Iterator[Window]:
    """Yield windows in which all is READ, holes too: for targets that store every byte (`-S 0`)."""
    for rows in _unit_batches(disk.extents(), grid):
        start, stop = int(rows["start"][0]), int(stops(rows)[-1])
        segment = np.zeros(1, SEGMENT)
        segment[0] = (start, stop - start, DATA, READ)
        yield from _split(segment, rows, None, grid)


def _unit_batches(batches: Iterator[NDArray[np.void]], grid: Grid) -> Iterator[NDArray[np.void]]:
    """Yield the batches cut so that each begins and ends on a unit, or at the disk's end."""
    held: NDArray[np.void] | None = None
    for batch in batches:
        rows = batch if held is None else joined([held, batch])
        start, stop = int(rows["start"][0]), int(stops(rows)[-1])
        edge = stop if stop == grid.size else stop // grid.unit * grid.unit
        if edge > start:
            yield clip(rows, start, edge) if edge < stop else rows
        held = clip(rows, max(edge, start), stop) if edge < stop else None


def regroup(rows: NDArray[np.void], step: int, clonable: NDArray[np.bool_] | None) -> NDArray[np.void]:
    """Return SEGMENT rows on multiples of `step` for gapless extents: DATA wins over ZERO, ZERO over HOLE and ABSENT.

    The work is one sort of the rows' bounds, whatever their lengths.
    """
    size = np.uint64(step)
    ends = stops(rows)
    low, high = rows["start"] // size, (ends + size - np.uint64(1)) // size
    marks = [low, high]
    if clonable is not None and clonable.any():
        align = np.uint64(max(step, CLONE_ALIGN) // step)
        inner_low = (rows["start"] + size - np.uint64(1)) // size
        inner_low = (inner_low + align - np.uint64(1)) // align * align
        inner_high = ends // size // align * align
        clonable = clonable & (inner_high > inner_low)
        marks += [inner_low[clonable], inner_high[clonable]]
    points = distinct(np.concatenate(marks))
    count = len(points) - 1

    def covered(first: NDArray[np.uint64], last: NDArray[np.uint64]) -> NDArray[np.bool_]:
        change = np.bincount(np.searchsorted(points, first), minlength=count + 1)
        change -= np.bincount(np.searchsorted(points, last), minlength=count + 1)
        result: NDArray[np.bool_] = np.cumsum(change)[:count] > 0
        return result

    kinds = np.full(count, HOLE, np.uint8)
    for kind in (ABSENT, ZERO, DATA):
        mask = rows["kind"] == kind
        if mask.any():
            kinds[covered(low[mask], high[mask])] = kind
    modes = np.where(kinds == DATA, READ, SKIP).astype(np.uint8)
    if clonable is not None and clonable.any():
        modes[covered(inner_low[clonable], inner_high[clonable])] = CLONE
    return _segments(points * size, int(ends[-1]), kinds, modes)


def _segments(
    bounds: NDArray[np.uint64], end: int, kinds: NDArray[np.uint8], modes: NDArray[np.uint8]
) -> NDArray[np.void]:
    """Return merged segments between consecutive bounds, the last one ending at `end`."""
    heads = np.concatenate(([0], np.flatnonzero((kinds[1:] != kinds[:-1]) | (modes[1:] != modes[:-1])) + 1))
    out = np.zeros(len(heads), SEGMENT)
    out["start"] = bounds[heads]
    out["length"][:-1] = out["start"][1:] - out["start"][:-1]
    out["length"][-1] = np.uint64(end) - out["start"][-1]
    out["kind"], out["mode"] = kinds[heads], modes[heads]
    return out


def _split(
    segments: NDArray[np.void], rows: NDArray[np.void], below: NDArray[np.void] | None, grid: Grid
) -> Iterator[Window]:
    start = int(segments["start"][0])
    cursor, under = _Cursor(rows), _Cursor(below) if below is not None else None
    parts = _Cursor(segments)
    for stop in _bounds(segments, grid):
        part = copied(parts.within(start, stop))
        _trim(part, start, stop)
        modes, lengths = part["mode"], part["length"]
        reads = modes == READ
        read = int(lengths.sum() if reads.all() else lengths[reads].sum())
        yield Window(
            start,
            stop,
            part,
            cursor.within(start, stop),
            under.within(start, stop) if under is not None else None,
            read,
            bool((modes == CLONE).any()),
        )
        start = stop


class _Cursor:
    """Walks along sorted, gapless rows: which of them meet one ascending range after another."""

    def __init__(self, rows: NDArray[np.void]) -> None:
        self._rows = rows
        self._stops = (rows["start"] + rows["length"]).tolist()
        self._at = 0

    def within(self, start: int, stop: int) -> NDArray[np.void]:
        """Return the rows that meet start..stop, whole, as a view."""
        first = bisect_right(self._stops, start, self._at)
        last = first if self._stops[first] >= stop else bisect_left(self._stops, stop, first)
        self._at = first
        return self._rows[first : last + 1]


def _trim(part: NDArray[np.void], start: int, stop: int) -> None:
    """Cut the first and the last segment to start..stop, in place."""
    before = start - int(part["start"][0])
    if before:
        part["start"][0] = start
        part["length"][0] -= np.uint64(before)
    after = int(part["start"][-1]) + int(part["length"][-1]) - stop
    if after:
        part["length"][-1] -= np.uint64(after)


def _bounds(segments: NDArray[np.void], grid: Grid) -> Iterator[int]:
    """Yield where windows end: on units, as far on as a window may reach."""
    starts, ends, kinds, modes = _on_units(segments, grid)
    last, before = ends[-1], 0.0
    for part in _blocks(starts, ends, _periods(kinds, modes, grid)):
        pieces, costs = _costs(part, kinds, modes, grid)
        total = np.cumsum(costs) + before
        closing = np.flatnonzero((pieces % np.uint64(grid.unit) == 0) | (pieces == last))
        before = float(total[-1])
        if len(closing):
            yield from _reaches(pieces[closing], total[closing], grid)
            before -= float(total[closing[-1]])


def _reaches(ends: NDArray[np.uint64], total: NDArray[np.float64], grid: Grid) -> Iterator[int]:
    """Yield the ends that windows reach; `total` is what all costs up to each end."""
    stations = np.flatnonzero(ends % np.uint64(grid.stride) == 0) if grid.stride else np.zeros(0, np.intp)
    at, spent = 0, 0.0
    while at < len(ends):
        following = max(at + 1, int(np.searchsorted(total, spent + 1.0, side="right")))
        if len(stations) and (next_station := int(np.searchsorted(stations, at))) < len(stations):
            following = min(following, int(stations[next_station]) + 1)
        spent = float(total[following - 1])
        yield int(ends[following - 1])
        at = following


def _on_units(
    segments: NDArray[np.void], grid: Grid
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint8], NDArray[np.uint8]]:
    """Return starts, ends, kinds and modes of the segments, cut next to units, and in holes at the last station."""
    start, stop = segments["start"], segments["start"] + segments["length"]
    points = [start]
    if grid.step != grid.unit:
        unit = np.uint64(grid.unit)
        points += [(start + unit - np.uint64(1)) // unit * unit, stop // unit * unit]
    if grid.stride:
        points.append(stop // np.uint64(grid.stride) * np.uint64(grid.stride))
    if len(points) == 1:
        return start, stop, segments["kind"], segments["mode"]
    cuts = distinct(np.concatenate(points))
    cuts = cuts[(cuts >= start[0]) & (cuts < stop[-1])]
    owner = np.searchsorted(start, cuts, side="right") - 1
    return cuts, np.append(cuts[1:], stop[-1]), segments["kind"][owner], segments["mode"][owner]


def _periods(kinds: NDArray[np.uint8], modes: NDArray[np.uint8], grid: Grid) -> NDArray[np.uint64]:
    """Return of each segment the distance of the places where it may be cut: none is within a hole."""
    span = min(grid.span // grid.unit * grid.unit, grid.stride or 1 << 62)
    period = np.where(modes == READ, max(grid.capacity // grid.unit, 1) * grid.unit, span)
    return np.where(kinds == HOLE, np.uint64(1 << 62), period.astype(np.uint64))


class _Block(NamedTuple):
    """Segments that are cut at once, from number `first` on, and what is cut of them."""

    first: int
    start: NDArray[np.uint64]
    stop: NDArray[np.uint64]
    period: NDArray[np.uint64]


def _blocks(start: NDArray[np.uint64], stop: NDArray[np.uint64], period: NDArray[np.uint64]) -> Iterator[_Block]:
    """Yield all segments in blocks of at most `_PIECES` pieces, which memory is taken for; a long one in parts."""
    pieces = ((stop + period - np.uint64(1)) // period - start // period).astype(np.int64)
    total = np.cumsum(pieces)
    first, done = 0, 0
    while first < len(start):
        last = int(np.searchsorted(total, done + _PIECES, side="right"))
        if last > first:
            yield _Block(first, start[first:last], stop[first:last], period[first:last])
        else:
            last = first + 1
            yield from _parts(first, int(start[first]), int(stop[first]), int(period[first]))
        first, done = last, int(total[last - 1])


def _parts(number: int, start: int, stop: int, period: int) -> Iterator[_Block]:
    step = period * _PIECES
    for at in range(start // step * step, stop, step):
        bounds = (max(at, start), min(at + step, stop), period)
        yield _Block(number, *(np.array([bound], np.uint64) for bound in bounds))


def _costs(
    block: _Block, kinds: NDArray[np.uint8], modes: NDArray[np.uint8], grid: Grid
) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Cut segments into pieces none of which is more than a window; return their ends and costs (1: one window)."""
    start, stop, period = block.start, block.stop, block.period
    first, last = start // period, (stop + period - np.uint64(1)) // period
    counts = (last - first).astype(np.int64)
    owner = np.repeat(np.arange(len(start)), counts)
    turn = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.uint64)
    begins = np.maximum(start[owner], (first[owner] + turn) * period[owner])
    ends = np.minimum(stop[owner], (first[owner] + turn + np.uint64(1)) * period[owner])
    lengths = (ends - begins).astype(np.float64)
    padded = np.ceil(lengths / grid.pad) * grid.pad
    owner += block.first
    costs = np.where(modes[owner] == READ, padded / grid.capacity, 0.0) + np.where(
        kinds[owner] == HOLE, 0.0, lengths / (2.0 * grid.span)
    )
    return ends, costs


# --- two disks side by side


def paired(a: Disk, b: Disk, size: int) -> Iterator[tuple[NDArray[np.void], NDArray[np.void]]]:
    """Yield batches of both disks' extents over 0..size, cut to the same bounds; beyond its end a disk is a hole."""
    left, right = _padded(a, size), _padded(b, size)
    rows_a, rows_b = next(left, None), next(right, None)
    while rows_a is not None and rows_b is not None and len(rows_a) and len(rows_b):
        start = int(rows_a["start"][0])
        end_a, end_b = int(stops(rows_a)[-1]), int(stops(rows_b)[-1])
        stop = min(end_a, end_b)
        part_a, part_b = clip(rows_a, start, stop), clip(rows_b, start, stop)
        yield cut(part_a, part_b["start"]), cut(part_b, part_a["start"])
        rows_a = clip(rows_a, stop, end_a) if end_a > stop else next(left, None)
        rows_b = clip(rows_b, stop, end_b) if end_b > stop else next(right, None)


def _padded(disk: Disk, size: int) -> Iterator[NDArray[np.void]]:
    end = min(disk.size, size)
    if end:
        yield from disk.extents(0, end)
    if end < size:
        yield row(end, size - end, HOLE)


def same_files(a: Disk, b: Disk) -> NDArray[np.int64]:
    """Return for each file of `b` the number of the same file in `a.files`, or -1."""
    known = {key: number for number, source in enumerate(a.files) if (key := _file_key(source)) is not None}
    return np.array([known.get(_file_key(source), -1) for source in b.files] or [-1], np.int64)


def _file_key(source: ByteSource) -> object:
    return source.identity if isinstance(source, FileSource) else None


def candidates(a: NDArray[np.void], b: NDArray[np.void], numbers: NDArray[np.int64]) -> NDArray[np.void]:
    """Return extents that are DATA where two rows may hold different bytes, HOLE elsewhere; the `offset`s mean nothing.

    Rows of the two sides have the same bounds; `numbers` are those of `same_files`.
    """
    data_a, data_b = a["kind"] == DATA, b["kind"] == DATA
    file_b = numbers[np.minimum(b["file"], len(numbers) - 1)]
    shared = data_a & data_b & (a["file"] == file_b) & (a["offset"] == b["offset"])
    shared &= (a["codec"] == b["codec"]) & (a["skip"] == b["skip"])
    out = np.zeros(len(a), EXTENT)
    out["start"], out["length"] = a["start"], a["length"]
    out["kind"] = np.where((data_a | data_b) & ~shared, DATA, HOLE)
    return out


def _paired_units(disk: Disk, base: Disk, grid: Grid) -> Iterator[tuple[NDArray[np.void], NDArray[np.void]]]:
    held: tuple[NDArray[np.void], NDArray[np.void]] | None = None
    for pair in paired(disk, base, grid.size):
        rows, below = pair
        if held is not None:
            rows, below = joined([held[0], rows]), joined([held[1], below])
        start, stop = int(rows["start"][0]), int(stops(rows)[-1])
        edge = stop if stop == grid.size else stop // grid.unit * grid.unit
        if edge > start:
            yield clip(rows, start, edge), clip(below, start, edge)
        held = (clip(rows, max(edge, start), stop), clip(below, max(edge, start), stop)) if edge < stop else None


__all__ = [
    "BATCH",
    "CLONE",
    "PLAIN",
    "READ",
    "SKIP",
    "Grid",
    "Window",
    "everything",
    "pair_windows",
    "paired",
    "windows",
]
