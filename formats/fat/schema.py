"""The structures of FAT12, FAT16 and FAT32 (Microsoft, "FAT: General Overview of On-Disk Format", 1.03)."""

from __future__ import annotations

import numpy as np
from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Padding, Struct

SECTOR = 512

# "Boot Sector and BPB": of every FAT.
BPB = Struct(
    "jump" / Bytes(3),
    "oem" / Bytes(8),
    "bytes_per_sector" / Int16ul,  # 11
    "sectors_per_cluster" / Int8ul,
    "reserved_sectors" / Int16ul,  # before the first FAT
    "fats" / Int8ul,  # 16
    "root_entries" / Int16ul,  # FAT32: 0
    "total_sectors_16" / Int16ul,
    "media" / Int8ul,
    "fat_sectors_16" / Int16ul,  # 22; FAT32: 0
    "sectors_per_track" / Int16ul,
    "heads" / Int16ul,
    "hidden_sectors" / Int32ul,  # 28: before the partition
    "total_sectors_32" / Int32ul,  # 32
)

# From byte 36 of a FAT12 or FAT16.
EXTENDED_16 = Struct(
    "drive" / Int8ul,
    Padding(1),
    "signature" / Const(0x29, Int8ul),
    "volume_id" / Int32ul,
    "label" / Bytes(11),
    "type" / Bytes(8),
)

# From byte 36 of a FAT32.
EXTENDED_32 = Struct(
    "fat_sectors" / Int32ul,
    "flags" / Int16ul,  # bits 0-3: the active FAT where bit 7 is set
    "version" / Int16ul,
    "root_cluster" / Int32ul,  # 44
    "info_sector" / Int16ul,
    "backup_sector" / Int16ul,
    Padding(12),
    "drive" / Int8ul,  # 64
    Padding(1),
    "signature" / Int8ul,
    "volume_id" / Int32ul,
    "label" / Bytes(11),
    "type" / Bytes(8),
)

# "FSInfo Sector Structure".
INFO = Struct(
    "lead" / Const(0x41615252, Int32ul),
    Padding(480),
    "structure" / Const(0x61417272, Int32ul),
    "free" / Int32ul,  # clusters
    "next" / Int32ul,  # where to look for a free one
    Padding(12),
    "trail" / Const(0xAA550000, Int32ul),
)

# "FAT Directory Structure".
DIRENT = Struct(
    "name" / Bytes(11),
    "attributes" / Int8ul,
    "case" / Int8ul,  # Windows NT: 8 the name, 16 the suffix is in small letters
    "created_tenths" / Int8ul,
    "created_time" / Int16ul,
    "created_date" / Int16ul,
    "accessed_date" / Int16ul,
    "cluster_hi" / Int16ul,
    "time" / Int16ul,  # hours << 11 | minutes << 5 | seconds / 2
    "date" / Int16ul,  # (year - 1980) << 9 | month << 5 | day
    "cluster_lo" / Int16ul,
    "size" / Int32ul,
)
DIRENT_ROW = np.dtype(
    [
        ("name", "V11"),
        ("attributes", "u1"),
        ("case", "u1"),
        ("created_tenths", "u1"),
        ("created_time", "<u2"),
        ("created_date", "<u2"),
        ("accessed_date", "<u2"),
        ("cluster_hi", "<u2"),
        ("time", "<u2"),
        ("date", "<u2"),
        ("cluster_lo", "<u2"),
        ("size", "<u4"),
    ]
)
# "FAT Long Directory Entries": before the short one, the last part first.
LONG = Struct(
    "order" / Int8ul,  # from 1; 0x40 is set in the last part
    "first" / Bytes(10),
    "attributes" / Const(0x0F, Int8ul),
    "kind" / Const(0, Int8ul),
    "checksum" / Int8ul,  # of the short name
    "middle" / Bytes(12),
    "cluster" / Const(0, Int16ul),
    "last" / Bytes(4),
)
READ_ONLY, HIDDEN, SYSTEM, VOLUME, DIRECTORY, ARCHIVE = 1, 2, 4, 8, 16, 32
LONG_NAME = 0x0F
LONG_UNITS = 13
DELETED, LAST = 0xE5, 0

LEAST_16, LEAST_32 = 4085, 65525  # clusters that make a FAT16, a FAT32
MOST_32 = 0x0FFFFFF5


def bits_of(clusters: int) -> int:
    """Return 12, 16 or 32: which FAT a volume of so many clusters is; nothing else decides."""
    if clusters < LEAST_16:
        return 12
    return 16 if clusters < LEAST_32 else 32


def short_checksum(name: bytes) -> int:
    """Return the checksum of a short name of 11 bytes that its long entries carry."""
    found = 0
    for byte in name:
        found = ((found >> 1) + ((found & 1) << 7) + byte) & 0xFF
    return found
