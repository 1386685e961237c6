"""Checking the two copies of a hosted extent's grain tables; mending an entry where something shows which is right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.check import CheckReport, Patch
from diskmorph.formats.vmdk.check_directories import Judgement, grains_over
from diskmorph.formats.vmdk.check_grains import GrainCheck, Ranges
from diskmorph.formats.vmdk.check_restore import Restoration
from diskmorph.formats.vmdk.directories import Directories
from diskmorph.formats.vmdk.extent import load_tables
from diskmorph.formats.vmdk.schema import ENTRY, FLAG_ZEROED_GRAIN, SECTOR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.vmdk.check_directories import Side
    from diskmorph.formats.vmdk.hosted import HostedExtent

_MOST_DIFFERENCES = 1 << 16
_LISTED = 50


class RedundantCheck:
    """Compares primary and redundant; with `repair` proposes patches of whichever is damaged."""

    def __init__(self, report: CheckReport, extent: HostedExtent, name: str, *, repair: bool) -> None:
        self._report, self._extent, self._name, self._repair = report, extent, name, repair
        self._judged = Judgement(report, extent, name)
        primary, redundant = self._judged.primary, self._judged.redundant
        self._both = primary.sound & redundant.sound & (primary.tables != redundant.tables)
        self._different: list[tuple[int, int, int]] = []  # entry number, primary's and redundant's sector
        self._blank: set[int] = set()  # tables of the primary without an entry whose other copies have some
        self._count = 0

    def restore(self) -> None:
        """Propose to restore what is damaged of the directories."""
        if self._repair:
            Restoration(self._report, self._extent, self._name, self._judged).run()

    def metadata(self) -> Ranges:
        """Return the byte ranges of header, descriptor, directories and tables."""
        extent, header = self._extent, self._extent.header
        directory = len(extent.tables) * ENTRY.itemsize
        start, size, floor = header.descriptor_offset * SECTOR, header.descriptor_size * SECTOR, self._judged.floor
        if floor > SECTOR:  # a size that is damaged must not make metadata of grains
            size = min(size, max(floor - start, 0))
        pairs = [(0, floor), (start, size)]
        for side, other in self._judged.pairs:
            # Where none of its tables is right, the directory may be somewhere else.
            if side.readable and (side.sound.any() or not other.sound.any()):
                pairs.append((side.directory.sector * SECTOR, directory))
        pairs = [(start, size) for start, size in pairs if size and start < 1 << 62]
        tables = np.unique(np.concatenate([side.tables[side.sound] for side, _ in self._judged.pairs]))
        room = np.full(len(tables), extent.table_bytes, np.uint64)
        return Ranges(
            np.concatenate((np.array([start for start, _ in pairs], np.uint64), tables)),
            np.concatenate((np.array([size for _, size in pairs], np.uint64), room)),
        )

    def compare(self, first: int, last: int, entries: NDArray[Any]) -> None:
        """Note entries in which the two copies of tables first..last differ; `entries` are those that are read."""
        both = self._both[first:last]
        if not both.any():
            return
        extent = self._extent
        tables = np.where(both, self._judged.redundant.tables[first:last], np.uint64(0))
        other = load_tables(extent.source, tables, extent.entries, ENTRY)
        differ = np.flatnonzero((entries != other) & np.repeat(both, extent.entries))
        self._count += len(differ)
        listed = differ[: max(0, _MOST_DIFFERENCES - len(self._different))]
        for index in listed.tolist():
            self._different.append((first * extent.entries + index, int(entries[index]), int(other[index])))
        for table in np.unique(listed // extent.entries).tolist():
            if not entries[table * extent.entries : (table + 1) * extent.entries].any():
                self._blank.add(first + table)

    def conclude(self, grains: GrainCheck) -> None:
        """Tell of the differences; with `repair` propose those entries of which something shows which is right."""
        for number, mine, other in self._different[:_LISTED]:
            text = f"the entry of grain {number} is {mine}, in the redundant table {other}"
            self._report.add("grain table", self._entry_at(self._judged.primary, number), self._name + text)
        rest = self._count - min(len(self._different), _LISTED)
        if rest:
            text = f"{self._name}{rest} more entries differ from the redundant tables"
            self._report.add("grain table", None, text, count=rest)
        if self._repair and self._different:
            self._mend(grains)

    def _mend(self, grains: GrainCheck) -> None:
        choice = _Choice(self._extent, grains, self._redundant_grains(grains))
        patches = []
        tables = np.zeros(len(self._both), np.bool_)
        tables[[number // self._extent.entries for number, _, _ in self._different]] = True
        tables, orphans = self._judged.mendable(tables), self._judged.has_orphans
        for number, mine, other in self._different:
            if not tables[number // self._extent.entries] or (orphans and mine == 0):
                continue
            blank = number // self._extent.entries in self._blank
            if choice.takes_other(mine, other, blank=blank):
                patches.append(self._patch(self._judged.primary, number, other, "redundant"))
            elif choice.takes_mine(mine, other):
                patches.append(self._patch(self._judged.redundant, number, mine, "primary"))
        places = np.array([patch.offset for patch in patches], np.uint64)
        over = np.zeros(len(places), np.bool_)
        for side, _ in self._judged.pairs:
            over |= grains_over(self._extent, side.relied, places, ENTRY.itemsize, self._judged.floor)
        self._report.patches.extend(patch for patch, bad in zip(patches, over.tolist(), strict=True) if not bad)

    def _redundant_grains(self, grains: GrainCheck) -> GrainCheck:
        """Return what is known of the grains by the redundant tables, by the primary's where those are not sound."""
        extent, primary, redundant = self._extent, self._judged.primary, self._judged.redundant
        tables = np.where(redundant.sound, redundant.tables, primary.relied)
        view = type(extent)(extent.source, extent.header, Directories(tables), extent.size)
        found = GrainCheck(CheckReport("vmdk"), view, self._name, grains.metadata)
        found.run()
        return found

    def _entry_at(self, side: Side, number: int) -> int:
        """Return the byte offset in the file of a grain's entry in a side's tables."""
        table, index = divmod(number, self._extent.entries)
        return int(side.tables[table]) + index * ENTRY.itemsize

    def _patch(self, side: Side, number: int, value: int, source: str) -> Patch:
        why = f"restore the table entry of grain {number} from the {source} copy"
        return Patch(self._entry_at(side, number), value.to_bytes(ENTRY.itemsize, "little"), why)


