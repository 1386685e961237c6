"""New sparse VMDKs: monolithicSparse and twoGbMaxExtentSparse, alone or over a parent.

Layout of a file, in sectors (VDF "Hosted Sparse Extent Metadata"): header, descriptor (monolithic), redundant grain
directory and tables, grain directory and tables, then grains from the next multiple of 64 KiB.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.allocator import PLACED, Allocator, Write
from diskmorph.formats.errors import TargetError
from diskmorph.formats.extents import DATA, ZERO
from diskmorph.formats.vmdk.schema import (
    COMPRESSION_NONE,
    ENTRY,
    FLAG_NEWLINES,
    FLAG_REDUNDANT,
    FLAG_ZEROED_GRAIN,
    NEWLINES,
    SECTOR,
    SPARSE_HEADER,
    SparseHeader,
)
from diskmorph.formats.vmdk.settings import EXTENT_SECTORS, Settings
from diskmorph.formats.vmdk.writer import cut_runs, split_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

GRAIN_SECTORS = 128
GRAIN = GRAIN_SECTORS * SECTOR
TABLE_ENTRIES = 512
TABLE_SECTORS = TABLE_ENTRIES * ENTRY.itemsize // SECTOR
DESCRIPTOR_OFFSET, DESCRIPTOR_SECTORS = 1, 20
MOST_SECTORS = 1 << 32
_BATCH_TABLES = 512
_GAP = 8
"""Empty tables between two others that are written rather than passed over."""

# Grains `first`..`first + count` of an extent: at `sector` and after, or all of them zeroed grains (sector 1).
_PLACES = np.dtype([("first", "<u4"), ("count", "<u4"), ("sector", "<u4")])
_ZEROED = 1


class SparseAllocator(Allocator):
    """Grains of 64 KiB where something is stored, tables for all of them."""

    unit = grain = alignment = GRAIN

    def __init__(self, settings: Settings) -> None:
        self.size = settings.size
        self.overlay = settings.overlay
        self._settings = settings
        self._split = settings.subformat == "twoGbMaxExtentSparse"
        sizes = split_sizes(settings)
        if self._split:
            names = [settings.member(f"-s{number:03}") for number in range(1, len(sizes) + 1)]
            self.members = (settings.image.name, *names)
        else:
            names = [settings.image.name]
            self.members = (settings.image.name,)
        self._extent_size = EXTENT_SECTORS * SECTOR if self._split else max(settings.size, GRAIN)
        self._descriptor = settings.descriptor(
            tuple(f'RW {size // SECTOR} SPARSE "{name}"' for size, name in zip(sizes, names, strict=True))
        )
        self._settled = 0  # files before this one are settled whole
        embedded = 0 if self._split else descriptor_sectors(self._descriptor)
        self._files = [
            _SparseFile(number + int(self._split), name, size, settings, embedded)
            for number, (size, name) in enumerate(zip(sizes, names, strict=True))
        ]

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator."""
        stored = runs["kind"] == DATA
        if self.overlay or self._settings.zeroed_grain:
            stored |= runs["kind"] == ZERO
        runs = runs[stored]
        if not len(runs):
            return np.zeros(0, PLACED)
        pieces, numbers = cut_runs(runs, self._extent_size)
        heads = np.concatenate(([0], np.flatnonzero(np.diff(numbers)) + 1, [len(pieces)]))
        placed = [
            self._files[int(numbers[low])].place(pieces[low:high], int(numbers[low]) * self._extent_size)
            for low, high in pairwise(heads.tolist())
        ]
        return np.concatenate(placed)

    def settle(self, upto: int) -> Iterator[Write]:
        """See Allocator."""
        while self._settled < len(self._files):
            base = self._settled * self._extent_size
            if base >= upto:
                return
            yield from self._files[self._settled].settle(upto - base)
            if base + self._extent_size > upto:
                return
            self._settled += 1

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        for file in self._files:
            yield from file.finish()
        if self._split:
            yield Write(0, 0, self._descriptor)
            return
        yield Write(0, DESCRIPTOR_OFFSET * SECTOR, self._descriptor)
        yield self._files[0].header()

    def sizes(self) -> Sequence[int]:
        """See Allocator."""
        head = (len(self._descriptor),) if self._split else ()
        return (*head, *(file.size for file in self._files))


