"""Reading VDI: dynamic, static and differencing images of every header version.

The block map is never held whole: it is read in batches where it is asked for.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.disk import ImageDisk, ImageInfo, ParentRef
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, HOLE, clip, from_units, require_within, row
from diskmorph.formats.extents import ZERO as ZERO_KIND
from diskmorph.formats.vdi.schema import (
    DIFFERENCING,
    FREE,
    HEADER0_SIZE,
    HEADER1_PLUS_SIZE,
    HEADER1_SIZE,
    KNOWN_FLAGS,
    POINTER,
    PREHEADER,
    PREHEADER_SIZE,
    SIGNATURE,
    STATIC,
    TYPE_NAMES,
    UNDO,
    ZERO,
    Header,
    parse_header0,
    parse_header1,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

_BATCH = 1 << 16  # entries of the map read at once: 256 KiB
_SCATTERED = 1024  # rows of a batch
_LEAST_BLOCK, _MOST_BLOCK = 4 << 10, 1 << 30  # bytes; above, places could not be told in 64 bits


class VdiDisk(ImageDisk):
    """One VDI file as a layer: FREE blocks are ABSENT where there is a parent, else holes."""

    format = "vdi"

    def __init__(self, source: ByteSource, header: Header) -> None:
        self.header = header
        self.size = header.disk_size
        self.files = (source,)
        self.name = source.name
        self.identity = {"uuid": str(header.create_uuid), "modify uuid": str(header.modify_uuid)}
        self.info = ImageInfo(
            "vdi",
            TYPE_NAMES[header.type],
            self.size,
            self.sector_size,
            header.block_size,
            features={
                "version": f"{header.version >> 16}.{header.version & 0xFFFF}",
                "blocks": header.blocks,
                "blocks_allocated": header.blocks_allocated,
                "block_extra": header.block_extra,
                "data_offset": header.data_offset,
                "uuid": str(header.create_uuid),
                "comment": header.comment,
            },
            parent=_parent(header),
        )

    def pointers(self, first: int, stop: int) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """Yield (number of the first block, map entries) for blocks first..stop, in batches."""
        for at in range(first, stop, _BATCH):
            count = min(_BATCH, stop - at)
            raw = self.files[0].read(self.header.map_offset + at * POINTER.itemsize, count * POINTER.itemsize)
            yield at, np.frombuffer(raw, POINTER)

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        header = self.header
        free = ABSENT if header.type == DIFFERENCING else HOLE
        for first, entries in self.pointers(start // header.block_size, -(-stop // header.block_size)):
            kinds = np.full(len(entries), DATA, np.uint8)
            kinds[entries == FREE] = free
            kinds[entries == ZERO] = ZERO_KIND
            offsets = entries.astype(np.uint64)
            offsets *= np.uint64(header.stride)
            offsets += np.uint64(header.data_offset + header.block_extra)
            rows = clip(from_units(first, header.block_size, kinds, offsets, self.size), start, stop)
            require_within(rows, [self.files[0].size], file=self.name, format="vdi", structure="block")
            # In a scattered map there is one question to the file system for each block: not worth the time.
            ordered = header.type == STATIC and len(rows) <= _SCATTERED
            yield from self._sparse(rows) if ordered else (rows,)

    def _sparse(self, rows: NDArray[np.void]) -> Iterator[NDArray[np.void]]:
        """Yield the rows with holes where the file has them: a static image stores all blocks, but often sparsely."""
        for index in range(len(rows)):
            one = rows[index : index + 1]
            if one["kind"][0] != DATA:
                yield one
                continue
            start, offset, length = (int(one[name][0]) for name in ("start", "offset", "length"))
            for at, count, allocated in self.files[0].runs(offset, offset + length):
                kind, place = (DATA, at) if allocated else (HOLE, 0)
                yield row(start + at - offset, count, kind, offset=place)


def _parent(header: Header) -> ParentRef | None:
    """Return what is known of the parent: its UUIDs, but no name.

    A parent-modify UUID that is null (or absent, in version 0) was never set and demands nothing.
    """
    if header.type != DIFFERENCING:
        return None
    expects = {"uuid": (str(header.linkage_uuid),)}
    if header.parent_modify_uuid not in {None, uuid.UUID(int=0)}:
        expects["modify uuid"] = (str(header.parent_modify_uuid),)
    return ParentRef((), "vdi", expects)


def open_image(source: ByteSource, context: OpenContext) -> VdiDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(f"VDI has no internal snapshot {context.snapshot!r}", feature="snapshots")
    header = read_header(source)
    _require_sane(header, source)
    return VdiDisk(source, header)


def read_header(source: ByteSource) -> Header:
    """Return the header, its signature and version checked. Raises FormatError, UnsupportedError (version, undo)."""
    pre = PREHEADER.parse(source.read(0, PREHEADER_SIZE))
    if pre.signature != SIGNATURE:
        raise _wrong("signature", 64, f"{SIGNATURE:#x}", f"{pre.signature:#x}")
    major = pre.version >> 16
    if major == 0:
        header = parse_header0(source.read(PREHEADER_SIZE, HEADER0_SIZE), pre.version)
    elif major == 1:
        said = int.from_bytes(source.read(PREHEADER_SIZE, 4), "little")
        if said < HEADER1_SIZE:
            raise _wrong("header_size", PREHEADER_SIZE, f"at least {HEADER1_SIZE}", said)
        size = HEADER1_PLUS_SIZE if said >= HEADER1_PLUS_SIZE else HEADER1_SIZE
        header = parse_header1(source.read(PREHEADER_SIZE, size), pre.version)
    else:
        version = f"{major}.{pre.version & 0xFFFF}"
        raise UnsupportedError(f"VDI version {version} is not known", feature=f"version {version}", offset=68)
    if header.type == UNDO:
        raise UnsupportedError("VDI undo images are not supported", feature="undo image")
    if header.type not in TYPE_NAMES:
        raise _wrong("type", 72 if major == 0 else 76, "1 to 4", header.type)
    if header.flags & ~KNOWN_FLAGS:
        flags = f"flags {header.flags & ~KNOWN_FLAGS:#x}"
        raise UnsupportedError(f"VDI {flags} are not known", feature=flags)
    return header


def _require_sane(header: Header, source: ByteSource) -> None:
    """Hold sizes and offsets against each other and the file before anything is allocated."""
    size = header.block_size
    if not _LEAST_BLOCK <= size <= _MOST_BLOCK or size & (size - 1):
        raise _wrong("block_size", None, f"a power of two from {_LEAST_BLOCK} to {_MOST_BLOCK}", size)
    if header.block_extra > _MOST_BLOCK:
        raise _wrong("block_extra", None, f"at most {_MOST_BLOCK}", header.block_extra)
    if not header.disk_size:
        raise _wrong("disk_size", None, "more than 0", 0)
    if header.blocks * size < header.disk_size:
        raise _wrong("blocks", None, f"at least {-(-header.disk_size // size)} for the disk's size", header.blocks)
    least = PREHEADER_SIZE + (HEADER1_SIZE if header.version >> 16 else HEADER0_SIZE)
    if header.map_offset < least:
        raise _wrong("map_offset", None, f"at least {least}, behind the header", header.map_offset)
    if header.map_end > source.size:
        raise FormatError(
            "the block map lies beyond the end of the file",
            structure="block map",
            offset=header.map_offset,
            expected=f"{header.map_end - header.map_offset} bytes",
            found=f"the end at {source.size}",
        )
    if header.version >> 16 and header.data_offset % 512:
        raise _wrong("data_offset", None, "a multiple of 512", header.data_offset)
    if header.data_offset < header.map_end:
        raise _wrong("data_offset", None, f"at least {header.map_end}, behind the map", header.data_offset)


def _wrong(field: str, offset: int | None, expected: object, found: object) -> FormatError:
    return FormatError(
        "the VDI header is damaged", structure="header", field=field, offset=offset, expected=expected, found=found
    )
