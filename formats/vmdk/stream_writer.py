"""New streamOptimized VMDKs, written from front to back (VDF "Stream-Optimized Compressed Sparse Extents").

Header, descriptor, then compressed grains behind their markers with each table behind its grains, the directory, the
footer and the end-of-stream marker, where the file ends: readers that check a digest take no byte more.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.allocator import PLACED, Allocator, Write
from diskmorph.formats.errors import TargetError
from diskmorph.formats.extents import DATA, ZLIB
from diskmorph.formats.vmdk import schema
from diskmorph.formats.vmdk.schema import DIRECTORY_AT_END, ENTRY, SECTOR, SparseHeader
from diskmorph.formats.vmdk.sparse_writer import (
    DESCRIPTOR_OFFSET,
    GRAIN,
    GRAIN_SECTORS,
    MOST_SECTORS,
    TABLE_ENTRIES,
    TABLE_SECTORS,
    descriptor_sectors,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.source import Buffer
    from diskmorph.formats.vmdk.settings import Settings

_PLACE = np.dtype([("grain", "<u4"), ("sector", "<u4")])
_PIPE_NAME = "disk.vmdk"


class StreamAllocator(Allocator):
    """Every grain of 64 KiB that is not zero, compressed; zeroes and holes are left out."""

    unit = grain = GRAIN
    codecs = frozenset({ZLIB})
    codec = ZLIB
    sequential = True

    def __init__(self, settings: Settings) -> None:
        self.size = settings.size
        self.level = settings.image.level
        self.members = (settings.image.name,)
        name = settings.image.name if settings.image.name not in {"", "-"} else _PIPE_NAME
        self._name = name
        self._descriptor = settings.descriptor((f'RW {self.size // SECTOR} SPARSE "{name}"',))
        embedded = descriptor_sectors(self._descriptor)
        overhead = -(-(DESCRIPTOR_OFFSET + embedded) // GRAIN_SECTORS) * GRAIN_SECTORS
        self._header = SparseHeader(
            version=3,
            flags=schema.FLAG_NEWLINES | schema.FLAG_COMPRESSED | schema.FLAG_MARKERS,
            capacity=self.size // SECTOR,
            grain_size=GRAIN_SECTORS,
            descriptor_offset=DESCRIPTOR_OFFSET,
            descriptor_size=embedded,
            table_entries=TABLE_ENTRIES,
            rgd_offset=0,
            gd_offset=DIRECTORY_AT_END,
            overhead=overhead,
            unclean=0,
            newlines=schema.NEWLINES,
            compression=schema.COMPRESSION_DEFLATE,
        )
        self._next = overhead
        self._directory = np.zeros(-(-self.size // (GRAIN * TABLE_ENTRIES)), ENTRY)
        self._places: list[NDArray[np.void]] = []

    def begin(self) -> Iterator[Write]:
        """See Allocator: header and descriptor, which nothing can change later."""
        yield Write(0, 0, schema.SPARSE_HEADER.build(self._header))
        yield Write(0, DESCRIPTOR_OFFSET * SECTOR, self._descriptor)

    def frame(self, start: int, payload: Buffer) -> Buffer:
        """See Allocator: the payload behind its grain marker, up to a whole sector."""
        size = len(payload)
        marker = schema.GRAIN_MARKER_STRUCT.build(schema.GrainMarker(lba=start // SECTOR, size=size))
        return b"".join((marker, payload, bytes(-(len(marker) + size) % SECTOR)))

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator: DATA runs are one compressed grain each, `size` the framed bytes."""
        runs = runs[runs["kind"] == DATA]
        placed = np.zeros(len(runs), PLACED)
        if not len(runs):
            return placed
        taken = -(-runs["size"].astype(np.int64) // SECTOR)
        sectors = self._next + np.cumsum(taken) - taken
        self._advance(int(taken.sum()))
        noted = np.zeros(len(runs), _PLACE)
        noted["grain"] = runs["start"] // np.uint64(GRAIN)
        noted["sector"] = sectors
        self._places.append(noted)
        placed["start"], placed["length"] = runs["start"], runs["length"]
        placed["offset"] = sectors.astype(np.uint64) * np.uint64(SECTOR)
        placed["kind"], placed["codec"] = DATA, ZLIB
        return placed

    def _advance(self, sectors: int) -> int:
        """Return the next free sector and take `sectors` from it."""
        at = self._next
        self._next += sectors
        if self._next > MOST_SECTORS:
            raise TargetError(
                "a streamOptimized VMDK cannot be larger than 2 TiB",
                file=self._name,
                hint="use -o subformat=twoGbMaxExtentSparse",
            )
        return at

    def settle(self, upto: int) -> Iterator[Write]:
        """See Allocator: the tables of which every grain is written."""
        return self._settle(upto // (GRAIN * TABLE_ENTRIES))

    def _settle(self, last: int) -> Iterator[Write]:
        if not self._places:
            return
        places = np.concatenate(self._places)
        done = int(np.searchsorted(places["grain"], last * TABLE_ENTRIES))
        self._places = [places[done:]] if done < len(places) else []
        places = places[:done]
        numbers = places["grain"] // TABLE_ENTRIES
        heads = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), done]
        for low, high in pairwise(heads if done else []):
            table = np.zeros(TABLE_ENTRIES, ENTRY)
            table[places["grain"][low:high] % TABLE_ENTRIES] = places["sector"][low:high]
            at = self._advance(1 + TABLE_SECTORS)
            self._directory[int(numbers[low])] = at + 1
            yield Write(0, at * SECTOR, _marker(TABLE_SECTORS, schema.GRAIN_TABLE) + table.tobytes())

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        yield from self._settle(len(self._directory))
        directory = self._directory.tobytes()
        sectors = max(1, -(-len(directory) // SECTOR))
        at = self._advance(1 + sectors + 3)
        footer = schema.SPARSE_HEADER.build(replace(self._header, gd_offset=at + 1))
        yield Write(
            0,
            at * SECTOR,
            _marker(sectors, schema.GRAIN_DIRECTORY)
            + directory.ljust(sectors * SECTOR, b"\0")
            + _marker(1, schema.FOOTER)
            + footer
            + _marker(0, schema.END_OF_STREAM),
        )

    def sizes(self) -> Sequence[int]:
        """See Allocator."""
        return (self._next * SECTOR,)


def _marker(sectors: int, kind: int) -> bytes:
    built: bytes = schema.MARKER.build(schema.Marker(sectors=sectors, size=0, type=kind))
    return built
