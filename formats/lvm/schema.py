"""LVM2 on disk: label, physical volume header, header of a metadata area. Little-endian.

lvm2's lib/label/label.h (label), lib/format_text/layout.h (everything else). Offsets and sizes in bytes, from the start
of the physical volume, but where sectors are said.
"""

from __future__ import annotations

import zlib

from construct import Bytes, GreedyRange, Int32ul, Int64ul, NullTerminated, Struct

SECTOR = 512
LABEL_SECTORS = 4  # the label lies in one of the first four sectors
LABEL_MAGIC, LABEL_TYPE = b"LABELONE", b"LVM2 001"

# label.h, struct label_header
LABEL = Struct(
    "magic" / Bytes(8),
    "sector" / Int64ul,  # where this label lies
    "crc" / Int32ul,  # of the rest of the sector, from `offset`
    "offset" / Int32ul,  # of what follows, from the label's start
    "type" / Bytes(8),
)
LABEL_CRC_FROM = 20

# layout.h, struct disk_locn: lists of them end with one whose offset is 0
LOCATION = Struct("offset" / Int64ul, "size" / Int64ul)
_LIST = NullTerminated(GreedyRange(LOCATION), term=bytes(LOCATION.sizeof()))

# layout.h, struct pv_header
PV = Struct(
    "uuid" / Bytes(32),
    "size" / Int64ul,  # of the device
    "data" / _LIST,  # where extents lie; size 0: up to the end
    "metadata" / _LIST,  # where metadata areas lie
)

# layout.h, struct raw_locn: where in the area a text lies; the first is the one committed
TEXT = Struct(
    "offset" / Int64ul,  # from the area's start; 0: there is none
    "size" / Int64ul,
    "crc" / Int32ul,
    "flags" / Int32ul,
)
IGNORED = 0x1  # TEXT.flags: the area is not in use

# layout.h, struct mda_header: the first sector of a metadata area; texts lie in the ring behind it
AREA = Struct(
    "crc" / Int32ul,  # of the rest of the sector
    "magic" / Bytes(16),
    "version" / Int32ul,
    "start" / Int64ul,  # where this area lies
    "size" / Int64ul,
    "committed" / TEXT,
    "precommitted" / TEXT,
)
AREA_MAGIC = b" LVM2 x[5A%r0N*>"
AREA_VERSION = 1

_CRC_BEGIN = 0xF597A6CF


def crc_of(data: bytes) -> int:
    """Return lvm2's CRC (lib/misc/crc.c): CRC-32 begun with a number of its own, and not inverted at the end."""
    return zlib.crc32(data, _CRC_BEGIN ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
