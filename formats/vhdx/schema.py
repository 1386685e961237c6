"""The structures of VHDX files, by [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format". All numbers are little-endian.

Where nothing else is said, offsets and lengths are in bytes. GUIDs are 16 bytes in the mixed order of Windows.
"""

from __future__ import annotations

import uuid
from typing import Any, Final

import numpy as np
from construct import (
    Adapter,
    Bytes,
    Const,
    Construct,
    Int16ul,
    Int32ul,
    Int64ul,
    Padding,
    Struct,
)

from diskmorph.formats.crc32c import crc32c

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40

# The header section, the first MiB of the file (2.2).
IDENTIFIER_AT = 0
HEADERS_AT: Final = (64 * KIB, 128 * KIB)
REGION_TABLES_AT: Final = (192 * KIB, 256 * KIB)
HEADER_SIZE = 4 * KIB
REGION_TABLE_SIZE = 64 * KIB
HEADER_SECTION = MIB

VERSION = 1
LOG_VERSION = 0
MAX_ENTRIES = 2047
"""Of a region table (2.2.3.1) and of a metadata table (2.6.1.1)."""
MIN_BLOCK, MAX_BLOCK = MIB, 256 * MIB
MAX_DISK = 64 * TIB
SECTOR_SIZES: Final = (512, 4096)
CHUNK_SECTORS = 1 << 23
"""Logical sectors that one sector bitmap block describes (2.4)."""
BITMAP_BLOCK = MIB
LOG_SECTOR = 4 * KIB


class _Guid(Adapter):  # type: ignore[type-arg]
    def _decode(self, obj: Any, context: Any, path: Any) -> uuid.UUID:
        del context, path
        return uuid.UUID(bytes_le=bytes(obj))

    def _encode(self, obj: Any, context: Any, path: Any) -> bytes:
        del context, path
        return uuid.UUID(str(obj)).bytes_le


Guid: Construct[Any, Any] = _Guid(Bytes(16))
NO_GUID: Final = uuid.UUID(int=0)

Identifier = Struct(
    "signature" / Const(b"vhdxfile"),  # 2.2.1
    "creator" / Bytes(512),  # UTF-16LE, for diagnosis only
)

Header = Struct(  # 2.2.2
    "signature" / Const(b"head"),
    "checksum" / Int32ul,  # CRC-32C of the 4 KiB with this field zero
    "sequence_number" / Int64ul,  # the valid header with the higher one is current
    "file_write_guid" / Guid,  # changes whenever the file is opened to be changed
    "data_write_guid" / Guid,  # changes with the virtual disk's content; children record it
    "log_guid" / Guid,  # of valid log entries; zero: nothing to replay
    "log_version" / Int16ul,  # 0
    "version" / Int16ul,  # 1
    "log_length" / Int32ul,  # a multiple of 1 MiB
    "log_offset" / Int64ul,  # a multiple of 1 MiB
    "reserved" / Padding(4016),
)

RegionTableHeader = Struct(  # 2.2.3.1
    "signature" / Const(b"regi"),
    "checksum" / Int32ul,  # CRC-32C of the 64 KiB with this field zero
    "entry_count" / Int32ul,  # at most 2047
    "reserved" / Int32ul,
)

RegionEntry = Struct(  # 2.2.3.2
    "guid" / Guid,
    "file_offset" / Int64ul,  # a multiple of 1 MiB, at least 1 MiB
    "length" / Int32ul,  # a multiple of 1 MiB
    "required" / Int32ul,  # bit 0: a reader that does not know the region must refuse the file
)

REGION_DTYPE = np.dtype([("guid", "V16"), ("file_offset", "<u8"), ("length", "<u4"), ("required", "<u4")])

BAT_REGION: Final = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION: Final = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")

LogEntryHeader = Struct(  # 2.3.1.1
    "signature" / Const(b"loge"),
    "checksum" / Int32ul,  # CRC-32C of the whole entry with this field zero
    "entry_length" / Int32ul,  # a multiple of 4 KiB
    "tail" / Int32ul,  # where in the log the oldest entry begins that is still needed
    "sequence_number" / Int64ul,
    "descriptor_count" / Int32ul,
    "reserved" / Int32ul,
    "log_guid" / Guid,
    "flushed_file_offset" / Int64ul,  # the file was at least that large, and stable, when the entry was written
    "last_file_offset" / Int64ul,  # all structures of the file lie below; a shorter file is extended
)

LOG_ENTRY_DTYPE = np.dtype(
    [
        ("signature", "S4"),
        ("checksum", "<u4"),
        ("entry_length", "<u4"),
        ("tail", "<u4"),
        ("sequence_number", "<u8"),
        ("descriptor_count", "<u4"),
        ("reserved", "<u4"),
        ("log_guid", "V16"),
        ("flushed_file_offset", "<u8"),
        ("last_file_offset", "<u8"),
    ]
)

ZeroDescriptor = Struct(  # 2.3.1.2
    "signature" / Const(b"zero"),
    "reserved" / Int32ul,
    "zero_length" / Int64ul,  # a multiple of 4 KiB
    "file_offset" / Int64ul,  # a multiple of 4 KiB
    "sequence_number" / Int64ul,  # the entry's
)

