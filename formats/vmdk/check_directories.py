"""Judging the two grain directories of a hosted extent: which of their tables are what they are taken for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.check import ERROR, WARNING
from diskmorph.formats.errors import FormatError
from diskmorph.formats.extents import DATA
from diskmorph.formats.vmdk import directories
from diskmorph.formats.vmdk.check_grains import BATCH, Ranges
from diskmorph.formats.vmdk.directories import PRIMARY, REDUNDANT
from diskmorph.formats.vmdk.extent import load_tables
from diskmorph.formats.vmdk.schema import ENTRY, SECTOR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.vmdk.hosted import HostedExtent


@dataclass(slots=True, eq=False)
class Side:
    """One of the two directories. `wrong` marks its entries that cannot be relied on.

    `doubtful` are those of them that may be right: it may be what they lie over that is wrong.
    """

    structure: str
    field: int
    """Byte offset of the header's field that says where the directory is."""
    directory: directories.Directory
    readable: bool
    """Whether the directory is in the file at all."""
    wrong: NDArray[np.bool_]
    doubtful: NDArray[np.bool_]

    @property
    def tables(self) -> NDArray[np.uint64]:
        """Byte offsets of the tables, as the directory names them."""
        return self.directory.tables

    @property
    def sound(self) -> NDArray[np.bool_]:
        """Which entries name a table that can be relied on."""
        found: NDArray[np.bool_] = (self.tables != 0) & ~self.wrong
        return found

    @property
    def relied(self) -> NDArray[np.uint64]:
        """The tables with 0 for those that cannot be relied on."""
        relied: NDArray[np.uint64] = np.where(self.wrong, np.uint64(0), self.tables)
        return relied


