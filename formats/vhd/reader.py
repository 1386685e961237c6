"""Reading VHD: fixed, dynamic and differencing disks.

The block table is never held whole: it is read in batches where it is asked for, and with it the sector bitmaps of the
blocks that are there.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, EXTENT, HOLE, clip, cut, from_units, plain_runs
from diskmorph.formats.vhd.footer import Footers, disk_size, read_footers
from diskmorph.formats.vhd.parent import parent_of
from diskmorph.formats.vhd.schema import (
    DIFFERENCING,
    ENTRY,
    FIXED,
    FOOTER_SIZE,
    HEADER,
    HEADER_CHECKSUM_AT,
    HEADER_COOKIE,
    HEADER_SIZE,
    MOST_BYTES,
    SECTOR,
    TYPE_NAMES,
    UNALLOCATED,
    VERSION,
    bitmap_size,
    checksum,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from diskmorph.formats.disk import ParentRef
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

_BATCH_SECTORS = 1 << 21  # sectors whose bitmap bits are looked at together: 2 MiB as bytes
_BATCH_ENTRIES = 1 << 15  # entries of the table read at once: 128 KiB
_LEAST_BLOCK, _MOST_BLOCK = 8 * SECTOR, 1 << 31


class VhdDisk(ImageDisk):
    """What all three kinds have in common."""

    format = "vhd"

    def __init__(self, source: ByteSource, footers: Footers, parent: ParentRef | None, block_size: int | None) -> None:
        fields = footers.fields
        self.footers = footers
        self.size = disk_size(fields)
        self.files = (source,)
        self.name = source.name
        self.identity = {"uuid": str(fields.uuid), "timestamp": str(fields.timestamp)}
        self.info = ImageInfo(
            "vhd",
            TYPE_NAMES[fields.type],
            self.size,
            self.sector_size,
            block_size,
            features=_features(fields),
            parent=parent,
            warnings=footers.warnings,
        )


def _features(fields: Any) -> Mapping[str, Any]:
    return {
        "creator": fields.creator.decode("latin-1").rstrip("\0 "),
        "current_size": fields.current_size,
        "geometry": f"{fields.cylinders}/{fields.heads}/{fields.sectors}",
        "uuid": str(fields.uuid),
    }


class FixedDisk(VhdDisk):
    """The disk's bytes, a footer behind them."""

    def __init__(self, source: ByteSource, footers: Footers) -> None:
        super().__init__(source, footers, None, None)
        if self.size > footers.data_end:
            raise FormatError(
                "the image is truncated: the footer tells of more data than there is",
                structure="footer",
                field="current_size",
                offset=footers.data_end + 48,
                expected=f"at most {footers.data_end} bytes",
                found=self.size,
            )

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        return plain_runs(self.files[0].runs(start, stop))