class _Choice:
    """Says which of two entries is right; neither, where nothing shows it.

    A wrong entry names a place that no grain can have, or one that by the same copy another grain has too; the other
    copy must know an owner of it, or it could be either of the two.
    """

    def __init__(self, extent: HostedExtent, primary: GrainCheck, redundant: GrainCheck) -> None:
        self._zeroed = bool(extent.header.flags & FLAG_ZEROED_GRAIN)
        self._primary, self._redundant = primary, redundant
        self._twice = set(primary.twice().tolist()), set(redundant.twice().tolist())

    def takes_other(self, mine: int, other: int, *, blank: bool) -> bool:
        """Whether the primary's entry must become the redundant one; `blank`: its whole table has no entry."""
        place, instead = mine * SECTOR, other * SECTOR
        impossible = self._is_grain(mine) and not self._primary.possible(place)
        if not self._is_grain(other):
            # What can be read now stays as it is.
            return impossible or (blank and mine == 0)
        if instead in self._twice[1] or not self._primary.free(instead):
            return False
        twice = self._is_grain(mine) and place in self._twice[0] and not self._redundant.free(place)
        return mine == 0 or impossible or twice

    def takes_mine(self, mine: int, other: int) -> bool:
        """Whether the redundant entry must become the primary's, if the primary's stays."""
        place, instead = mine * SECTOR, other * SECTOR
        if self._is_grain(mine) and (place in self._twice[0] or not self._redundant.free(place)):
            return False
        if not self._is_grain(other):
            return other == 0
        twice = instead in self._twice[1] and not self._primary.free(instead)
        return twice or not self._redundant.possible(instead)

    def _is_grain(self, entry: int) -> bool:
        return entry != 0 and not (self._zeroed and entry == 1)