DataDescriptor = Struct(  # 2.3.1.3
    "signature" / Const(b"desc"),
    "trailing_bytes" / Int32ul,  # the last 4 bytes of the sector, which the data sector keeps its sequence in
    "leading_bytes" / Int64ul,  # the first 8 bytes of the sector
    "file_offset" / Int64ul,  # a multiple of 4 KiB
    "sequence_number" / Int64ul,  # the entry's
)

# Either descriptor: `trailing` and `leading` are `reserved` and `zero_length` of a zero descriptor.
DESCRIPTOR_DTYPE = np.dtype(
    [
        ("signature", "S4"),
        ("trailing", "<u4"),
        ("leading", "<u8"),
        ("file_offset", "<u8"),
        ("sequence_number", "<u8"),
    ]
)

DataSector = Struct(  # 2.3.1.4
    "signature" / Const(b"data"),
    "sequence_high" / Int32ul,
    "data" / Bytes(4084),  # bytes 8 to 4092 of the sector
    "sequence_low" / Int32ul,
)

DATA_SECTOR_DTYPE = np.dtype(
    [("signature", "S4"), ("sequence_high", "<u4"), ("data", "V4084"), ("sequence_low", "<u4")]
)

# A BAT entry (2.5.1): state in bits 0-2, bits 3-19 reserved, the file offset in MiB in bits 20-63.
BAT_ENTRY = np.dtype("<u8")
BatEntry = Struct("value" / Int64ul)
STATE_MASK = 0x7
RESERVED_MASK = 0xFFFF8
OFFSET_MASK = 0xFFFF_FFFF_FFF0_0000  # in place it is the offset in bytes

# Payload block states (2.5.1.1). UNMAPPED was 5 up to version 0.95 of the specification.
NOT_PRESENT, UNDEFINED, BLOCK_ZERO, UNMAPPED, UNMAPPED_OLD, FULLY_PRESENT, PARTIALLY_PRESENT = 0, 1, 2, 3, 5, 6, 7
# Sector bitmap block states (2.5.1.2)
BITMAP_NOT_PRESENT, BITMAP_PRESENT = 0, 6

METADATA_TABLE_SIZE = 64 * KIB
METADATA_ITEM_LIMIT = MIB

MetadataTableHeader = Struct(  # 2.6.1.1
    "signature" / Const(b"metadata"),
    "reserved" / Int16ul,
    "entry_count" / Int16ul,  # at most 2047
    "reserved2" / Padding(20),
)

MetadataEntry = Struct(  # 2.6.1.2
    "item_id" / Guid,
    "offset" / Int32ul,  # from the start of the region, at least 64 KiB; 0 where `length` is
    "length" / Int32ul,  # at most 1 MiB
    "flags" / Int32ul,
    "reserved" / Int32ul,
)

METADATA_DTYPE = np.dtype(
    [("item_id", "V16"), ("offset", "<u4"), ("length", "<u4"), ("flags", "<u4"), ("reserved", "<u4")]
)
IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4

FILE_PARAMETERS: Final = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
VIRTUAL_DISK_SIZE: Final = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
VIRTUAL_DISK_ID: Final = uuid.UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")  # page 83 data
LOGICAL_SECTOR_SIZE: Final = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR_SIZE: Final = uuid.UUID("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR: Final = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")

FileParameters = Struct(  # 2.6.2.1
    "block_size" / Int32ul,  # a power of two, 1 MiB to 256 MiB
    "flags" / Int32ul,
)
LEAVE_BLOCKS_ALLOCATED, HAS_PARENT = 1, 2

VirtualDiskSize = Struct("size" / Int64ul)  # 2.6.2.2: a multiple of the logical sector size, at most 64 TiB
VirtualDiskId = Struct("guid" / Guid)  # 2.6.2.3
SectorSize = Struct("size" / Int32ul)  # 2.6.2.4 and 2.6.2.5: 512 or 4096

VHDX_LOCATOR: Final = uuid.UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913")

ParentLocatorHeader = Struct(  # 2.6.2.6.1
    "locator_type" / Guid,
    "reserved" / Int16ul,
    "key_value_count" / Int16ul,
)

ParentLocatorEntry = Struct(  # 2.6.2.6.2; offsets are from the start of the item, texts UTF-16LE
    "key_offset" / Int32ul,
    "value_offset" / Int32ul,
    "key_length" / Int16ul,
    "value_length" / Int16ul,
)

LOCATOR_ENTRY_DTYPE = np.dtype(
    [("key_offset", "<u4"), ("value_offset", "<u4"), ("key_length", "<u2"), ("value_length", "<u2")]
)


def checksum(block: bytes) -> int:
    """Return the CRC-32C of a header, region table or log entry, its field at bytes 4 to 8 taken as zero."""
    return crc32c(block[8:], crc32c(bytes(4), crc32c(block[:4])))


def sealed(block: bytes) -> bytes:
    """Return the block with its checksum field made right."""
    return block[:4] + Int32ul.build(checksum(block)) + block[8:]


def bat_entries(blocks: int, chunk_ratio: int, *, differencing: bool) -> int:
    """Return the number of BAT entries (2.5): a sector bitmap entry follows every `chunk_ratio` payload entries.

    The last chunk needs its bitmap entry only in a differencing disk.
    """
    if differencing:
        return -(-blocks // chunk_ratio) * (chunk_ratio + 1)
    return blocks + max(blocks - 1, 0) // chunk_ratio
