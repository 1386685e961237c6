"""Hosted sparse extents: header, footer, directories, plain and compressed grains (VDF "Hosted Sparse Extents")."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.codecs import decode_exactly
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE, ZERO, ZLIB
from diskmorph.formats.vmdk import schema
from diskmorph.formats.vmdk.directories import Directories, tables_of
from diskmorph.formats.vmdk.extent import GrainTables
from diskmorph.formats.vmdk.schema import (
    DIRECTORY_AT_END,
    ENTRY,
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINES,
    FLAG_ZEROED_GRAIN,
    GRAIN_MARKER,
    KNOWN_FLAGS,
    MARKER_BYTES,
    NEWLINES,
    SECTOR,
    SparseHeader,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.source import Buffer, ByteSource

_MAX_GRAIN = 1 << 21
_MAX_ENTRIES = 1 << 16
_TAIL = 1 << 20
"""How many bytes of zeroes behind the footer are looked past."""


def _wrong(source: ByteSource, field: str, expected: object, found: object, problem: str) -> FormatError:
    return FormatError(
        problem,
        file=source.name,
        format="vmdk",
        structure="sparse header",
        field=field,
        offset=0,
        expected=expected,
        found=found,
    )


def parse_header(source: ByteSource, offset: int = 0) -> SparseHeader:
    """Return the header (or footer) at `offset`, its fields in bounds. Raises FormatError, UnsupportedError."""
    header = schema.SPARSE_HEADER.parse(source.read(offset, SECTOR))
    if header.version not in {1, 2, 3}:
        raise UnsupportedError(
            f"sparse header version {header.version} is not supported",
            feature=f"version {header.version}",
            file=source.name,
            format="vmdk",
            structure="sparse header",
            field="version",
        )
    unknown = header.flags & ~KNOWN_FLAGS
    if unknown:
        bits = ", ".join(str(bit) for bit in range(32) if unknown >> bit & 1)
        raise UnsupportedError(
            f"the sparse header has unknown flag bits: {bits}",
            feature=f"flag bits {bits}",
            file=source.name,
            format="vmdk",
            structure="sparse header",
            field="flags",
        )
    if header.flags & FLAG_NEWLINES and header.newlines != NEWLINES:
        raise _wrong(source, "newlines", NEWLINES, header.newlines, "was damaged by a transfer in text mode")
    _require_geometry(source, header)
    return header


def _require_geometry(source: ByteSource, header: SparseHeader) -> None:
    grain, entries = header.grain_size, header.table_entries
    if not 8 <= grain <= _MAX_GRAIN or grain & (grain - 1):
        expected = f"a power of two from 8 to {_MAX_GRAIN} sectors"
        raise _wrong(source, "grain_size", expected, grain, "the grain size is out of range")
    if not 1 <= entries <= _MAX_ENTRIES:
        raise _wrong(source, "table_entries", f"from 1 to {_MAX_ENTRIES}", entries, "the grain tables' size is wrong")
    compressed = bool(header.flags & FLAG_COMPRESSED)
    if header.compression not in {schema.COMPRESSION_NONE, schema.COMPRESSION_DEFLATE}:
        raise UnsupportedError(
            f"compression algorithm {header.compression} is not supported",
            feature=f"compression algorithm {header.compression}",
            file=source.name,
            format="vmdk",
            structure="sparse header",
            field="compression",
        )
    if compressed != (header.compression == schema.COMPRESSION_DEFLATE):
        raise _wrong(source, "compression", int(compressed), header.compression, "flags and compression contradict")


def read_header(source: ByteSource, limits: Limits) -> SparseHeader:
    """Return the header with the directory's place from the footer, if it says so, and its sizes within limits."""
    header = parse_header(source)
    if header.flags & FLAG_COMPRESSED and header.grain_size * SECTOR > limits.decoded_unit:
        most = limits.decoded_unit // SECTOR
        raise _wrong(source, "grain_size", f"at most {most}", header.grain_size, "compressed grains are too large")
    count = tables_of(header)
    if count * 16 > limits.resident_table or count * ENTRY.itemsize > source.size:
        bound = f"at most {min(limits.resident_table // 16, source.size // ENTRY.itemsize)} grain tables"
        raise _wrong(source, "capacity", bound, f"{header.capacity} sectors", "claims more than its file can describe")
    if header.gd_offset != DIRECTORY_AT_END:
        return header
    footer = parse_header(source, footer_offset(source))
    for name in ("capacity", "grain_size", "table_entries", "flags", "compression"):
        said, again = getattr(header, name), getattr(footer, name)
        if said != again:
            raise _wrong(source, name, said, again, "the footer contradicts the header")
    if footer.gd_offset == DIRECTORY_AT_END:
        raise _wrong(source, "gd_offset", "a sector", "-1", "the footer does not say where the grain directory is")
    return replace(header, gd_offset=footer.gd_offset)