class DynamicDisk(VhdDisk):
    """Blocks with a bitmap of sectors each.

    A sector whose bit is 0 was never written: it is the parent's (ABSENT) in a differencing disk, else a hole.
    """

    def __init__(self, source: ByteSource, footers: Footers, header: Any, parent: ParentRef | None) -> None:
        super().__init__(source, footers, parent, header.block_size)
        self.header = header
        self.block_size: int = header.block_size
        self.bitmap_size = bitmap_size(self.block_size)
        self._free = HOLE if parent is None else ABSENT

    def entries(self, first: int, stop: int) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """Yield (number of the first block, table entries) for blocks first..stop, in batches."""
        for at in range(first, stop, _BATCH_ENTRIES):
            count = min(_BATCH_ENTRIES, stop - at)
            raw = self.files[0].read(self.header.table_offset + at * ENTRY.itemsize, count * ENTRY.itemsize)
            yield at, np.frombuffer(raw, ENTRY).astype(np.uint32)

    def _batches(self, first: int, stop: int) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """Yield what `entries` does in batches of so few stored blocks that all their bits can be looked at."""
        most = max(_BATCH_SECTORS // (self.block_size // SECTOR), 1)
        for at, entries in self.entries(first, stop):
            bounds = [0, *np.flatnonzero(entries != UNALLOCATED)[most::most].tolist(), len(entries)]
            for low, high in itertools.pairwise(bounds):
                yield at + low, entries[low:high]

    def ends(self, blocks: NDArray[np.uint64], places: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return where blocks (by number, and offset of their bitmap) end in the file, as far as the disk needs them.

        The last block of a disk is often partial.
        """
        needed = np.minimum(self._left(blocks), np.uint64(self.block_size))
        ends: NDArray[np.uint64] = places + np.uint64(self.bitmap_size) + needed
        return ends

    def misplaced(self, blocks: NDArray[np.uint64], places: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return which blocks (by number, and offset of their bitmap) pass the end of the data or cover a table."""
        ends = self.ends(blocks, places)
        wrong = ends > np.uint64(self.footers.data_end)
        for low, high in self.tables():
            wrong |= (places < np.uint64(high)) & (ends > np.uint64(low))
        bad: NDArray[np.bool_] = wrong
        return bad

    def tables(self) -> tuple[tuple[int, int], ...]:
        """Return (begin, end) of the footer's copy, the dynamic header and the block table."""
        header_at, table_at = self.footers.fields.data_offset, self.header.table_offset
        return (
            (0, FOOTER_SIZE),
            (header_at, header_at + HEADER_SIZE),
            (table_at, table_at + self.header.entries * ENTRY.itemsize),
        )

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        first, last = start // self.block_size, -(-stop // self.block_size)
        for at, entries in self._batches(first, last):
            yield clip(self._rows(at, entries), start, stop)

    def _rows(self, first: int, entries: NDArray[np.uint32]) -> NDArray[np.void]:
        """Return the extents of consecutive blocks, the first being number `first`."""
        used = np.flatnonzero(entries != UNALLOCATED)
        places = entries[used].astype(np.uint64) * np.uint64(SECTOR)
        blocks = used.astype(np.uint64) + np.uint64(first)
        self._require_placed(blocks, places)
        bitmaps = self._bitmaps(places)
        full = (bitmaps == 0xFF).all(axis=1)
        kinds = np.full(len(entries), self._free, np.uint8)
        offsets = np.zeros(len(entries), np.uint64)
        kinds[used[full]] = DATA
        offsets[used] = places + np.uint64(self.bitmap_size)
        rows = from_units(first, self.block_size, kinds, offsets, self.size)
        partial = ~full & bitmaps.any(axis=1)
        if not partial.any():
            return rows
        return self._insert(rows, self._sectors(blocks[partial], offsets[used][partial], bitmaps[partial]))

    def unmarked_sectors(self) -> Iterator[int]:
        """Yield, batch by batch, how many sectors of stored blocks have a bit that says they were never written."""
        for first, entries in self._batches(0, -(-self.size // self.block_size)):
            used = np.flatnonzero(entries != UNALLOCATED)
            stored = int(
                np.minimum(np.uint64(self.block_size), self._left(used.astype(np.uint64) + np.uint64(first))).sum()
            )
            rows = self._rows(first, entries)
            yield (stored - int(rows["length"][rows["kind"] == DATA].sum())) // SECTOR

    def _left(self, blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the bytes from the beginning of each block to the disk's end."""
        starts = np.minimum(blocks * np.uint64(self.block_size), np.uint64(self.size))
        left: NDArray[np.uint64] = np.uint64(self.size) - starts
        return left

    def _require_placed(self, blocks: NDArray[np.uint64], places: NDArray[np.uint64]) -> None:
        wrong = np.flatnonzero(self.misplaced(blocks, places))
        if not len(wrong):
            return
        block, place = int(blocks[wrong[0]]), int(places[wrong[0]])
        raise FormatError(
            f"block {block} lies beyond the end of the file or over a table: the image is truncated or damaged",
            file=self.name,
            format="vhd",
            structure="block table",
            field=f"entry {block}",
            offset=self.header.table_offset + block * ENTRY.itemsize,
            expected=f"{self.bitmap_size + self.block_size} bytes before {self.footers.data_end}",
            found=f"offset {place}",
        )

    def _bitmaps(self, places: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Return the bitmaps at these offsets, a row each, without their padding."""
        length = self.block_size // SECTOR // 8
        found = np.empty((len(places), length), np.uint8)
        for place, bitmap in zip(places.tolist(), found, strict=True):
            self.files[0].read_into(place, bitmap.data)
        return found

    def _sectors(
        self, blocks: NDArray[np.uint64], offsets: NDArray[np.uint64], bitmaps: NDArray[np.uint8]
    ) -> NDArray[np.void]:
        """Return the runs of sectors whose bit is set (most significant first), as DATA rows."""
        edges = np.diff(np.unpackbits(bitmaps, axis=1).view(np.int8), axis=1, prepend=0, append=0)
        index, begins = np.nonzero(edges == 1)
        ends = np.nonzero(edges == -1)[1]
        rows = np.zeros(len(index), EXTENT)
        within = begins.astype(np.uint64) * np.uint64(SECTOR)
        rows["start"] = blocks[index] * np.uint64(self.block_size) + within
        rows["length"] = (ends - begins).astype(np.uint64) * np.uint64(SECTOR)
        rows["offset"] = offsets[index] + within
        rows["kind"] = DATA
        return clip(rows, 0, self.size)

    def _insert(self, rows: NDArray[np.void], data: NDArray[np.void]) -> NDArray[np.void]:
        """Return gapless rows with those of `data` in place of what was there."""
        out = cut(rows, np.union1d(data["start"], data["start"] + data["length"]))
        at = np.searchsorted(out["start"], data["start"])
        out["kind"][at] = DATA
        out["offset"][at] = data["offset"]
        return out


def open_image(source: ByteSource, context: OpenContext) -> VhdDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(f"VHD has no internal snapshot {context.snapshot!r}", feature="snapshots")
    footers = read_footers(source)
    if footers.fields.type == FIXED:
        return FixedDisk(source, footers)
    header = _read_header(source, footers.fields.data_offset)
    _require_sane(header, footers.fields, source)
    parent = None
    if footers.fields.type == DIFFERENCING:
        parent = parent_of(header, footers.fields.data_offset, source)
    return DynamicDisk(source, footers, header, parent)


def _read_header(source: ByteSource, offset: int) -> Any:
    if offset + HEADER_SIZE > source.size:
        raise FormatError(
            "the dynamic header lies beyond the end of the file",
            structure="footer",
            field="data_offset",
            offset=16,
            expected=f"at most {max(source.size - HEADER_SIZE, 0)}",
            found=offset,
        )
    raw = source.read(offset, HEADER_SIZE)
    header = HEADER.parse(raw)
    if header.cookie != HEADER_COOKIE:
        raise _wrong("cookie", offset, HEADER_COOKIE.decode(), header.cookie)
    if header.checksum != checksum(raw, HEADER_CHECKSUM_AT):
        expected = f"{checksum(raw, HEADER_CHECKSUM_AT):#x}"
        raise _wrong("checksum", offset + HEADER_CHECKSUM_AT, expected, f"{header.checksum:#x}")
    if header.version >> 16 != VERSION >> 16:
        version = f"dynamic header version {header.version:#x}"
        raise UnsupportedError(f"VHD {version} is not known", feature=version, offset=offset + 24)
    return header


def _require_sane(header: Any, fields: Any, source: ByteSource) -> None:
    """Hold sizes and offsets against each other and the file before anything is allocated."""
    at, size, block = fields.data_offset, disk_size(fields), header.block_size
    if not _LEAST_BLOCK <= block <= _MOST_BLOCK or block & (block - 1):
        raise _wrong("block_size", at + 32, f"a power of two from {_LEAST_BLOCK} to {_MOST_BLOCK}", block)
    if size > MOST_BYTES:
        raise FormatError(
            "the disk is larger than a dynamic VHD can be",
            structure="footer",
            field="current_size",
            expected=f"at most {MOST_BYTES} (2040 GiB)",
            found=size,
        )
    if header.entries * block < size:
        raise _wrong("max_table_entries", at + 28, f"at least {-(-size // block)} for the disk's size", header.entries)
    if header.table_offset + header.entries * ENTRY.itemsize > source.size:
        raise FormatError(
            "the block table lies beyond the end of the file",
            structure="block table",
            offset=header.table_offset,
            expected=f"{header.entries * ENTRY.itemsize} bytes",
            found=f"the end at {source.size}",
        )


def _wrong(field: str, offset: int, expected: object, found: object) -> FormatError:
    return FormatError(
        f"the dynamic header is damaged: wrong {field}",
        structure="dynamic header",
        field=field,
        offset=offset,
        expected=expected,
        found=found,
    )
