"""Checking where grains lie: in the file, each at a place of its own, clear of metadata, on the grain's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.check import ERROR, WARNING
from diskmorph.formats.errors import FormatError
from diskmorph.formats.extents import DATA
from diskmorph.formats.vmdk import schema
from diskmorph.formats.vmdk.schema import DIRECTORY_AT_END, GRAIN_MARKER, MARKER_BYTES, SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.vmdk.extent import GrainTables
    from diskmorph.formats.vmdk.hosted import StreamExtent

_LISTED = 50
"""Findings of one kind that are listed for a batch of tables; the others are only counted."""
_MOST_ODD = 1 << 22
_MOST_BITS = 1 << 31
BATCH = 1 << 17
"""Entries that are looked at at once."""
_NONE = np.zeros(0, np.uint64)


class Ranges:
    """Byte ranges of metadata, for asking which grains touch one."""

    def __init__(self, starts: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> None:
        order = np.argsort(starts)
        self._starts = starts[order]
        self._ends = np.maximum.accumulate((starts + sizes)[order]) if len(starts) else starts

    def touched(self, offsets: NDArray[np.uint64], size: int) -> NDArray[np.bool_]:
        """Return which of the ranges of `size` bytes at `offsets` overlap metadata."""
        if not len(self._starts):
            return np.zeros(len(offsets), np.bool_)
        before = np.searchsorted(self._starts, offsets + np.uint64(size)) - 1
        hit: NDArray[np.bool_] = (before >= 0) & (self._ends[np.maximum(before, 0)] > offsets)
        return hit


class Used:
    """Which grains of a file are used: one bit each, whose pages cost memory only where something is used."""

    def __init__(self, count: int) -> None:
        self.full = count > _MOST_BITS
        """Whether the file is too large to keep count of it; then nothing counts as used."""
        self._count = 0 if self.full else count
        self._bits = np.zeros(self._count // 8 + 1, np.uint8)

    def has(self, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of the grains are used; numbers outside the file are not."""
        inside = (index >= 0) & (index < self._count)
        at = np.where(inside, index, 0)
        found: NDArray[np.bool_] = inside & ((self._bits[at >> 3] >> (at & 7).astype(np.uint8)) & 1).astype(np.bool_)
        return found

    def add(self, index: NDArray[np.int64]) -> None:
        """Mark grains as used."""
        index = index[index < self._count]
        bit = index & 7
        for number in range(8):
            self._bits[index[bit == number] >> 3] |= np.uint8(1 << number)


