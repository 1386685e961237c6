"""EWF structures, by the names of libewf's "Expert Witness Compression Format". All numbers are little-endian."""

from __future__ import annotations

import numpy as np
from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

MAGIC = b"EVF\x09\x0d\x0a\xff\0"
OTHERS = {
    b"LVF\x09\x0d\x0a\xff\0": "logical evidence (L01)",
    b"EVF2\x0d\x0a\x81\0": "EWF version 2 (Ex01)",
    b"LEF2\x0d\x0a\x81\0": "logical evidence of EWF version 2 (Lx01)",
    b"ADCRYPT\0": "AD encryption",
}
"""What is known by its first 8 bytes, but not read."""

# "File header" of each segment file.
FILE_HEADER = Struct("magic" / Bytes(8), "one" / Int8ul, "number" / Int16ul, "zero" / Int16ul)
FILE_HEADER_SIZE = FILE_HEADER.sizeof()

# "Section descriptor"; the checksum is Adler-32 of what is before it.
SECTION = Struct("kind" / Bytes(16), "next" / Int64ul, "size" / Int64ul, Padding(40), "checksum" / Int32ul)
SECTION_SIZE = SECTION.sizeof()

# "Volume section" of EnCase, also "disk" and, at the beginning of further segments, "data".
VOLUME = Struct(
    "media" / Int8ul,  # 0
    Padding(3),
    "chunks" / Int32ul,  # 4
    "chunk_sectors" / Int32ul,  # 8
    "sector" / Int32ul,  # 12: bytes of a sector
    "sectors" / Int64ul,  # 16
    Padding(12),  # 24: cylinders, heads, sectors
    "flags" / Int8ul,  # 36
    Padding(27),  # 37: starts of PALM and SMART data, compression level, error granularity
    "set_id" / Bytes(16),  # 64: UUID of the segment files
    Padding(968),
    "checksum" / Int32ul,  # 1048
)
VOLUME_SIZE = VOLUME.sizeof()
MEDIA = {0: "removable", 1: "fixed", 3: "optical", 0x10: "memory"}

# The same of the first specification and of SMART.
OLD_VOLUME = Struct(
    Padding(4),
    "chunks" / Int32ul,  # 4
    "chunk_sectors" / Int32ul,  # 8
    "sector" / Int32ul,  # 12
    "sectors" / Int32ul,  # 16
    Padding(65),
    "signature" / Bytes(5),  # 85
    "checksum" / Int32ul,  # 90
)
OLD_VOLUME_SIZE = OLD_VOLUME.sizeof()

# "Table header": entries follow, and behind them, where a section "sectors" holds the chunks, their Adler-32.
TABLE = Struct("entries" / Int32ul, Padding(4), "base" / Int64ul, Padding(4), "checksum" / Int32ul)
TABLE_SIZE = TABLE.sizeof()
ENTRY = np.dtype("<u4")
ENTRY_STRUCT = Int32ul
PACKED = 1 << 31
"""Of an entry: the chunk is packed by zlib. Below it, its offset from the table's base."""
CHECKSUM = 4
"""Bytes of Adler-32 behind an entry table, and behind each chunk that is not packed."""

# "Hash section" and "Digest section".
HASH = Struct("md5" / Bytes(16), Padding(16), "checksum" / Int32ul)
DIGEST = Struct("md5" / Bytes(16), "sha1" / Bytes(20), Padding(40), "checksum" / Int32ul)

# "Error2 section": sectors that could not be read when the image was made.
ERRORS = Struct("entries" / Int32ul, Padding(512), "checksum" / Int32ul)
ERROR = np.dtype([("first", "<u4"), ("sectors", "<u4")])
ERROR_STRUCT = Struct("first" / Int32ul, "sectors" / Int32ul)
