"""UDIF structures. There is no published specification: names follow libyal's "Mac OS disk image types".

All numbers are big-endian; a sector has 512 bytes.
"""

from __future__ import annotations

import numpy as np
from construct import Bytes, Const, Int32ub, Int64ub, Padding, Struct

from diskmorph.formats.extents import ADC, BZIP2, LZFSE, LZMA, PLAIN, ZLIB

SECTOR = 512

# A checksum: its kind, its bits, room for 1024 bits.
CHECKSUM = Struct("kind" / Int32ub, "bits" / Int32ub, "data" / Bytes(128))
CRC32 = 2

# "UDIF resource file": the last 512 bytes.
TRAILER = Struct(
    "magic" / Const(b"koly"),  # 0
    "version" / Int32ub,  # 4: 4
    "size" / Int32ub,  # 8: 512
    "flags" / Int32ub,  # 12
    "running_offset" / Int64ub,  # 16: of a segment's data in the whole
    "data_offset" / Int64ub,  # 24: the data fork
    "data_length" / Int64ub,  # 32
    "fork_offset" / Int64ub,  # 40: the resource fork, of old images
    "fork_length" / Int64ub,  # 48
    "segment" / Int32ub,  # 56
    "segments" / Int32ub,  # 60: 0 or 1 for an image in one file
    "segment_id" / Bytes(16),  # 64
    "data_checksum" / CHECKSUM,  # 80: of the data fork as it is stored
    "xml_offset" / Int64ub,  # 216: the property list
    "xml_length" / Int64ub,  # 224
    Padding(120),
    "master_checksum" / CHECKSUM,  # 352: of the checksums of all tables
    "variant" / Int32ub,  # 488
    "sectors" / Int64ub,  # 492: the disk's size
    Padding(12),
)
TRAILER_SIZE = TRAILER.sizeof()
VERSION = 4

MAGIC = b"koly\0\0\0\4\0\0\2\0"
ENCRYPTED = (b"encrcdsa", b"cdsaencr")

# "Block table" (BLKXTable): the chunks of one partition.
TABLE = Struct(
    "magic" / Const(b"mish"),  # 0
    "version" / Int32ub,  # 4: 1
    "first" / Int64ub,  # 8: sector of the disk that sector 0 of the table is
    "sectors" / Int64ub,  # 16
    "data_offset" / Int64ub,  # 24: added to every chunk's
    "buffers" / Int32ub,  # 32
    "descriptor" / Int32ub,  # 36
    Padding(24),
    "checksum" / CHECKSUM,  # 64: of what the chunks hold, decoded
    "chunks" / Int32ub,  # 200
)
TABLE_SIZE = TABLE.sizeof()

# "Block table entry" (BLKXChunkEntry).
CHUNK = np.dtype(
    [
        ("kind", ">u4"),
        ("comment", ">u4"),
        ("sector", ">u8"),  # of the table
        ("sectors", ">u8"),
        ("offset", ">u8"),  # bytes into the data fork
        ("stored", ">u8"),  # bytes
    ]
)
CHUNK_STRUCT = Struct(
    "kind" / Int32ub,
    "comment" / Int32ub,
    "sector" / Int64ub,
    "sectors" / Int64ub,
    "offset" / Int64ub,
    "stored" / Int64ub,
)

ZEROES, RAW, IGNORED = 0, 1, 2
COMMENT, TERMINATOR = 0x7FFF_FFFE, 0xFFFF_FFFF
CODECS = {
    RAW: PLAIN,
    0x8000_0004: ADC,
    0x8000_0005: ZLIB,
    0x8000_0006: BZIP2,
    0x8000_0007: LZFSE,
    0x8000_0008: LZMA,
}
VARIANTS = {PLAIN: "UDRO", ADC: "UDCO", ZLIB: "UDZO", BZIP2: "UDBZ", LZFSE: "ULFO", LZMA: "ULMO"}
"""What hdiutil calls images by the one codec of their chunks."""

# The resource fork's beginning: where its data lies in it, and how much.
FORK = Struct("data_offset" / Int32ub, "map_offset" / Int32ub, "data_length" / Int32ub, "map_length" / Int32ub)