class GrainCheck:
    """Walks the tables of an extent of plain grains, once, in batches; remembers used places in a bitmap."""

    def __init__(self, report: CheckReport, extent: GrainTables, name: str, metadata: Ranges | None = None) -> None:
        self._report, self._extent, self._name = report, extent, name
        self.metadata = metadata or Ranges(_NONE, _NONE)
        self._residue: int | None = None
        self._used = Used(0)
        self._odd: list[NDArray[np.uint64]] = []
        self._odd_count = 0
        self._twice: list[NDArray[np.uint64]] = []

    def run(self, also: Callable[[int, int, NDArray[Any]], None] | None = None) -> None:
        """Check all tables; `also` is called with first table, last table and entries of each batch."""
        extent, count = self._extent, len(self._extent.tables)
        used = np.flatnonzero(extent.tables)
        step, at = max(1, BATCH // extent.entries), 0
        while at < count:
            position = int(np.searchsorted(used, at))
            if position == len(used):
                break
            at = int(used[position])
            last = min(at + step, count)
            entries = extent.load(at, last)
            if also is not None:
                also(at, last, entries)
            self._batch(at * extent.entries, entries)
            at = last
        self._finish_odd()

    def twice(self) -> NDArray[np.uint64]:
        """Return the byte offsets of grains that lie where another does, or over one off the grid of the others."""
        return np.unique(np.concatenate(self._twice)) if self._twice else _NONE

    def free(self, offset: int) -> bool:
        """Whether a grain may lie at `offset` and is used by no table entry, as far as count is kept of that."""
        if self._used.full or offset + self._extent.grain > self._extent.source.size or not self.possible(offset):
            return False
        index, odd = divmod(offset - (self._residue or 0), self._extent.grain)
        return not odd and index >= 0 and not self._used.has(np.array([index]))[0]

    def possible(self, offset: int) -> bool:
        """Whether a grain may begin at `offset`: in the file and clear of metadata; the last one may be short."""
        extent = self._extent
        if not 0 < offset < extent.source.size:
            return False
        return not self.metadata.touched(np.array([offset], np.uint64), extent.grain)[0]

    def _batch(self, first: int, entries: NDArray[Any]) -> None:
        extent = self._extent
        try:
            kinds, offsets = extent.resolve(first, entries)
        except FormatError as error:
            self._report.add("grain table", error.offset, f"{self._name}{error.problem} ({error.place()})")
            return
        numbers = np.flatnonzero(kinds == DATA)
        if not len(numbers):
            return
        offsets = offsets[numbers]
        starts = (numbers + first).astype(np.uint64) * np.uint64(extent.grain)
        outside = starts >= np.uint64(extent.size)
        self._tell(starts[outside], offsets[outside], "is described, though the disk ends before it", WARNING)
        inside = ~outside
        starts, offsets = starts[inside], offsets[inside]
        lengths = np.minimum(np.uint64(extent.grain), np.uint64(extent.size) - starts)
        beyond = offsets + lengths > np.uint64(extent.source.size)
        self._tell(starts[beyond], offsets[beyond], "lies beyond the end of the file")
        starts, offsets = starts[~beyond], offsets[~beyond]
        touched = self.metadata.touched(offsets, extent.grain)
        self._tell(starts[touched], offsets[touched], "lies over metadata")
        self._places(starts[~touched], offsets[~touched])

    def _tell(self, starts: NDArray[np.uint64], offsets: NDArray[np.uint64], what: str, severity: str = ERROR) -> None:
        """Note the first findings one by one and the rest as one."""
        pairs = zip(starts[:_LISTED].tolist(), offsets[:_LISTED].tolist(), strict=True)
        for start, offset in pairs:
            self._report.add("grain", offset, f"{self._name}the grain of disk offset {start} {what}", severity)
        rest = len(starts) - _LISTED
        if rest > 0:
            self._report.add("grain", None, f"{self._name}{rest} more: {what}", severity, rest)

    def _places(self, starts: NDArray[np.uint64], offsets: NDArray[np.uint64]) -> None:
        """Note places as used, and tell of those that are used already."""
        if not len(offsets):
            return
        grain = np.uint64(self._extent.grain)
        if self._residue is None:
            self._residue = int(offsets[0] % grain)
            self._used = Used(self._extent.source.size // self._extent.grain + 1)
            if self._used.full:
                self._report.add("grain", None, f"{self._name}too large to look for grains used twice", WARNING)
        odd = offsets % grain != np.uint64(self._residue)
        if odd.any():
            self._tell(starts[odd], offsets[odd], "lies off the grid of the others", WARNING)
            self._odd_count += int(odd.sum())
            if self._odd_count <= _MOST_ODD:
                self._odd.append(offsets[odd])
        starts, offsets = starts[~odd], offsets[~odd]
        index = ((offsets - np.uint64(self._residue)) // grain).astype(np.int64)
        again = self._used.has(index)
        if (index[1:] <= index[:-1]).any():  # not ascending: there may be some twice in this batch
            _, first = np.unique(index, return_index=True)
            within = np.ones(len(index), np.bool_)
            within[first] = False
            again |= within
        self._used.add(index)
        self._tell(starts[again], offsets[again], "lies where another grain lies")
        if again.any():
            self._twice.append(offsets[again])

    def _finish_odd(self) -> None:
        """Look for overlaps among grains off the grid, and of them with those on it."""
        if not self._odd:
            return
        grain, odd = self._extent.grain, np.sort(np.concatenate(self._odd))
        near = np.flatnonzero(np.diff(odd) < grain)
        index = (odd.astype(np.int64) - (self._residue or 0)) // grain
        over = self._used.has(index) | self._used.has(index + 1)
        clashes = np.union1d(odd[near + 1] if len(near) else _NONE, odd[over])
        self._twice.append(clashes)
        for offset in clashes[:_LISTED].tolist():
            self._report.add("grain", offset, f"{self._name}a grain overlaps another")
        if len(clashes) > _LISTED:
            rest = len(clashes) - _LISTED
            self._report.add("grain", None, f"{self._name}{rest} more grains overlap others", count=rest)


def check_stream(report: CheckReport, extent: StreamExtent, name: str) -> int:
    """Check every marker and grain of a stream; return the byte where the last grain or table ends."""
    _check_table_markers(report, extent, name)
    tables = extent.tables[extent.tables != 0]
    used = [int(tables.max()) + extent.table_bytes if len(tables) else 0]
    header = extent.header
    used.append(header.gd_offset * SECTOR + -(-len(extent.tables) * 4 // SECTOR) * SECTOR)
    used.append(header.overhead * SECTOR)
    if not header.flags & schema.FLAG_MARKERS:
        return extent.source.size
    places: list[NDArray[np.uint64]] = []
    ends: list[NDArray[np.uint64]] = []
    for at in np.flatnonzero(extent.tables).tolist():
        first = at * extent.entries
        kinds, offsets = extent.resolve(first, extent.load(at, at + 1))
        numbers = np.flatnonzero(kinds == DATA)
        place = offsets[numbers]
        places.append(place)
        ends.append(_marker_ends(report, extent, name, numbers + first, place))
    if places:
        used.append(_check_overlaps(report, name, np.concatenate(places), np.concatenate(ends)))
    return max(used)


def _marker_ends(
    report: CheckReport, extent: StreamExtent, name: str, numbers: NDArray[Any], places: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Return where each grain ends by its marker, rounded up to a sector; tell of markers that are wrong."""
    source = extent.source
    ends = places.copy()
    raw = bytearray(MARKER_BYTES)
    view = memoryview(raw)
    for index, (number, place) in enumerate(zip(numbers.tolist(), places.tolist(), strict=True)):
        start = number * extent.grain
        if place + MARKER_BYTES > source.size:
            report.add("grain", place, f"{name}the grain of disk offset {start} lies beyond the end of the file")
            continue
        source.read_into(place, view)
        marker = np.frombuffer(raw, GRAIN_MARKER, 1)[0]
        lba, size = int(marker["lba"]), int(marker["size"])
        right = lba * SECTOR == start
        if not right:
            report.add("grain marker", place, f"{name}the marker says sector {lba}, the table {start // SECTOR}")
        if not 0 < size <= extent.most:
            report.add("grain marker", place, f"{name}the grain of disk offset {start} has {size} stored bytes")
            continue
        if place + MARKER_BYTES + size > source.size:
            report.add("grain", place, f"{name}the grain of disk offset {start} lies beyond the end of the file")
            continue
        ends[index] = place + -(-(MARKER_BYTES + size) // SECTOR) * SECTOR
        if right:
            _check_content(report, extent, name, place, size)
    return ends


def _check_content(report: CheckReport, extent: StreamExtent, name: str, place: int, size: int) -> None:
    """Decode a grain: its stream ends in a checksum."""
    try:
        extent.decode(place + MARKER_BYTES, size)
    except FormatError as error:
        report.add("grain", place, f"{name}{error.problem} ({error.place()})")


def _check_overlaps(report: CheckReport, name: str, places: NDArray[np.uint64], ends: NDArray[np.uint64]) -> int:
    """Tell of grains that run into the next; return the end of the last."""
    if not len(places):
        return 0
    order = np.argsort(places, kind="stable")
    places, ends = places[order], ends[order]
    same = (places[1:] == places[:-1]) | (ends[:-1] > places[1:])
    clashes = np.flatnonzero(same)
    for index in clashes[:_LISTED].tolist():
        report.add("grain", int(places[index + 1]), f"{name}a compressed grain overlaps the one before it")
    if len(clashes) > _LISTED:
        rest = len(clashes) - _LISTED
        report.add("grain", None, f"{name}{rest} more grains overlap the ones before them", count=rest)
    return int(ends.max())


def _check_table_markers(report: CheckReport, extent: StreamExtent, name: str) -> None:
    """Tables that lie among the grains have a marker before them, by which a reader of the stream finds them."""
    header, source = extent.header, extent.source
    if not header.flags & schema.FLAG_MARKERS or header.gd_offset == DIRECTORY_AT_END:
        return
    if header.gd_offset <= header.overhead:
        return
    wanted = [(int(table), schema.GRAIN_TABLE, "grain table") for table in extent.tables[extent.tables != 0]]
    wanted.append((header.gd_offset * SECTOR, schema.GRAIN_DIRECTORY, "grain directory"))
    for at, kind, what in wanted:
        marker = schema.MARKER.parse(source.read(at - SECTOR, SECTOR))
        if (marker.size, marker.type) != (0, kind):
            report.add("marker", at - SECTOR, f"{name}the {what} at {at} has no marker before it", WARNING)
