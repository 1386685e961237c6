"""ASIF, Apple's sparse image format of macOS 26, read only: two directories, tables of chunks, bitmaps of blocks.

Apple publishes no specification. Facts are those of the public description github.com/huven/asif-format (CC0), found by
experiment: what it calls unknown is refused by name. All numbers are big-endian.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from construct import Array, Bytes, Int16ub, Int32ub, Int64ub, Struct, this

from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.errors import FormatError, OptionError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE, clip, from_units, row
from diskmorph.formats.places import shared_places

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.allocator import NewImage, Option
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ()

MAGIC = b"shdw"

# "Header".
HEADER = Struct(
    "magic" / Bytes(4),  # 0
    "version" / Int32ub,  # 4: 1
    "size" / Int32ub,  # 8: of the header, 512
    "flags" / Int32ub,  # 12
    "directories" / Array(2, Int64ub),  # 16: where they lie, in bytes
    "uuid" / Bytes(16),  # 32
    "blocks" / Int64ub,  # 48: the disk's size
    "most_blocks" / Int64ub,  # 56: to which it may grow
    "chunk" / Int32ub,  # 64: bytes of a chunk
    "block" / Int16ub,  # 68: bytes of a block
    "segments" / Int16ub,  # 70: 0
    "metadata" / Int64ub,  # 72: a chunk of the disk, behind its end
)
HEADER_SIZE = HEADER.sizeof()

# "Directory": a number, the higher of both directories' counts, and the chunk of each table.
# "Table", "Chunk Group": entries of chunks, and behind those of a group that of its bitmap.
ENTRY = np.dtype(">u8")
ENTRIES = Array(this.count, Int64ub)
_INDEX = (1 << 55) - 1
NEVER, WHOLE, UNMAPPED, PARTLY = range(4)
"""What the top two bits of an entry say of the chunk."""
_BLOCK_NEVER, _BLOCK_WRITTEN = 0, 1  # of two bits in a bitmap, the lowest first

_MOST_CHUNK = 64 << 20
_U = np.uint64


class AsifDisk(ImageDisk):
    """One ASIF file. `directory` holds the chunk of each table, 0 for none."""

    format = "asif"

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        header = _read_header(source)
        self.header = header
        self.chunk: int = header.chunk
        self.block: int = header.block
        self.sector_size = 4096 if header.block == 4096 else 512
        self.group = 4 * header.block
        """Chunks of a group."""
        self.stride = 8 * (self.group + 1)
        self.groups = header.chunk // self.stride
        """Groups of a table."""
        self.size = header.blocks * header.block
        self.files = (source,)
        self.name = source.name
        self.identity = {"uuid": str(uuid.UUID(bytes=header.uuid))}
        self.chunks = source.size // self.chunk
        self.directory_place, self.directory = self._read_directory(limits)
        features = {"version": header.version, "uuid": self.identity["uuid"]}
        features["most_size"] = header.most_blocks * header.block
        self.info = ImageInfo("asif", None, self.size, self.sector_size, self.chunk, features)

    @property
    def span(self) -> int:
        """Return the bytes of the disk that one table describes."""
        chunks: int = self.groups * self.group
        return chunks * self.chunk

    def _read_directory(self, limits: Limits) -> tuple[int, NDArray[np.uint64]]:
        """Return the newer directory: its place, and its entries, as many as the disk may ever have."""
        count = -(-self.header.most_blocks * self.block // self.span)
        length = 8 * (count + 1)
        found: list[tuple[int, int]] = []
        for number, place in enumerate(self.header.directories):
            if length > limits.resident_table or place + length > self.files[0].size or place < HEADER_SIZE:
                raise FormatError(
                    "a directory is too large, or lies beyond the end of the file",
                    structure="header",
                    field=f"directories[{number}]",
                    offset=16 + 8 * number,
                    expected=f"{length} bytes, at most {limits.resident_table}, before {self.files[0].size}",
                    found=place,
                )
            found.append((int.from_bytes(self.files[0].read(place, 8), "big"), place))
        place = max(found, key=lambda one: one[0])[1]
        entries = np.frombuffer(self.files[0].read(place + 8, 8 * count), ENTRY).astype(_U)
        used = np.flatnonzero(entries)
        wrong = used[entries[used] >= _U(self.chunks)]
        if not len(wrong):
            order = used[np.argsort(entries[used], kind="stable")]
            wrong = order[1:][np.diff(entries[order]) == 0]
        if len(wrong):
            raise FormatError(
                f"table {int(wrong[0])} lies beyond the end of the file, or where another one does",
                structure="directory",
                field=f"entry {int(wrong[0])}",
                offset=place + 8 + 8 * int(wrong[0]),
                expected=f"a chunk below {self.chunks}",
                found=int(entries[wrong[0]]),
            )
        return place, entries

    def entries(self, table: int, group: int) -> tuple[int, NDArray[np.uint64]]:
        """Return where a group of a table lies in the file, and its entries, the bitmap's last."""
        place = int(self.directory[table]) * self.chunk + group * self.stride
        return place, np.frombuffer(self.files[0].read(place, self.stride), ENTRY).astype(_U)

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        span, reach = self.span, self.group * self.chunk
        for table in range(start // span, -(-stop // span)):
            low, high = max(table * span, start), min((table + 1) * span, stop)
            if not self.directory[table]:
                yield row(low, high - low, HOLE)
                continue
            for group in range((low - table * span) // reach, -(-(high - table * span) // reach)):
                first = table * span + group * reach
                for rows in self._rows(table, group, first):
                    yield clip(rows, max(low, first), min(high, first + reach))

    def _rows(self, table: int, group: int, start: int) -> Iterator[NDArray[np.void]]:
        """Yield the extents of a group that begins at disk offset `start`, to the disk's end."""
        place, entries = self.entries(table, group)
        count = min(self.group, -(-(self.size - start) // self.chunk))
        states, chunks = entries[:count] >> _U(62), entries[:count] & _U(_INDEX)
        self._require_known(place, states, chunks, start)
        kinds = np.where((states == WHOLE) | (states == PARTLY), DATA, HOLE).astype(np.uint8)
        offsets = chunks * _U(self.chunk)
        first = start // self.chunk
        at = 0
        for partly in [*np.flatnonzero(states == PARTLY).tolist(), count]:
            if partly > at:
                yield from_units(first + at, self.chunk, kinds[at:partly], offsets[at:partly], self.size)
            if partly < count:
                yield self._blocks(place, int(entries[-1]), partly, int(offsets[partly]), first + partly)
            at = partly + 1

    def _require_known(self, place: int, states: NDArray[np.uint64], chunks: NDArray[np.uint64], start: int) -> None:
        """Refuse entries whose meaning is not known, and chunks beyond the end of the file."""
        held = (states == WHOLE) | (states == PARTLY)
        strange = np.flatnonzero(~held & (chunks != 0))
        if len(strange):
            at = int(strange[0])
            raise UnsupportedError(
                f"the entry of disk offset {start + at * self.chunk} has a state that is not known",
                feature=f"ASIF chunk state {int(states[at])} with a place",
                file=self.name,
                format=self.format,
                structure="table",
                offset=place + 8 * at,
            )
        # The file may end inside the last chunk, where the disk does.
        ends = np.full(len(chunks), self.chunk, np.int64)
        ends[-1:] = min(self.chunk, self.size - start - (len(chunks) - 1) * self.chunk)
        room = self.files[0].size - np.minimum(chunks, _U(self.chunks + 1)).astype(np.int64) * self.chunk
        wrong = np.flatnonzero(held & ((chunks == 0) | (room < np.where(states == PARTLY, 1, ends))))
        if len(wrong):
            at = int(wrong[0])
            raise FormatError(
                f"the chunk of disk offset {start + at * self.chunk} lies beyond the end of the file",
                file=self.name,
                format=self.format,
                structure="table",
                field="entry",
                offset=place + 8 * at,
                expected=f"a chunk from 1 to {self.chunks - 1}",
                found=int(chunks[at]),
            )

    def _blocks(self, place: int, bitmap: int, number: int, offset: int, unit: int) -> NDArray[np.void]:
        """Return the extents of a chunk of which only some blocks were written; `unit` is its number on the disk."""
        entry, bitmap = place + 8 * self.group, bitmap & _INDEX
        if not 0 < bitmap < self.chunks:
            raise FormatError(
                "a bitmap lies beyond the end of the file, or is missing",
                file=self.name,
                format=self.format,
                structure="table",
                field="bitmap",
                offset=entry,
                expected=f"a chunk from 1 to {self.chunks - 1}",
                found=bitmap,
            )
        count = self.chunk // self.block
        at = bitmap * self.chunk + number * count // 4
        raw = np.frombuffer(self.files[0].read(at, count // 4), np.uint8)
        states = (raw[:, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)).reshape(-1)
        first = unit * count
        left = max(-(-(self.size - unit * self.chunk) // self.block), 0)
        states = states[:left]
        if (states > _BLOCK_WRITTEN).any():
            where = int(np.flatnonzero(states > _BLOCK_WRITTEN)[0])
            raise UnsupportedError(
                f"a block of disk offset {(first + where) * self.block} has a state that is not known",
                feature=f"ASIF block state {int(states[where])}",
                file=self.name,
                format=self.format,
                structure="bitmap",
                offset=at + where // 4,
            )
        written = np.flatnonzero(states == _BLOCK_WRITTEN)
        if len(written) and offset + (int(written[-1]) + 1) * self.block > self.files[0].size:
            raise FormatError(
                f"the image is truncated: data of disk offset {unit * self.chunk} lies beyond its end",
                file=self.name,
                format=self.format,
                structure="chunk",
                offset=offset,
                expected=f"{(int(written[-1]) + 1) * self.block} bytes",
                found=f"the end at {self.files[0].size}",
            )
        kinds = np.where(states == _BLOCK_NEVER, HOLE, DATA)
        places = _U(offset) + np.arange(len(states), dtype=_U) * _U(self.block)
        return from_units(first, self.block, kinds, places, self.size)


def _bad(field: str, offset: int, expected: object, found: object) -> FormatError:
    return FormatError(
        "the header is damaged", structure="header", field=field, offset=offset, expected=expected, found=found
    )


def _read_header(source: ByteSource) -> Any:
    header = HEADER.parse(source.read(0, HEADER_SIZE))
    if header.magic != MAGIC:
        raise _bad("magic", 0, MAGIC.decode(), header.magic)
    if header.version != 1:
        version = f"ASIF version {header.version}"
        raise UnsupportedError(f"{version} is not known", feature=version, structure="header", offset=4)
    if header.segments:
        raise UnsupportedError(
            "has segments, which are not known", feature="ASIF segments", structure="header", offset=70
        )
    if header.block not in {512, 1024, 2048, 4096}:
        raise _bad("block", 68, "512, 1024, 2048 or 4096", header.block)
    least = 8 * (4 * header.block + 1)  # a table holds one group
    if not least <= header.chunk <= _MOST_CHUNK or header.chunk % (4 * header.block):
        raise _bad("chunk", 64, f"a multiple of {4 * header.block} from {least} to {_MOST_CHUNK}", header.chunk)
    if header.most_blocks > (1 << 62) // header.block:
        raise _bad("most_blocks", 56, f"at most {(1 << 62) // header.block}", header.most_blocks)
    if header.blocks > header.most_blocks:
        raise _bad("blocks", 48, f"at most {header.most_blocks}", header.blocks)
    return header


def open_image(source: ByteSource, context: OpenContext) -> AsifDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(f"an ASIF image has no snapshot {context.snapshot!r}", feature="internal snapshots")
    return AsifDisk(source, context.limits)


def new_allocator(image: NewImage) -> NoReturn:
    """Refuse: ASIF is not written."""
    raise OptionError(f"asif is read, but not written: {image.name}", hint="`diskmorph formats` lists what is written")


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: every entry must be known and lie in the file, no chunk be used twice. Nothing is repaired."""
    del repair
    disk = open_image(source, context)
    report = CheckReport("asif")
    try:
        for batches in (disk.extents(), _used(disk)):
            for _ in batches:
                pass
    except FormatError as error:
        report.add(error.structure or "table", error.offset, error.problem)
        return report
    shared = shared_places(lambda: _used(disk), 1)
    if shared.overlapping:
        some = ", ".join(str(place * disk.chunk) for place in shared.some[:4])
        report.add("table", disk.directory_place, f"chunks are used twice, at {some}", count=shared.overlapping)
    spare = -(-source.size // disk.chunk) - shared.distinct
    if spare > 0:
        report.add("file", None, f"{spare} chunks of the file are used by nothing", WARNING)
    return report


def _used(disk: AsifDisk) -> Iterator[NDArray[np.uint64]]:
    """Yield the numbers of all chunks in use: the header's, tables', data's, bitmaps'."""
    tables = np.flatnonzero(disk.directory)
    yield np.concatenate((np.zeros(1, _U), disk.directory[tables]))
    for table in tables.tolist():
        for group in range(disk.groups):
            entries = disk.entries(table, group)[1] & _U(_INDEX)
            yield entries[entries != 0]
