"""MBR and GPT on disk, as bytes: declarations for reading and writing, and the names of partition types.

MBR: the PC convention, as UEFI 2.10, 5.2 writes it down. GPT: UEFI 2.10, 5.3. All numbers are little-endian; GUIDs are
mixed-endian (`uuid.UUID.bytes_le`). LBAs count logical sectors of the disk, 512 or 4096 bytes.
"""

from __future__ import annotations

import numpy as np
from construct import Array, Bytes, Const, Default, Int8ul, Int32ul, Int64ul, Struct

# UEFI 2.10, table 5.2: one of four 16-byte records from byte 446 of the MBR, or of an extended boot record.
MBR_ENTRY = Struct(
    "status" / Default(Int8ul, 0),  # 0x80: active (bootable); 0: not; anything else: no partition table
    "first_chs" / Default(Bytes(3), b"\0\x02\0"),  # head, sector and cylinder; only BIOSes before LBA look at them
    "type" / Default(Int8ul, 0),  # 0: unused; 0xEE: protective; 5, 0xF, 0x85: extended
    "last_chs" / Default(Bytes(3), b"\xff\xff\xff"),
    "start" / Default(Int32ul, 0),  # sectors; of a logical partition from its own boot record
    "count" / Default(Int32ul, 0),  # sectors
)

# UEFI 2.10, table 5.1: the first sector (of any sector size, its first 512 bytes).
MBR = Struct(
    "code" / Default(Bytes(440), bytes(440)),
    "disk_id" / Default(Int32ul, 0),
    "reserved" / Default(Bytes(2), bytes(2)),
    "entries" / Array(4, MBR_ENTRY),
    "signature" / Const(b"\x55\xaa"),
)

# UEFI 2.10, table 5.5: in LBA 1, its backup in the last LBA.
GPT_HEADER = Struct(
    "signature" / Const(b"EFI PART"),
    "revision" / Default(Int32ul, 0x00010000),
    "header_size" / Default(Int32ul, 92),  # bytes that the checksum covers
    "header_crc" / Default(Int32ul, 0),  # CRC-32 of the header with this field as zero
    "reserved" / Default(Int32ul, 0),
    "my_lba" / Int64ul,
    "alternate_lba" / Int64ul,
    "first_usable" / Int64ul,
    "last_usable" / Int64ul,  # inclusive
    "disk_guid" / Bytes(16),
    "entries_lba" / Int64ul,
    "entry_count" / Default(Int32ul, 128),
    "entry_size" / Default(Int32ul, 128),  # 128 * 2^n
    "entries_crc" / Int32ul,  # CRC-32 of entry_count * entry_size bytes
)

# UEFI 2.10, table 5.6.
GPT_ENTRY = Struct(
    "type" / Bytes(16),  # all zeroes: unused
    "guid" / Bytes(16),
    "first" / Int64ul,  # LBA
    "last" / Int64ul,  # LBA, inclusive
    "attributes" / Int64ul,  # bit 0: required; 1: no block I/O; 2: legacy BIOS bootable; 48-63: the type's own
    "name" / Bytes(72),  # UTF-16LE, padded with zeroes
)

# The same as GPT_ENTRY, for whole tables.
GPT_ENTRY_DTYPE = np.dtype(
    [
        ("type", "V16"),
        ("guid", "V16"),
        ("first", "<u8"),
        ("last", "<u8"),
        ("attributes", "<u8"),
        ("name", "V72"),
    ]
)

LEGACY_BOOTABLE = 1 << 2
PROTECTIVE = 0xEE
EXTENDED = frozenset({0x05, 0x0F, 0x85, 0xC5, 0xD5})

__all__ = [
    "EXTENDED",
    "GPT_ENTRY",
    "GPT_ENTRY_DTYPE",
    "GPT_HEADER",
    "LEGACY_BOOTABLE",
    "MBR",
    "MBR_ENTRY",
    "PROTECTIVE",
]
