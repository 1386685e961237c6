"""Every structure of a qcow2 file, declared once, for reading and for writing.

Sections are those of QEMU's docs/interop/qcow2.txt. All numbers are big-endian.
"""

from __future__ import annotations

import numpy as np
from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

MAGIC = b"QFI\xfb"
V2_LENGTH = 72
V3_LENGTH = 104
WRITTEN_LENGTH = 112

# "Header": bytes 0..71, of every version.
HEADER = Struct(
    "magic" / Const(MAGIC),  # 0
    "version" / Int32ub,  # 4: 2 or 3
    "backing_offset" / Int64ub,  # 8: of the backing file's name; 0: none
    "backing_length" / Int32ub,  # 16: of the name, at most 1023
    "cluster_bits" / Int32ub,  # 20: 9..21
    "size" / Int64ub,  # 24: the disk's, in bytes
    "crypt_method" / Int32ub,  # 32: 0 none, 1 AES, 2 LUKS
    "l1_size" / Int32ub,  # 36: entries of the active L1 table
    "l1_offset" / Int64ub,  # 40
    "refcount_offset" / Int64ub,  # 48: of the refcount table
    "refcount_clusters" / Int32ub,  # 56: clusters of the refcount table
    "snapshot_count" / Int32ub,  # 60
    "snapshot_offset" / Int64ub,  # 64
)

# "Header": bytes 72..103, of version 3 and later.
HEADER_V3 = Struct(
    "incompatible" / Int64ub,  # 72
    "compatible" / Int64ub,  # 80
    "autoclear" / Int64ub,  # 88
    "refcount_order" / Int32ub,  # 96: a refcount has 1 << order bits, order 0..6
    "header_length" / Int32ub,  # 100: at least 104, a multiple of 8
)

# "Additional fields": there if header_length says so.
HEADER_MORE = Struct(
    "compression" / Int8ub,  # 104: 0 deflate, 1 zstd; valid with incompatible bit 3
    Padding(7),
)

# "Header extensions": padded to a multiple of 8.
EXTENSION = Struct(
    "type" / Int32ub,
    "length" / Int32ub,  # of the data, without padding
)
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

# "Feature name table": one entry for each named bit.
FEATURE_NAME = Struct(
    "type" / Int8ub,  # 0 incompatible, 1 compatible, 2 autoclear
    "bit" / Int8ub,
    "name" / Bytes(46),  # padded with zeroes
)

# "Bitmaps extension".
BITMAPS = Struct(
    "count" / Int32ub,
    "reserved" / Int32ub,
    "directory_size" / Int64ub,  # bytes
    "directory_offset" / Int64ub,
)

# "Bitmap directory": entries of variable length, padded to a multiple of 8.
BITMAP_ENTRY = Struct(
    "table_offset" / Int64ub,
    "table_size" / Int32ub,  # entries of the bitmap table
    "flags" / Int32ub,  # bit 0 in use, 1 auto, 2 extra data compatible
    "type" / Int8ub,  # 1: dirty tracking
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_size" / Int32ub,
)

# "Full disk encryption header pointer".
CRYPTO = Struct(
    "offset" / Int64ub,
    "length" / Int64ub,
)

# "Snapshots": entries of variable length, each beginning on a multiple of 8.
SNAPSHOT = Struct(
    "l1_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_size" / Int16ub,
    "name_size" / Int16ub,
    "seconds" / Int32ub,
    "nanoseconds" / Int32ub,
    "clock" / Int64ub,  # the guest's, in nanoseconds
    "vm_state_size" / Int32ub,
    "extra_size" / Int32ub,
)
SNAPSHOT_EXTRA = Struct(  # as much of it as extra_size says
    "vm_state_size" / Int64ub,
    "disk_size" / Int64ub,  # version 3 has it
)

# "Incompatible features", "Compatible features", "Autoclear features".
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
LAZY_REFCOUNTS = 1
AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW = 1, 2

FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)

# "L1 table", "L2 table", "Refcount table", "Bitmap table": arrays of this, the hot tables.
ENTRY = np.dtype(">u8")
ENTRY_STRUCT = Int64ub
# "Extended L2 Entries".
EXTENDED_ENTRY = np.dtype([("entry", ">u8"), ("bitmap", ">u8")])
EXTENDED_STRUCT = Struct(
    "entry" / Int64ub,
    "bitmap" / Int64ub,  # 0..31 allocated, 32..63 reads as zero, one bit a subcluster
)

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO_FLAG = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
TABLE_RESERVED = 0x1FF
"""Of a refcount table's entry."""
BITMAP_TABLE_RESERVED = 0xFF00_0000_0000_01FE

SUBCLUSTERS = 32
ALL_ALLOCATED = 0x0000_0000_FFFF_FFFF
ALL_ZERO = 0xFFFF_FFFF_0000_0000

CLUSTER_BITS = (9, 21)
EXTENDED_LEAST = 1 << 14
L1_MOST = 32 << 20
"""Bytes of an L1 table that QEMU opens."""
REFCOUNT_TABLE_MOST = 8 << 20
BACKING_NAME_MOST = 1023
CRYPT_AES, CRYPT_LUKS = 1, 2
CRYPT_METHODS = {CRYPT_AES: "AES", CRYPT_LUKS: "LUKS"}
COMPRESSIONS = ("zlib", "zstd")


def refcount_dtype(bits: int) -> np.dtype[np.unsignedinteger]:
    """Return how refcounts of `bits` (8 and more) lie in a block; narrower ones are packed from the lowest bit."""
    return np.dtype({8: "u1", 16: ">u2", 32: ">u4", 64: ">u8"}[bits])
