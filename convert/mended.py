"""An image as it would be with patches applied: what a repair is judged by before anything is written."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.extents import DATA, PLAIN
from diskmorph.formats.source import ByteSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from diskmorph.formats.check import Patch
    from diskmorph.formats.disk import Disk


class MendedSource(ByteSource):
    """A source with patches over it, the later ones above the earlier; they may lie behind its end."""

    def __init__(self, source: ByteSource, patches: Iterable[Patch]) -> None:
        self.name = source.name
        self.size = source.size
        self._source = source
        self._starts: list[int] = []
        self._parts: list[memoryview] = []
        for patch in patches:
            if patch.data:
                self._put(patch.offset, memoryview(patch.data))
        self._begun = np.array(self._starts, np.uint64)
        self._over = self._begun + np.array([len(part) for part in self._parts], np.uint64)

    def _put(self, start: int, part: memoryview) -> None:
        """Lay a part over what is there."""
        stop = start + len(part)
        low, high = self._touched(start, stop)
        starts, parts = [start], [part]
        if low < high and self._starts[low] < start:
            starts.insert(0, self._starts[low])
            parts.insert(0, self._parts[low][: start - self._starts[low]])
        if low < high and self._stop(high - 1) > stop:
            starts.append(stop)
            parts.append(self._parts[high - 1][stop - self._starts[high - 1] :])
        self._starts[low:high], self._parts[low:high] = starts, parts
        self.size = max(self.size, stop)

    def _stop(self, index: int) -> int:
        return self._starts[index] + len(self._parts[index])

    def _touched(self, start: int, stop: int) -> tuple[int, int]:
        """Return first and one behind last of the parts that overlap a range."""
        low = bisect_right(self._starts, start) - 1
        if low < 0 or self._stop(low) <= start:
            low += 1
        return low, max(low, bisect_left(self._starts, stop))

    def patched(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of what is patched within a range, in order."""
        low, high = self._touched(start, stop)
        for index in range(low, high):
            yield max(self._starts[index], start), min(self._stop(index), stop)

    def touches(self, starts: NDArray[np.uint64], ends: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return which of the ranges starts..ends overlap what is patched."""
        if not len(self._begun):
            return np.zeros(len(starts), np.bool_)
        following = np.searchsorted(self._over, starts, side="right")
        hit: NDArray[np.bool_] = self._begun[np.minimum(following, len(self._begun) - 1)] < ends
        return hit & (following < len(self._begun))

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        stop = min(offset + len(buffer), self.size)
        if stop <= offset:
            return 0
        below = max(0, min(stop, self._source.size) - offset)
        self._source.read_into(offset, buffer[:below])
        buffer[below : stop - offset] = bytes(stop - offset - below)
        low, high = self._touched(offset, stop)
        for start, part in zip(self._starts[low:high], self._parts[low:high], strict=True):
            first, last = max(start, offset), min(start + len(part), stop)
            buffer[first - offset : last - offset] = part[first - start : last - start]
        return stop - offset

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """See ByteSource: the source's own, and what is patched in its holes."""
        inside = min(stop, self._source.size)
        for begin, length, allocated in self._source.runs(start, inside):
            if allocated:
                yield begin, length, True
            else:
                yield from self._with_holes(begin, begin + length)
        if stop > max(start, inside):
            yield from self._with_holes(max(start, inside), stop)

    def _with_holes(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        at = start
        for begin, end in self.patched(start, stop):
            if begin > at:
                yield at, begin - at, False
            yield begin, end - begin, True
            at = end
        if at < stop:
            yield at, stop - at, False

    @property
    def path(self) -> Path | None:
        """See ByteSource: by it, names in the image are looked for."""
        return self._source.path

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self._source.verify_unchanged()


def overwritten(source: MendedSource, disk: Disk) -> int | None:
    """Return where in the file patches lie over data of the disk that is read from it, or None."""
    for rows in disk.extents():
        own = rows[(rows["kind"] == DATA) & (rows["file"] == 0)]
        sizes = np.where(own["codec"] == PLAIN, own["length"], own["stored"])
        hit = np.flatnonzero(source.touches(own["offset"], own["offset"] + sizes))
        if len(hit):
            return int(own["offset"][hit[0]])
    return None