def footer_offset(source: ByteSource) -> int:
    """Return the byte offset of the footer: 1024 bytes before the end, or before zeroes that follow the end marker.

    Raises FormatError where there is none: the stream was cut off.
    """
    end = source.size // SECTOR * SECTOR
    at = end - 2 * SECTOR
    if at > SECTOR and source.read(at, 4) != schema.HOSTED_MAGIC:
        low = max(SECTOR, end - _TAIL)
        tail = np.frombuffer(source.read(low, end - low), np.uint8)
        used = np.flatnonzero(tail)
        at = low + int(used[-1]) // SECTOR * SECTOR if used.size else 0
    if at > SECTOR and at + 2 * SECTOR <= source.size and source.read(at, 4) == schema.HOSTED_MAGIC:
        marker = schema.MARKER.parse(source.read(at - SECTOR, SECTOR))
        end_marker = source.read(at + SECTOR, 16)
        if (marker.sectors, marker.size, marker.type) == (1, 0, schema.FOOTER) and not any(end_marker):
            return at
    raise FormatError(
        "the image is truncated: its footer is missing",
        file=source.name,
        format="vmdk",
        structure="footer",
        offset=max(at, 0),
        expected="a footer 1024 bytes before the end",
        found=f"the end at {source.size}",
    )