class Judgement:
    """Both directories and what is wrong with each; without a redundant one, that is empty."""

    def __init__(self, report: CheckReport, extent: HostedExtent, name: str) -> None:
        self._report, self._extent, self._name = report, extent, name
        header = extent.header
        self.redundancy = directories.has_redundant(header)
        self.primary = self._side(header.gd_offset, 56, PRIMARY)
        self.redundant = self._side(header.rgd_offset if self.redundancy else None, 48, REDUNDANT)
        self.pairs = ((self.primary, self.redundant), (self.redundant, self.primary))
        if not self.redundancy:
            return
        for one, other in self.pairs:
            self._judge_places(one, other)
        self._judge_overlaps()
        for one, other in self.pairs:
            self._tell_gaps(one, other)
        self._tell_shared()

    @property
    def has_orphans(self) -> bool:
        """Whether there may be a table that neither directory names: it may lie, or own, where a grain seems free."""
        ours, theirs = self.primary, self.redundant
        if (ours.sound != theirs.sound).any():
            return True
        shared = ours.sound & (ours.tables == theirs.tables)
        return bool((shared & ~ours.directory.settled & ~theirs.directory.settled).any())

    @property
    def floor(self) -> int:
        """The byte below which no grain lies: by the header, and no more than tables that follow the layout take."""
        ends = [SECTOR]
        for side, _ in self.pairs:
            if side.readable and side.directory.settled.any():
                ends.append(side.directory.first + len(side.tables) * side.directory.room)
        return max(SECTOR, min(max(ends), self._extent.header.overhead * SECTOR))

    def _side(self, sector: int | None, field: int, structure: str) -> Side:
        extent, header = self._extent, self._extent.header
        nothing = np.zeros(len(extent.tables), np.bool_)
        none = directories.Directory(0, np.zeros(len(nothing), np.uint64), 1, 0, nothing)
        if sector is None:
            return Side(structure, field, none, False, nothing.copy(), nothing.copy())
        try:
            found = directories.load(extent.source, header, sector, structure)
        except FormatError as error:
            self._report.add(structure, error.offset, f"{self._name}{error.problem} ({error.place()})")
            return Side(structure, field, none, False, nothing.copy(), nothing.copy())
        if found.problem is not None:
            text = f"{found.problem.problem} ({found.problem.place()})"
            self._tell(structure, found.problem.offset, text, int(found.bad.sum()))
        return Side(structure, field, found, True, found.bad.copy(), nothing)

    def _tell(self, structure: str, offset: int | None, text: str, count: int, severity: str = ERROR) -> None:
        self._report.add(structure, offset, self._name + text, severity, count)

    def _tell_entries(self, side: Side, which: NDArray[np.bool_], text: str, severity: str = ERROR) -> None:
        if which.any():
            entry, count = int(np.argmax(which)), int(which.sum())
            at = side.directory.sector * SECTOR + entry * ENTRY.itemsize
            self._tell(side.structure, at, f"{count} entries, the first of table {entry}, {text}", count, severity)

    def _judge_places(self, one: Side, other: Side) -> None:
        if not one.readable or not other.readable:
            return
        astray = directories.misplaced(self._extent.source, self._extent.header, one.directory, other.directory)
        self._tell_entries(one, astray, "are not where the layout puts them; the other's are, and say something else")
        one.wrong |= astray

    def _judge_overlaps(self) -> None:
        """Tables that are not where the layout puts them may lie over metadata, or over a grain of the other's."""
        found = []
        for one, other in self.pairs:
            loose = one.sound & ~one.directory.settled
            if loose.any():
                metadata, grains = self._over_metadata(one, other, loose), self._over_grains(one, other, loose)
                found.append((one, metadata, grains, self._doubtful(one, other, metadata | grains)))
        for one, metadata, grains, doubtful in found:
            self._tell_entries(one, metadata, "lie over other metadata")
            self._tell_entries(one, grains & ~metadata, "lie over grains that the other's tables name")
            one.wrong |= metadata | grains
            one.doubtful |= doubtful

    def _over_metadata(self, one: Side, other: Side, loose: NDArray[np.bool_]) -> NDArray[np.bool_]:
        extent = self._extent
        tables = other.tables[other.sound & (other.tables != one.tables)]
        known = ranges_of(tables, extent.table_bytes, [side for side, _ in self.pairs if side.readable])
        return loose & known.touched(one.tables, extent.table_bytes)

    def _over_grains(self, one: Side, other: Side, loose: NDArray[np.bool_]) -> NDArray[np.bool_]:
        where = np.flatnonzero(loose & (one.tables != other.tables))
        over = grains_over(self._extent, other.relied, one.tables[where], self._extent.table_bytes, self.floor)
        found = np.zeros(len(one.tables), np.bool_)
        found[where[over]] = True
        found &= self._in_common(one, other, found)[0] == 0
        return found

    def _doubtful(self, one: Side, other: Side, among: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which tables may be what they are taken for: unless the other copy has several entries, none alike."""
        alike, used = self._in_common(one, other, among)
        found: NDArray[np.bool_] = among & ((alike > 0) | (used < 2))
        return found

    def mendable(self, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which tables may be written to: the layout puts them there, or they have entries in common."""
        one, other = self.primary, self.redundant
        loose = which & ~(one.directory.settled & other.directory.settled)
        found: NDArray[np.bool_] = which & (~loose | (self._in_common(one, other, loose)[0] > 0))
        return found

    def _in_common(
        self, one: Side, other: Side, among: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how many grains a table and its sound other copy place alike, as no other bytes do; and all of it."""
        extent = self._extent
        alike, used = np.zeros(len(among), np.int64), np.zeros(len(among), np.int64)
        where = np.flatnonzero(among & other.sound)
        for low in range(0, len(where), directories.BATCH_TABLES):
            part = where[low : low + directories.BATCH_TABLES]
            ours, theirs = (
                load_tables(extent.source, side.tables[part], extent.entries, ENTRY).reshape(-1, extent.entries)
                for side in (one, other)
            )
            alike[part] = ((ours == theirs) & (ours > 1)).sum(axis=1)
            used[part] = (theirs != 0).sum(axis=1)
        return alike, used

    def _tell_gaps(self, one: Side, other: Side) -> None:
        if not one.readable:
            return
        missing = (one.tables == 0) & other.sound
        self._tell_entries(one, missing, "lack grain tables that the other has")

    def _tell_shared(self) -> None:
        shared = (self.primary.tables == self.redundant.tables) & (self.primary.tables != 0)
        self._tell_entries(self.redundant, shared, "name the same grain tables in both directories", WARNING)


def ranges_of(tables: NDArray[np.uint64], table_bytes: int, sides: list[Side]) -> Ranges:
    """Return the bytes of tables and directories."""
    starts = np.array([side.directory.sector * SECTOR for side in sides], np.uint64)
    sizes = np.array([len(side.tables) * ENTRY.itemsize for side in sides], np.uint64)
    return Ranges(
        np.concatenate((starts, tables)), np.concatenate((sizes, np.full(len(tables), table_bytes, np.uint64)))
    )


def grains_over(
    extent: HostedExtent, tables: NDArray[np.uint64], starts: NDArray[np.uint64], size: int, floor: int
) -> NDArray[np.bool_]:
    """Return which of the ranges of `size` bytes at `starts` touch a data grain that the tables name.

    Grains that begin below byte `floor`, where only metadata lies, or beyond the file do not count.
    """
    over = np.zeros(len(starts), np.bool_)
    if not len(starts):
        return over
    places, used = starts.astype(np.int64), np.flatnonzero(tables)
    step = max(1, BATCH // extent.entries)
    for low in range(0, len(used), step):
        entries = load_tables(extent.source, tables[used[low : low + step]], extent.entries, ENTRY)
        kinds, offsets = extent.resolve(0, entries)
        grains = np.sort(offsets[kinds == DATA].astype(np.int64))
        grains = grains[(grains >= floor) & (grains < extent.source.size)]
        before = np.searchsorted(grains, places - extent.grain, side="right")
        over |= np.searchsorted(grains, places + size, side="left") > before
    return over
