"""Bochs growing images, read only: a catalog of extents, each behind a bitmap of its written sectors.

Facts are those of Bochs' iodev/hdimage/hdimage.h (redolog headers of version 1 and 2) and of QEMU's block/bochs.c. All
numbers are little-endian.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from construct import Bytes, Int32ul, Int64ul, Struct

from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.errors import FormatError, OptionError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE, clip, from_units, row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.allocator import NewImage, Option
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ()

MAGIC = b"Bochs Virtual HD Image"
V1, V2 = 0x1_0000, 0x2_0000

# standard_header_t and the beginning of redolog_specific_header_t.
HEADER = Struct(
    "magic" / Bytes(32),  # 0
    "type" / Bytes(16),  # 32: "Redolog"
    "subtype" / Bytes(16),  # 48: "Growing"; "Undoable" and "Volatile" are differences
    "version" / Int32ul,  # 64
    "size" / Int32ul,  # 68: of the header; the catalog follows
    "entries" / Int32ul,  # 72: of the catalog
    "bitmap" / Int32ul,  # 76: bytes of an extent's bitmap
    "extent" / Int32ul,  # 80: bytes of an extent
)
# What follows differs: version 2 has a time before the disk's size.
TAIL = {V1: Struct("disk" / Int64ul), V2: Struct("timestamp" / Int32ul, "disk" / Int64ul)}
HEADER_SIZE = 512

# The catalog: where in the file each extent lies, counted in extents with their bitmaps; FREE: nowhere.
ENTRY = np.dtype("<u4")
ENTRY_STRUCT = Int32ul
FREE = 0xFFFF_FFFF

_SECTOR = 512
_MOST_EXTENT = 8 << 20  # as QEMU's
_MOST_ENTRIES = 1 << 20  # as QEMU's: up to 8 TiB
_BATCH = 1 << 18  # sectors mapped at once
_U = np.uint64


class BochsDisk(ImageDisk):
    """One growing image. `catalog` holds places, FREE for extents never written."""

    format = "bochs"

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        header, self.size = _read_header(source)
        self.extent: int = header.extent
        self.bitmap: int = header.bitmap
        self._bitmap_room = -(-self.bitmap // _SECTOR) * _SECTOR
        self.stride = self._bitmap_room + self.extent
        self.catalog_place: int = header.size
        self.data_place = header.size + header.entries * ENTRY.itemsize
        most = min(limits.resident_table // ENTRY.itemsize, _MOST_ENTRIES)
        if self.data_place > source.size or header.entries > most:
            raise FormatError(
                "the catalog is too large, or lies beyond the end of the file",
                structure="catalog",
                field="entries",
                offset=72,
                expected=f"at most {min(most, (source.size - header.size) // ENTRY.itemsize)}",
                found=header.entries,
            )
        raw = source.read(self.catalog_place, header.entries * ENTRY.itemsize)
        self.catalog = np.frombuffer(raw, ENTRY).astype(np.uint32)
        self.files = (source,)
        self.name = source.name
        self.identity = {}
        features = {"version": header.version >> 16}
        self.info = ImageInfo("bochs", "growing", self.size, self.sector_size, self.extent, features)

    def places(self, first: int, stop: int) -> NDArray[np.uint64]:
        """Return where the bitmaps of extents first..stop begin, in bytes, whether they are FREE or not."""
        found: NDArray[np.uint64] = self.catalog[first:stop].astype(_U) * _U(self.stride) + _U(self.data_place)
        return found

    def written(self, number: int) -> NDArray[np.bool_]:
        """Return which sectors of an extent its bitmap says are written. Raises FormatError beyond the file's end."""
        place = int(self.places(number, number + 1)[0])
        count = self.extent // _SECTOR
        if place + self._bitmap_room > self.files[0].size:
            self._refuse(number, place, self._bitmap_room)
        bits = np.unpackbits(np.frombuffer(self.files[0].read(place, count // 8 or 1), np.uint8), bitorder="little")
        found: NDArray[np.bool_] = bits[:count].astype(bool)
        return found

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        first, last = start // self.extent, -(-stop // self.extent)
        used = np.flatnonzero(self.catalog[first:last] != FREE) + first
        step = max(_BATCH // (self.extent // _SECTOR), 1)
        at = first
        for index in range(0, len(used), step):
            group = used[index : index + step]
            for run in np.split(group, np.flatnonzero(np.diff(group) > 1) + 1):
                low, high = int(run[0]), int(run[-1]) + 1
                if low > at:
                    yield clip(row(at * self.extent, (low - at) * self.extent, HOLE), start, stop)
                yield clip(self._rows(low, high), start, stop)
                at = high
        if at < last:
            yield clip(row(at * self.extent, (last - at) * self.extent, HOLE), start, stop)

    def _rows(self, first: int, stop: int) -> NDArray[np.void]:
        """Return the extents of catalog entries that follow one another, none of them FREE."""
        count = self.extent // _SECTOR
        kinds = np.concatenate([self.written(number) for number in range(first, stop)])
        begins = self.places(first, stop) + _U(self._bitmap_room)
        offsets = (begins[:, None] + np.arange(count, dtype=_U) * _U(_SECTOR)).reshape(-1)
        inside = np.arange(first * count, stop * count, dtype=_U) * _U(_SECTOR) < _U(self.size)
        beyond = np.flatnonzero(kinds & inside & (offsets + _U(_SECTOR) > _U(self.files[0].size)))
        if len(beyond):
            self._refuse(first + int(beyond[0]) // count, int(offsets[beyond[0]]), _SECTOR)
        return from_units(first * count, _SECTOR, np.where(kinds, DATA, HOLE), offsets, stop * self.extent)

    def _refuse(self, number: int, place: int, length: int) -> NoReturn:
        raise FormatError(
            f"extent {number} lies beyond the end of the file: the image is truncated or damaged",
            file=self.name,
            format=self.format,
            structure="catalog",
            field=f"entry {number}",
            offset=self.catalog_place + number * ENTRY.itemsize,
            expected=f"a place before {self.files[0].size}",
            found=f"{length} bytes at {place}",
        )


def _bad(field: str, offset: int, expected: object, found: object) -> FormatError:
    return FormatError(
        "the header is damaged", structure="header", field=field, offset=offset, expected=expected, found=found
    )


def _word(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("ascii", "replace")


def _read_header(source: ByteSource) -> tuple[Any, int]:
    """Return the header and the disk's size in bytes. Raises FormatError, UnsupportedError."""
    head = source.read(0, HEADER_SIZE)
    header = HEADER.parse(head[: HEADER.sizeof()])
    if header.magic.split(b"\0")[0] != MAGIC:
        raise _bad("magic", 0, MAGIC.decode(), header.magic)
    kind = f"{_word(header.type)} {_word(header.subtype)}"
    if kind != "Redolog Growing":
        what = "a difference to another image" if kind.startswith("Redolog") else "of a kind that is not known"
        raise UnsupportedError(
            f"is {what} ({kind}), which is not read",
            feature=f"Bochs {kind}",
            structure="header",
            field="subtype",
            offset=48,
            hint="commit it to its base with bximage",
        )
    if header.version not in TAIL:
        version = f"version 0x{header.version:x}"
        raise UnsupportedError(f"{version} is not known", feature=version, structure="header", offset=64)
    tail = TAIL[header.version]
    size = int(tail.parse(head[HEADER.sizeof() : HEADER.sizeof() + tail.sizeof()]).disk)
    if not _SECTOR <= header.extent <= _MOST_EXTENT or header.extent & (header.extent - 1):
        raise _bad("extent", 80, f"a power of two from {_SECTOR} to {_MOST_EXTENT}", header.extent)
    least = -(-header.extent // (_SECTOR * 8))
    if not least <= header.bitmap <= _MOST_EXTENT:
        raise _bad("bitmap", 76, f"{least} to {_MOST_EXTENT}", header.bitmap)
    if header.size < HEADER_SIZE or header.size > source.size:
        raise _bad("size", 68, f"{HEADER_SIZE} to {source.size}", header.size)
    if size % _SECTOR or size > header.entries * header.extent:
        at = HEADER.sizeof() + tail.sizeof() - 8
        raise _bad("disk", at, f"a multiple of {_SECTOR}, at most {header.entries * header.extent}", size)
    return header, size


def open_image(source: ByteSource, context: OpenContext) -> BochsDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(f"a Bochs image has no snapshot {context.snapshot!r}", feature="internal snapshots")
    return BochsDisk(source, context.limits)


def new_allocator(image: NewImage) -> NoReturn:
    """Refuse: Bochs images are not written."""
    raise OptionError(f"bochs is read, but not written: {image.name}", hint="`diskmorph formats` lists what is written")


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: extents lie in the file and nowhere twice. Nothing is repaired."""
    del repair
    disk = open_image(source, context)
    report = CheckReport("bochs")
    needed = -(-disk.size // disk.extent)
    used = np.flatnonzero(disk.catalog != FREE)
    for number in used[used >= needed][: CheckReport.LIMIT].tolist():
        report.add("catalog", disk.catalog_place + 4 * number, f"extent {number} lies behind the disk's end", WARNING)
    order = used[np.argsort(disk.catalog[used], kind="stable")]
    same = order[1:][np.diff(disk.catalog[order].astype(np.int64)) == 0]
    for number in same[: CheckReport.LIMIT].tolist():
        report.add("catalog", disk.catalog_place + 4 * number, f"extent {number} lies where another one does")
    for number in used[used < needed].tolist():
        try:
            for _ in disk.extents(number * disk.extent, min((number + 1) * disk.extent, disk.size)):
                pass
        except FormatError as error:
            report.add(error.structure or "catalog", error.offset, error.problem)
    spare = (source.size - disk.data_place) // disk.stride - len(np.unique(disk.catalog[used]))
    if spare > 0:
        report.add("file", disk.data_place, f"{spare} extents of the file belong to no place of the disk", WARNING)
    return report
