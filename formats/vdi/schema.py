"""VDI on disk: the preheader, the header in its two layouts, the block map. All numbers are little-endian.

VirtualBox publishes no document; names and meaning are those of its storage sources (VDICore.h), sections here name
its structures.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
from construct import Array, Bytes, ExprAdapter, If, Int32ul, Int64ul, Struct, this

TEXT = b"<<< Oracle VM VirtualBox Disk Image >>>\n"
SIGNATURE = 0xBEDA107F
VERSION_1_1 = 0x0001_0001

DYNAMIC, STATIC, UNDO, DIFFERENCING = range(1, 5)
TYPE_NAMES = {DYNAMIC: "dynamic", STATIC: "static", UNDO: "undo", DIFFERENCING: "differencing"}

KNOWN_FLAGS = 0x0003_0100
"""ZERO_EXPAND (0x100), FIXED (0x10000) and DIFF (0x20000); none changes where bytes lie."""

FREE = 0xFFFF_FFFF
"""A block that was never written: the parent's, or zeroes."""
ZERO = 0xFFFF_FFFE
"""A block that reads as zeroes whatever the parent holds."""

_GUID: Any = ExprAdapter(Bytes(16), lambda raw, _: uuid.UUID(bytes_le=raw), lambda value, _: value.bytes_le)

# VDIDISKGEOMETRY: cylinders, heads, sectors a track, bytes a sector. Only the last is ever needed: it must be 512.
GEOMETRY = Struct("cylinders" / Int32ul, "heads" / Int32ul, "sectors" / Int32ul, "sector_size" / Int32ul)

# VDIPREHEADER, at byte 0. The upper half of `version` is the major number, which chooses the header's layout.
PREHEADER = Struct("text" / Bytes(64), "signature" / Int32ul, "version" / Int32ul)

# VDIHEADER0, major version 0: the map follows the header at once, and the data the map.
HEADER0 = Struct(
    "type" / Int32ul,
    "flags" / Int32ul,
    "comment" / Bytes(256),
    "geometry" / GEOMETRY,
    "disk_size" / Int64ul,  # bytes
    "block_size" / Int32ul,  # bytes, a power of two
    "blocks" / Int32ul,  # entries of the map
    "blocks_allocated" / Int32ul,
    "create_uuid" / _GUID,
    "modify_uuid" / _GUID,  # changes with the content
    "linkage_uuid" / _GUID,  # the parent's create_uuid
)

# VDIHEADER1 (384 bytes) and VDIHEADER1PLUS (400 bytes, with the last geometry), major version 1.
HEADER1 = Struct(
    "header_size" / Int32ul,
    "type" / Int32ul,
    "flags" / Int32ul,
    "comment" / Bytes(256),
    "map_offset" / Int32ul,  # offBlocks
    "data_offset" / Int32ul,  # offData: where block 0 begins, its extra bytes first
    "geometry" / GEOMETRY,
    "unused" / Int32ul,
    "disk_size" / Int64ul,
    "block_size" / Int32ul,
    "block_extra" / Int32ul,  # cbBlockExtra: bytes in front of the data of every block
    "blocks" / Int32ul,
    "blocks_allocated" / Int32ul,
    "create_uuid" / _GUID,
    "modify_uuid" / _GUID,
    "linkage_uuid" / _GUID,
    "parent_modify_uuid" / _GUID,  # the parent's modify_uuid
    "lchs_geometry" / If(this.header_size >= 400, GEOMETRY),
)

PREHEADER_SIZE = PREHEADER.sizeof()
HEADER0_SIZE = HEADER0.sizeof()
HEADER1_SIZE = 384
HEADER1_PLUS_SIZE = 400

# One entry of the block map: the number of the place where the block lies, or FREE, or ZERO.
POINTER = np.dtype("<u4")
MAP = Array(this.blocks, Int32ul)

_NO_UUID = uuid.UUID(int=0)


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says, whatever its version. Sizes and offsets in bytes; `allocated_at` is where that field is."""

    version: int
    type: int
    flags: int
    comment: str
    map_offset: int
    data_offset: int
    disk_size: int
    block_size: int
    block_extra: int
    blocks: int
    blocks_allocated: int
    allocated_at: int
    create_uuid: uuid.UUID
    modify_uuid: uuid.UUID
    linkage_uuid: uuid.UUID
    parent_modify_uuid: uuid.UUID | None

    @property
    def stride(self) -> int:
        """Bytes that one block takes in the file."""
        return self.block_size + self.block_extra

    @property
    def map_end(self) -> int:
        """Where the block map ends."""
        return self.map_offset + self.blocks * POINTER.itemsize


def parse_header0(raw: bytes, version: int) -> Header:
    """Return the header of major version 0 from the bytes behind the preheader."""
    fields = HEADER0.parse(raw)
    map_offset = PREHEADER_SIZE + HEADER0_SIZE
    return Header(
        map_offset=map_offset,
        data_offset=map_offset + fields.blocks * POINTER.itemsize,
        block_extra=0,
        parent_modify_uuid=None,
        allocated_at=PREHEADER_SIZE + 296,
        **_common(fields, version),
    )


def parse_header1(raw: bytes, version: int) -> Header:
    """Return the header of major version 1 from the bytes behind the preheader."""
    fields = HEADER1.parse(raw)
    return Header(
        map_offset=fields.map_offset,
        data_offset=fields.data_offset,
        block_extra=fields.block_extra,
        parent_modify_uuid=fields.parent_modify_uuid,
        allocated_at=PREHEADER_SIZE + 316,
        **_common(fields, version),
    )


def _common(fields: Any, version: int) -> dict[str, Any]:
    names = ("type", "flags", "disk_size", "block_size", "blocks", "blocks_allocated")
    uuids = ("create_uuid", "modify_uuid", "linkage_uuid")
    comment = fields.comment.split(b"\0")[0].decode("utf-8", "replace")
    return {name: fields[name] for name in (*names, *uuids)} | {"comment": comment, "version": version}


def build_header(header: Header) -> bytes:
    """Return preheader and header of version 1.1 with the size that VirtualBox writes (400 bytes)."""
    # VirtualBox leaves the geometries empty but for the sector size, and refuses images where that is not 512.
    geometry = {"cylinders": 0, "heads": 0, "sectors": 0, "sector_size": 512}
    fields = {
        "header_size": HEADER1_PLUS_SIZE,
        "comment": header.comment.encode().ljust(256, b"\0"),
        "geometry": geometry,
        "lchs_geometry": geometry,
        "unused": 0,
        "parent_modify_uuid": header.parent_modify_uuid or _NO_UUID,
    }
    for name in ("type", "flags", "map_offset", "data_offset", "disk_size", "block_size", "block_extra", "blocks"):
        fields[name] = getattr(header, name)
    for name in ("blocks_allocated", "create_uuid", "modify_uuid", "linkage_uuid"):
        fields[name] = getattr(header, name)
    text = {"text": TEXT.ljust(64, b"\0"), "signature": SIGNATURE, "version": VERSION_1_1}
    return PREHEADER.build(text) + HEADER1.build(fields)
