"""Checking the two copies of a hosted extent's directory and tables; mending one by the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.check import Patch
from diskmorph.formats.errors import FormatError
from diskmorph.formats.vmdk import hosted
from diskmorph.formats.vmdk.check_grains import GrainCheck, Ranges
from diskmorph.formats.vmdk.extent import load_tables
from diskmorph.formats.vmdk.schema import ENTRY, FLAG_REDUNDANT, SECTOR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.vmdk.hosted import HostedExtent

_MOST_DIFFERENCES = 1 << 16
_LISTED = 50
_GD_FIELD, _RGD_FIELD = 56, 48  # byte offsets of SparseHeader.gd_offset and rgd_offset


class RedundantCheck:
    """Compares primary and redundant; with `repair` proposes patches of whichever is damaged."""

    def __init__(self, report: CheckReport, extent: HostedExtent, name: str, *, repair: bool) -> None:
        self._report, self._extent, self._name, self._repair = report, extent, name, repair
        self._primary: NDArray[np.uint64] | None = None
        self._redundant: NDArray[np.uint64] | None = None
        self._different: list[tuple[int, int, int]] = []  # entry number, primary's and redundant's sector
        self._count = 0

    @property
    def _has_redundant(self) -> bool:
        return bool(self._extent.header.flags & FLAG_REDUNDANT) and self._extent.header.rgd_offset != 0

    def directories(self) -> None:
        """Check both directories; propose to restore the one that is damaged."""
        header = self._extent.header
        self._primary = self._load(header.gd_offset, "grain directory")
        if not self._has_redundant:
            return
        self._redundant = self._load(header.rgd_offset, "redundant grain directory")
        if self._primary is not None and self._redundant is not None:
            self._compare_gaps()
        if self._primary is None and self._redundant is not None:
            self._restore(header.gd_offset, _GD_FIELD, self._redundant, header.rgd_offset, "grain directory")
        elif self._redundant is None and self._primary is not None:
            self._restore(header.rgd_offset, _RGD_FIELD, self._primary, header.gd_offset, "redundant grain directory")

    def _load(self, sector: int, structure: str) -> NDArray[np.uint64] | None:
        try:
            return hosted.directory(self._extent.source, self._extent.header, sector, structure)
        except FormatError as error:
            self._report.add(structure, error.offset, f"{self._name}{error.problem} ({error.place()})")
            return None

    def _compare_gaps(self) -> None:
        primary, redundant = self._primary, self._redundant
        if primary is None or redundant is None:
            return
        header = self._extent.header
        for mine, other, sector, structure in (
            (primary, redundant, header.gd_offset, "grain directory"),
            (redundant, primary, header.rgd_offset, "redundant grain directory"),
        ):
            gaps = np.flatnonzero((mine == 0) & (other != 0))
            if not len(gaps):
                continue
            at = sector * SECTOR + int(gaps[0]) * ENTRY.itemsize
            text = f"{self._name}lacks {len(gaps)} grain tables that the other has, the first of entry {int(gaps[0])}"
            self._report.add(structure, at, text, count=len(gaps))
            if structure == "grain directory":
                self._primary = None
            else:
                self._redundant = None

    def _restore(self, sector: int, field: int, good: NDArray[np.uint64], other: int, structure: str) -> None:
        """Propose the entries of a damaged directory: its own tables where they still lie as they were laid out."""
        if not self._repair:
            return
        extent, count = self._extent, len(good)
        size = count * ENTRY.itemsize
        if sector == 0 or sector * SECTOR + size > extent.source.size:
            why = f"point to the other {structure}, whose place in the file is damaged"
            self._report.patches.append(Patch(field, other.to_bytes(8, "little"), why))
            return
        first = (sector + -(-size // SECTOR)) * SECTOR
        own = np.uint64(first) + np.arange(count, dtype=np.uint64) * np.uint64(extent.table_bytes)
        own = np.where(good == 0, np.uint64(0), own)
        entries = (own if self._same_tables(own, good) else good) // np.uint64(SECTOR)
        why = f"restore the {structure} from its other copy"
        self._report.patches.append(Patch(sector * SECTOR, entries.astype(ENTRY).tobytes(), why))

    def _same_tables(self, own: NDArray[np.uint64], good: NDArray[np.uint64]) -> bool:
        extent = self._extent
        if int(own.max(initial=0)) + extent.table_bytes > extent.source.size or np.isin(own[own != 0], good).any():
            return False
        for low in range(0, len(good), 256):
            part = slice(low, low + 256)
            ours, theirs = (load_tables(extent.source, tables[part], extent.entries, ENTRY) for tables in (own, good))
            if not np.array_equal(ours, theirs):
                return False
        return True

    def metadata(self) -> Ranges:
        """Return the byte ranges of header, descriptor, directories and tables."""
        extent, header = self._extent, self._extent.header
        directory = len(extent.tables) * ENTRY.itemsize
        starts = [0, header.descriptor_offset * SECTOR, header.gd_offset * SECTOR]
        sizes = [SECTOR, header.descriptor_size * SECTOR, directory]
        if self._has_redundant:
            starts.append(header.rgd_offset * SECTOR)
            sizes.append(directory)
        known = [
            tables[tables != 0] for tables in (self._primary, self._redundant, extent.tables) if tables is not None
        ]
        tables = np.unique(np.concatenate(known))
        room = np.full(len(tables), extent.table_bytes, np.uint64)
        pairs = [(start, size) for start, size in zip(starts, sizes, strict=True) if size and start < 1 << 62]
        return Ranges(
            np.concatenate((np.array([start for start, _ in pairs], np.uint64), tables)),
            np.concatenate((np.array([size for _, size in pairs], np.uint64), room)),
        )

    def compare(self, first: int, last: int, entries: NDArray[Any]) -> None:
        """Note entries in which the two copies of tables first..last differ; `entries` are those that are read."""
        if self._primary is None or self._redundant is None:
            return
        extent = self._extent
        other = load_tables(extent.source, self._redundant[first:last], extent.entries, ENTRY)
        missing = np.repeat(self._redundant[first:last] == 0, extent.entries)
        differ = np.flatnonzero((entries != other) & ~missing)
        self._count += len(differ)
        for index in differ[: max(0, _MOST_DIFFERENCES - len(self._different))].tolist():
            self._different.append((first * extent.entries + index, int(entries[index]), int(other[index])))

    def conclude(self, grains: GrainCheck) -> None:
        """Tell of the differences, and decide for each which copy is right."""
        twice = set(grains.twice().tolist())
        for listed, (number, mine, other) in enumerate(self._different):
            if listed < _LISTED:
                at = self._entry_at(self._primary, number)
                text = f"the entry of grain {number} is {mine}, in the redundant table {other}"
                self._report.add("grain table", at, self._name + text)
            if self._repair:
                self._mend(number, mine, other, grains, twice)
        rest = self._count - min(len(self._different), _LISTED)
        if rest:
            text = f"{self._name}{rest} more entries differ from the redundant tables"
            self._report.add("grain table", None, text, count=rest)

    def _mend(self, number: int, mine: int, other: int, grains: GrainCheck, twice: set[int]) -> None:
        place = mine * SECTOR
        wrong = mine != 0 and not self._is_zeroed(mine) and (place in twice or not self._could_be(place, grains))
        better = other == 0 or self._is_zeroed(other) or grains.free(other * SECTOR)
        take_other = (wrong and better) or (mine == 0 and other != 0 and better)
        if wrong and not better:
            return
        target, value = (self._primary, other) if take_other else (self._redundant, mine)
        at = self._entry_at(target, number)
        if at is not None:
            why = f"restore the table entry of grain {number} from the {'redundant' if take_other else 'primary'} copy"
            self._report.patches.append(Patch(at, value.to_bytes(ENTRY.itemsize, "little"), why))

    def _is_zeroed(self, sector: int) -> bool:
        return sector == 1 and self._extent.header.version >= 2

    def _could_be(self, place: int, grains: GrainCheck) -> bool:
        extent = self._extent
        if place + extent.grain > extent.source.size:
            return False
        return not grains.metadata.touched(np.array([place], np.uint64), extent.grain)[0]

    def _entry_at(self, tables: NDArray[np.uint64] | None, number: int) -> int | None:
        """Return the byte offset in the file of a grain's entry in these tables."""
        if tables is None:
            return None
        table, index = divmod(number, self._extent.entries)
        start = int(tables[table])
        return start + index * ENTRY.itemsize if start else None
