"""VHD on disk: the footer, the dynamic header with its parent locators, the block table. All numbers are big-endian.

Sections are those of "Virtual Hard Disk Image Format Specification", version 1.0 (Microsoft, 2006).
"""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
from construct import Array, Bytes, ExprAdapter, Int8ub, Int16ub, Int32ub, Int64ub, Struct, this

COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
VERSION = 0x0001_0000
NOWHERE = 0xFFFF_FFFF_FFFF_FFFF
EPOCH = 946_684_800
"""2000-01-01 00:00 UTC, from which timestamps count, in seconds since 1970."""

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
TYPE_NAMES = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}

WRITTEN_BY = {"creator": b"win ", "creator_version": 0x000A_0000, "creator_os": b"Wi2k"}
"""Who wrote a footer: QEMU takes the size of this creator's disks as it stands, of others' from the geometry."""

SECTOR = 512
UNALLOCATED = 0xFFFF_FFFF
MOST_BYTES = 2040 << 30
"""The largest disk ("Introduction": 2040 GB)."""

GEOMETRY_LIMIT = (65535, 16, 255)
"""Cylinders, heads, sectors of a disk that is too large for a geometry."""

_GUID: Any = ExprAdapter(Bytes(16), lambda raw, _: uuid.UUID(bytes=raw), lambda value, _: value.bytes)

# "Hard Disk Footer Format".
FOOTER = Struct(
    "cookie" / Bytes(8),
    "features" / Int32ub,  # bit 0: temporary; bit 1 is always set
    "version" / Int32ub,
    "data_offset" / Int64ub,  # of the dynamic header; NOWHERE in fixed disks
    "timestamp" / Int32ub,  # seconds since EPOCH
    "creator" / Bytes(4),
    "creator_version" / Int32ub,
    "creator_os" / Bytes(4),
    "original_size" / Int64ub,
    "current_size" / Int64ub,
    "cylinders" / Int16ub,
    "heads" / Int8ub,
    "sectors" / Int8ub,
    "type" / Int32ub,
    "checksum" / Int32ub,  # one's complement of the sum of all other bytes
    "uuid" / _GUID,
    "saved_state" / Int8ub,
    "reserved" / Bytes(427),
)
FOOTER_SIZE = FOOTER.sizeof()
OLD_FOOTER_SIZE = 511  # "created by versions prior to Microsoft Virtual PC 2004": the last byte is missing

# "Parent Locator Entries" of the dynamic header.
LOCATOR = Struct(
    "platform" / Bytes(4),
    "space" / Int32ub,  # sectors by the specification, bytes in most files: never relied on
    "length" / Int32ub,  # bytes
    "reserved" / Int32ub,
    "offset" / Int64ub,
)

# "Dynamic Disk Header Format".
HEADER = Struct(
    "cookie" / Bytes(8),
    "data_offset" / Int64ub,  # NOWHERE
    "table_offset" / Int64ub,
    "version" / Int32ub,
    "entries" / Int32ub,  # of the block allocation table
    "block_size" / Int32ub,  # bytes of data, without the bitmap
    "checksum" / Int32ub,
    "parent_uuid" / _GUID,
    "parent_timestamp" / Int32ub,
    "reserved" / Int32ub,
    "parent_name" / Bytes(512),  # UTF-16, big-endian
    "locators" / Array(8, LOCATOR),
    "reserved2" / Bytes(256),
)
HEADER_SIZE = HEADER.sizeof()

# "Block Allocation Table": sector of the file where the block's bitmap begins, its data behind it; or UNALLOCATED.
ENTRY = np.dtype(">u4")
TABLE = Array(this.entries, Int32ub)

WINDOWS_RELATIVE, WINDOWS_ABSOLUTE, MAC_URL = b"W2ru", b"W2ku", b"MacX"


def checksum(raw: bytes, at: int) -> int:
    """Return the one's complement of the sum of all bytes but the four at `at` ("Appendix: Computing checksums")."""
    return ~(sum(raw) - sum(raw[at : at + 4])) & 0xFFFF_FFFF


def _sealed(raw: bytes, at: int) -> bytes:
    return raw[:at] + checksum(raw, at).to_bytes(4, "big") + raw[at + 4 :]


FOOTER_CHECKSUM_AT, HEADER_CHECKSUM_AT = 64, 36


def build_footer(fields: dict[str, Any]) -> bytes:
    """Return a footer with its checksum."""
    constant = {"cookie": COOKIE, "version": VERSION, "checksum": 0, "saved_state": 0, "reserved": bytes(427)}
    return _sealed(FOOTER.build(constant | fields), FOOTER_CHECKSUM_AT)


def build_header(fields: dict[str, Any]) -> bytes:
    """Return a dynamic header with its checksum."""
    constant = {"cookie": HEADER_COOKIE, "data_offset": NOWHERE, "version": VERSION, "checksum": 0}
    return _sealed(HEADER.build(constant | {"reserved": 0, "reserved2": bytes(256)} | fields), HEADER_CHECKSUM_AT)


def geometry(size: int) -> tuple[int, int, int]:
    """Return cylinders, heads and sectors for a disk of `size` bytes ("Appendix: CHS Calculation")."""
    most_cylinders, most_heads, most_sectors = GEOMETRY_LIMIT
    total = min(size // SECTOR, most_cylinders * most_heads * most_sectors)
    if total >= most_cylinders * most_heads * 63:
        return total // most_sectors // most_heads, most_heads, most_sectors
    tracks = total // 17
    heads = max((tracks + 1023) // 1024, 4)
    if tracks < heads * 1024 and heads <= most_heads:
        return tracks // heads, heads, 17
    tracks = total // 31
    if tracks < most_heads * 1024:
        return tracks // most_heads, most_heads, 31
    return total // 63 // most_heads, most_heads, 63


def bitmap_size(block_size: int) -> int:
    """Return the bytes of a block's sector bitmap: a bit a sector, padded to whole sectors ("Data Blocks")."""
    return -(-block_size // SECTOR // 8 // SECTOR) * SECTOR
