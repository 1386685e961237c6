"""Restoring a damaged grain directory by the other one, without a change of what the disk reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.check import WARNING, Patch
from diskmorph.formats.errors import FormatError
from diskmorph.formats.vmdk import directories
from diskmorph.formats.vmdk.check_directories import grains_over, ranges_of
from diskmorph.formats.vmdk.extent import load_tables
from diskmorph.formats.vmdk.schema import ENTRY, FLAG_ZEROED_GRAIN, SECTOR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.vmdk.check_directories import Judgement, Side
    from diskmorph.formats.vmdk.hosted import HostedExtent


class Restoration:
    """Proposes the entries of a directory that are missing or wrong.

    An entry is set to where the layout puts its table, if that table says what the sound copy says, or nothing where
    that says something; a redundant table may differ in some. Else the primary is set to the redundant table, which is
    what is read already; the redundant directory is left as it is, for a shared table is no second copy. Nothing is
    written over grains or other metadata.
    """

    def __init__(self, report: CheckReport, extent: HostedExtent, name: str, judged: Judgement) -> None:
        self._report, self._extent, self._name, self._judged = report, extent, name, judged
        sides = [side for side, _ in judged.pairs if side.readable]
        tables = np.concatenate([side.tables[side.sound] for side in sides]) if sides else np.zeros(0, np.uint64)
        self._tables = ranges_of(tables, extent.table_bytes, [])
        self._metadata = ranges_of(tables, extent.table_bytes, sides)

    def run(self) -> None:
        """Propose what mends both directories."""
        if not self._judged.redundancy:
            return
        for one, other in self._judged.pairs:
            need = ((one.tables == 0) | one.wrong) & other.sound
            if other.readable and (need.any() or not one.readable):
                self._restore(one, other, need)

    def _restore(self, one: Side, other: Side, need: NDArray[np.bool_]) -> None:
        if one.sound.any():
            self._entries(one, other, need)
            return
        # Not one entry is right: it may be the directory's place in the header that is damaged.
        place = self._place(one)
        if place != one.directory.sector and self._is_directory(place, one, other):
            text = f"point to the {one.structure} where the layout puts it"
            self._report.patches.append(Patch(one.field, place.to_bytes(8, "little"), text))
        elif one.readable and place == one.directory.sector:
            self._entries(one, other, need)
        elif not one.readable and one is self._judged.primary:
            text = f"point to the other {one.structure}, whose place in the file is damaged"
            self._report.patches.append(Patch(one.field, other.directory.sector.to_bytes(8, "little"), text))

    def _place(self, one: Side) -> int:
        """Return the sector where the layout puts the directory: the redundant one and its tables come first."""
        header = self._extent.header
        room = directories.directory_sectors(header)
        room += len(one.tables) * directories.table_sectors(header)
        return header.rgd_offset + room if one is self._judged.primary else header.gd_offset - room

    def _is_directory(self, place: int, one: Side, other: Side) -> bool:
        """Whether at sector `place` there is a directory of tables that follow the layout and equal the other's."""
        extent = self._extent
        try:
            found = directories.load(extent.source, extent.header, max(place, 0), one.structure)
        except FormatError:
            return False
        if found.bad.any() or not found.settled.all() or not other.sound.all():
            return False
        every = np.ones(len(found.tables), np.bool_)
        return not directories.differing(extent.source, extent.header, found.tables, other.tables, every).any()

    def _entries(self, one: Side, other: Side, need: NDArray[np.bool_]) -> None:
        at = np.uint64(one.directory.sector * SECTOR) + np.arange(len(need), dtype=np.uint64) * np.uint64(
            ENTRY.itemsize
        )
        need = need & ~self._tables.touched(at, ENTRY.itemsize)
        need[need] = ~self._over_grains(at[need], ENTRY.itemsize)
        homes = one.directory.homes
        open_ = need & (other.directory.settled | one.directory.settled.any())
        open_ &= homes + np.uint64(self._extent.table_bytes) <= np.uint64(self._extent.source.size)
        open_ &= ~self._metadata.touched(homes, self._extent.table_bytes)
        open_[open_] = ~self._over_grains(homes[open_], self._extent.table_bytes)
        right = self._tables_at_home(one, other, open_)
        entries = np.where(right, homes, one.tables)
        if one is self._judged.primary:
            shared = need & ~open_ & ~one.doubtful
            entries = np.where(shared, other.tables, entries)
            right |= shared
        self._propose(one, entries, right)
        unsettled = int((open_ & ~right).sum())
        if unsettled:
            text = f"{self._name}{unsettled} tables have two copies that differ: nothing shows which is right"
            self._report.add(one.structure, None, text, WARNING)

    def _over_grains(self, starts: NDArray[np.uint64], size: int) -> NDArray[np.bool_]:
        over = np.zeros(len(starts), np.bool_)
        for side, _ in self._judged.pairs:
            over |= grains_over(self._extent, side.relied, starts, size, self._judged.floor)
        return over

    def _tables_at_home(self, one: Side, other: Side, among: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which tables may be taken where the layout puts them; propose their content where it was lost."""
        extent, homes, right = self._extent, one.directory.homes, np.zeros(len(among), np.bool_)
        where = np.flatnonzero(among)
        for low in range(0, len(where), directories.BATCH_TABLES):
            part = where[low : low + directories.BATCH_TABLES]
            ours, theirs = (
                load_tables(extent.source, tables[part], extent.entries, ENTRY).reshape(-1, extent.entries)
                for tables in (homes, other.tables)
            )
            nothing = self._says_nothing(ours)
            apart = (ours != theirs) & ((theirs == 0) | ~self._says_nothing(theirs))
            lost = ~(apart & ~nothing).any(axis=1)
            copies = np.zeros(len(part), np.bool_)
            if one is not self._judged.primary:
                # It is not what is read: it may differ, and then is compared entry by entry.
                copies = ((ours == theirs) & ~nothing).any(axis=1)
            right[part] = lost | copies
            for row in np.flatnonzero(lost & ~copies & apart.any(axis=1)).tolist():
                why = f"restore grain table {int(part[row])} of the {one.structure} from its other copy"
                table = np.where(apart[row], theirs[row], ours[row])
                self._report.patches.append(Patch(int(homes[part[row]]), table.tobytes(), why))
        return right

    def _says_nothing(self, entries: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Return which entries name no grain, or one that cannot be: over metadata or beyond the file."""
        extent = self._extent
        places = entries.astype(np.uint64) * np.uint64(SECTOR)
        low = places < np.uint64(self._judged.floor)
        if extent.header.flags & FLAG_ZEROED_GRAIN:
            low &= entries != 1
        nothing: NDArray[np.bool_] = low | (places >= np.uint64(extent.source.size))
        return nothing

    def _propose(self, one: Side, entries: NDArray[np.uint64], which: NDArray[np.bool_]) -> None:
        """Propose runs of directory entries."""
        numbers = np.flatnonzero(which)
        words = (entries // np.uint64(SECTOR)).astype(ENTRY)
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
            if len(run):
                at = one.directory.sector * SECTOR + int(run[0]) * ENTRY.itemsize
                why = f"restore {len(run)} entries of the {one.structure} from its other copy"
                self._report.patches.append(Patch(at, words[run].tobytes(), why))