class HostedExtent(GrainTables):
    """Plain grains. Entry 1 is a grain of zeroes only where the header's flag says so."""

    dtype = ENTRY

    def __init__(
        self, source: ByteSource, header: SparseHeader, found: Directories, size: int, empty: int = HOLE
    ) -> None:
        self.header = header
        self.warnings = found.warnings + (
            ("was not closed cleanly when it was last written",) if header.unclean else ()
        )
        self._zeroed = bool(header.flags & FLAG_ZEROED_GRAIN)
        super().__init__(
            source,
            size,
            grain=header.grain_size * SECTOR,
            entries=header.table_entries,
            tables=found.tables,
            empty=empty,
        )

    def resolve(self, first: int, entries: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """See GrainTables."""
        del first
        kinds = np.where(entries == 0, self.empty, DATA).astype(np.uint8)
        if self._zeroed:
            kinds[entries == 1] = ZERO
        return kinds, entries.astype(np.uint64) * np.uint64(SECTOR)


class StreamExtent(HostedExtent):
    """Compressed grains, each behind its marker (VDF "Stream-Optimized Compressed Sparse Extents").

    `offset` of its rows is that of the zlib stream; `stored` is an upper bound: up to the next grain of the same
    tables, and never more than any encoder needs.
    """

    def __init__(
        self, source: ByteSource, header: SparseHeader, found: Directories, size: int, empty: int = HOLE
    ) -> None:
        super().__init__(source, header, found, size, empty)
        self._skip = MARKER_BYTES if header.flags & FLAG_MARKERS else 0
        self.most = 2 * self.grain + 1024
        """Bytes that a compressed grain may take: far more than deflate's worst case."""

    def compact(self, first: int, kinds: NDArray[np.uint8], offsets: NDArray[np.uint64]) -> NDArray[np.void]:
        """See GrainTables: every grain of data is a row of its own."""
        same = (kinds[1:] == kinds[:-1]) & (kinds[1:] != DATA)
        heads = np.concatenate(([0], np.flatnonzero(~same) + 1))
        rows = self.build(first, len(kinds), heads, kinds[heads], offsets[heads])
        data = np.flatnonzero(rows["kind"] == DATA)
        if data.size:
            places = rows["offset"][data]
            rows["offset"][data] = places + np.uint64(self._skip)
            rows["codec"][data] = ZLIB
            rows["stored"][data] = self._room(places, heads[data] // self.entries)
            self._require_last(int(places.max()))
        return rows

    def _room(self, places: NDArray[np.uint64], tables: NDArray[Any]) -> NDArray[np.int64]:
        """Return how many bytes the stream at each place may have: up to the next grain of its table, or `most`."""
        order = np.lexsort((places, tables))
        ordered, table = places[order].astype(np.int64), tables[order]
        after = np.full(len(places), self.source.size, np.int64)
        after[:-1] = np.where(table[1:] == table[:-1], ordered[1:], after[:-1])
        room = np.empty(len(places), np.int64)
        room[order] = np.clip(after - ordered - self._skip, 1, self.most)
        return room

    def _require_last(self, place: int) -> None:
        """Raise FormatError if the grain that lies last in the file is not all there."""
        if self._skip and place + self._skip <= self.source.size:
            self._marker(self.source.read(place, self._skip), place)

    def _marker(self, raw: Buffer, place: int) -> tuple[int, int]:
        """Return LBA and stored bytes by the marker at byte `place`. Raises FormatError for what cannot be."""
        marker = np.frombuffer(raw, GRAIN_MARKER, 1)[0]
        lba, size = int(marker["lba"]), int(marker["size"])
        if not 0 < size <= self.most:
            raise self._bad("the size of a compressed grain is out of range", place, "size", f"1 to {self.most}", size)
        if place + self._skip + size > self.source.size:
            raise self._bad(
                "the image is truncated: a grain lies beyond its end",
                place,
                "size",
                f"{size} bytes",
                f"the end at {self.source.size}",
            )
        return lba, size

    def _bad(self, problem: str, place: int, field: str, expected: object, found: object) -> FormatError:
        return FormatError(
            problem,
            file=self.source.name,
            format="vmdk",
            structure="grain marker",
            field=field,
            offset=place,
            expected=expected,
            found=found,
        )

    def decode(self, offset: int, stored: int, held: ByteSource | None = None) -> tuple[bytes | bytearray, Buffer]:
        """See Extent: the marker's LBA must be that of a grain which the tables place here."""
        place = offset - self._skip
        raw = (held or self.source).view(place, stored + self._skip)
        number = None
        if self._skip:
            if len(raw) < self._skip:
                raise self._bad("the image is truncated", place, "lba", f"{self._skip} bytes", len(raw))
            lba, size = self._marker(raw[: self._skip], place)
            number = self._number(lba, place)
            if size > len(raw) - self._skip:
                raise self._bad("a compressed grain runs into the next", place, "size", len(raw) - self._skip, size)
            raw = raw[self._skip : self._skip + size]
        return self._inflate(raw, number, offset)

    def _number(self, lba: int, place: int) -> int:
        number, odd = divmod(lba, self.header.grain_size)
        if not odd and lba * SECTOR < self.size:
            table, index = divmod(number, self.entries)
            if int(self.load(table, table + 1)[index]) * SECTOR == place:
                return number
        raise self._bad("the marker names another grain than the grain table", place, "lba", "the table's grain", lba)

    def _inflate(self, raw: Buffer, number: int | None, offset: int) -> tuple[bytes | bytearray, Buffer]:
        """Return a grain decoded, and what encodes it. The disk's last one may hold only what the disk still has."""
        rest = self.size % self.grain
        last = rest and (number is None or number == self.size // self.grain)
        try:
            try:
                grain, taken = decode_exactly(ZLIB, raw, self.grain)
            except FormatError:
                if not last:
                    raise
                grain, taken = decode_exactly(ZLIB, raw, rest)
        except DiskmorphError as error:
            raise error.located(file=self.source.name, format="vmdk", offset=offset) from error.__cause__
        return grain, memoryview(raw)[:taken]