def descriptor_sectors(text: bytes) -> int:
    """Return how many sectors are kept for an embedded descriptor: 20, or more for a long one."""
    return max(DESCRIPTOR_SECTORS, -(-len(text) // SECTOR))


class _SparseFile:
    """One sparse extent file. Offsets in the disk are relative to the extent."""

    def __init__(self, member: int, name: str, size: int, settings: Settings, embedded: int) -> None:
        self._member, self._name = member, name
        self._capacity = size // SECTOR
        self._zeroed = settings.zeroed_grain
        self._embedded = embedded
        self._tables = -(-size // (GRAIN * TABLE_ENTRIES))
        directory = -(-self._tables * ENTRY.itemsize // SECTOR)
        room = directory + self._tables * TABLE_SECTORS
        self._redundant = DESCRIPTOR_OFFSET + embedded
        self._primary = self._redundant + room
        self._directory = directory
        self._overhead = -(-(self._primary + room) // GRAIN_SECTORS) * GRAIN_SECTORS
        self._next = self._overhead
        self._settled = 0
        self._places: list[NDArray[np.void]] = []

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._next * SECTOR

    def place(self, runs: NDArray[np.void], base: int) -> NDArray[np.void]:
        """Give DATA runs, and ZERO runs where there are no zeroed grains, their grains; note them for the tables."""
        counts = -(-runs["length"].astype(np.int64) // GRAIN)
        zeroed = (runs["kind"] == ZERO) & self._zeroed
        taken = np.where(zeroed, 0, counts) * GRAIN_SECTORS
        sectors = self._next + np.cumsum(taken) - taken
        self._next += int(taken.sum())
        if self._next > MOST_SECTORS:
            raise TargetError(
                "a sparse extent cannot hold more than 2 TiB of data and tables",
                file=self._name,
                hint="use -o subformat=twoGbMaxExtentSparse or monolithicFlat",
            )
        noted = np.zeros(len(runs), _PLACES)
        noted["first"] = (runs["start"] - np.uint64(base)) // np.uint64(GRAIN)
        noted["count"] = counts
        noted["sector"] = np.where(zeroed, _ZEROED, sectors)
        self._places.append(noted)
        kept = ~zeroed
        placed = np.zeros(int(kept.sum()), PLACED)
        placed["start"], placed["length"], placed["kind"] = (runs[name][kept] for name in ("start", "length", "kind"))
        placed["offset"] = sectors[kept].astype(np.uint64) * np.uint64(SECTOR)
        placed["member"] = self._member
        return placed

    def settle(self, upto: int) -> Iterator[Write]:
        """Yield the grain tables, redundant and primary, that describe nothing at or behind byte `upto`."""
        whole = upto >= self._capacity * SECTOR
        return self._settle(self._tables if whole else upto // (GRAIN * TABLE_ENTRIES))

    def _settle(self, last: int) -> Iterator[Write]:
        if last <= self._settled:
            return
        places = np.concatenate(self._places) if self._places else np.zeros(0, _PLACES)
        for low in range(self._settled, last, _BATCH_TABLES):
            if not len(places):
                break
            high = min(low + _BATCH_TABLES, last)
            inside = int(np.searchsorted(places["first"], high * TABLE_ENTRIES))
            tables, rest = _expand(places[:inside], low * TABLE_ENTRIES, high * TABLE_ENTRIES)
            places = np.concatenate((rest, places[inside:]))
            yield from self._write(low, tables.reshape(-1, TABLE_ENTRIES))
        self._places = [places] if len(places) else []
        self._settled = last

    def _write(self, first: int, tables: NDArray[np.uint32]) -> Iterator[Write]:
        """Yield the tables from number `first` that are not empty, near ones in one piece."""
        used = np.flatnonzero(tables.any(axis=1))
        heads = [0, *(np.flatnonzero(np.diff(used) > _GAP) + 1).tolist(), len(used)]
        for begin, end in pairwise(heads if len(used) else []):
            low, high = int(used[begin]), int(used[end - 1]) + 1
            data = tables[low:high].tobytes()
            for base in (self._redundant, self._primary):
                at = base + self._directory + (first + low) * TABLE_SECTORS
                yield Write(self._member, at * SECTOR, data)

    def finish(self) -> Iterator[Write]:
        """Yield the rest of the tables, both directories and, of a split disk, the header."""
        yield from self._settle(self._tables)
        for base in (self._redundant, self._primary):
            entries = base + self._directory + np.arange(self._tables, dtype=np.uint64) * np.uint64(TABLE_SECTORS)
            yield Write(self._member, base * SECTOR, entries.astype(ENTRY).tobytes())
        if not self._embedded:
            yield self.header()

    def header(self) -> Write:
        """Return the header."""
        flags = FLAG_NEWLINES | FLAG_REDUNDANT | (FLAG_ZEROED_GRAIN if self._zeroed else 0)
        header = SparseHeader(
            version=2 if self._zeroed else 1,
            flags=flags,
            capacity=self._capacity,
            grain_size=GRAIN_SECTORS,
            descriptor_offset=DESCRIPTOR_OFFSET if self._embedded else 0,
            descriptor_size=self._embedded,
            table_entries=TABLE_ENTRIES,
            rgd_offset=self._redundant,
            gd_offset=self._primary,
            overhead=self._overhead,
            unclean=0,
            newlines=NEWLINES,
            compression=COMPRESSION_NONE,
        )
        return Write(self._member, 0, SPARSE_HEADER.build(header))


def _expand(places: NDArray[np.void], low: int, high: int) -> tuple[NDArray[np.uint32], NDArray[np.void]]:
    """Return the entries of grains low..high, and what is left of the last place beyond `high`.

    All places begin before `high`; none ends before `low`.
    """
    entries = np.zeros(high - low, ENTRY)
    rest = places[:0]
    if not len(places):
        return entries, rest
    places = places.copy()
    beyond = int(places["first"][-1]) + int(places["count"][-1]) - high
    if beyond > 0:
        rest = places[-1:].copy()
        kept = int(places["count"][-1]) - beyond
        rest["first"], rest["count"] = high, beyond
        rest["sector"] += np.where(rest["sector"] == _ZEROED, 0, kept * GRAIN_SECTORS).astype(np.uint32)
        places["count"][-1] = kept
    counts = places["count"].astype(np.int64)
    step = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    grains = np.repeat(places["first"].astype(np.int64), counts) + step - low
    strides = np.where(places["sector"] == _ZEROED, 0, GRAIN_SECTORS)
    entries[grains] = np.repeat(places["sector"].astype(np.int64), counts) + step * np.repeat(strides, counts)
    return entries, rest
