"""ISO 9660 (ECMA-119), Joliet and El Torito on disk. Rock Ridge entries: see susp.py and rockridge.py.

Numbers "both" are stored in both byte orders, little first (ECMA-119 7.3.3); the little one is believed.
"""

from __future__ import annotations

from typing import Any

from construct import (
    Bytes,
    Const,
    ExprAdapter,
    Int8sb,
    Int8ub,
    Int16ub,
    Int16ul,
    Int32ub,
    Int32ul,
    Padding,
    Struct,
    this,
)

SECTOR = 2048
FIRST_DESCRIPTOR = 16  # ECMA-119 6.2.1: the system area takes sectors 0 to 15
LAST_DESCRIPTOR = 256  # a set without terminator ends here

BOOT_RECORD, PRIMARY, SUPPLEMENTARY, PARTITION, TERMINATOR = 0, 1, 2, 3, 255
JOLIET_ESCAPES = (b"%/@", b"%/C", b"%/E")  # Joliet: UCS-2 levels 1 to 3

# File flags, ECMA-119 9.1.6
HIDDEN, DIRECTORY, ASSOCIATED, MORE_EXTENTS = 1, 2, 4, 128


def _both(little: Any, big: Any) -> Any:
    pair = Struct("little" / little, "big" / big)
    return ExprAdapter(pair, lambda obj, _: obj.little, lambda value, _: {"little": value, "big": value})


Both16 = _both(Int16ul, Int16ub)
Both32 = _both(Int32ul, Int32ub)

# ECMA-119 9.1.5: numerical date and time of 7 bytes
RecordTime = Struct(
    "year" / Int8ub,  # since 1900
    "month" / Int8ub,
    "day" / Int8ub,
    "hour" / Int8ub,
    "minute" / Int8ub,
    "second" / Int8ub,
    "zone" / Int8sb,  # quarters of an hour east of Greenwich
)

# ECMA-119 9.1: a directory record
DirectoryRecord = Struct(
    "length" / Int8ub,  # of the whole record; 0: the next record begins in the next sector
    "attribute_length" / Int8ub,  # extended attribute record before the data, in blocks
    "extent" / Both32,  # first logical block
    "size" / Both32,  # bytes of this extent
    "time" / RecordTime,
    "flags" / Int8ub,
    "unit_size" / Int8ub,  # interleaved files only
    "gap_size" / Int8ub,
    "volume" / Both16,
    "name_length" / Int8ub,
    "name" / Bytes(this.name_length),
    "pad" / Bytes(1 - this.name_length % 2),  # the system use area begins on an even byte
)

# The fixed part of a directory record as a table row; a test holds it against DirectoryRecord.
RECORD = [
    ("length", "u1"),
    ("attribute_length", "u1"),
    ("extent", "<u4"),
    ("extent_big", ">u4"),
    ("size", "<u4"),
    ("size_big", ">u4"),
    ("time", "u1", (6,)),
    ("zone", "i1"),
    ("flags", "u1"),
    ("unit_size", "u1"),
    ("gap_size", "u1"),
    ("volume", "<u2"),
    ("volume_big", ">u2"),
    ("name_length", "u1"),
]
RECORD_SIZE = 33

# ECMA-119 8.4.26.1: digits, and the offset from Greenwich
VolumeTime = Struct("digits" / Bytes(16), "zone" / Int8sb)

# ECMA-119 8.4 and 8.5: primary and supplementary volume descriptors
VolumeDescriptor = Struct(
    "type" / Int8ub,
    "identifier" / Const(b"CD001"),
    "version" / Int8ub,
    "flags" / Int8ub,
    "system_id" / Bytes(32),
    "volume_id" / Bytes(32),
    Padding(8),
    "blocks" / Both32,  # logical blocks of the volume
    "escapes" / Bytes(32),  # supplementary only
    "set_size" / Both16,
    "sequence" / Both16,
    "block_size" / Both16,
    "path_table_size" / Both32,
    "path_table_l" / Int32ul,
    "path_table_l_copy" / Int32ul,
    "path_table_m" / Int32ub,
    "path_table_m_copy" / Int32ub,
    "root" / Bytes(34),  # a DirectoryRecord
    "volume_set_id" / Bytes(128),
    "publisher_id" / Bytes(128),
    "preparer_id" / Bytes(128),
    "application_id" / Bytes(128),
    "copyright_file" / Bytes(37),
    "abstract_file" / Bytes(37),
    "bibliographic_file" / Bytes(37),
    "created" / VolumeTime,
    "modified" / VolumeTime,
    "expires" / VolumeTime,
    "effective" / VolumeTime,
    "structure_version" / Int8ub,
    Padding(1),
    "application_use" / Bytes(512),
    Padding(653),
)

# El Torito 2.0: boot record volume descriptor
BootRecord = Struct(
    "type" / Const(b"\0"),
    "identifier" / Const(b"CD001"),
    "version" / Const(b"\1"),
    "system" / Const(b"EL TORITO SPECIFICATION".ljust(32, b"\0")),
    Padding(32),
    "catalog" / Int32ul,  # sector of the boot catalogue
    Padding(1973),
)

Terminator = Struct("type" / Const(b"\xff"), "identifier" / Const(b"CD001"), "version" / Const(b"\1"), Padding(2041))

PLATFORM_BIOS, PLATFORM_EFI = 0, 0xEF
PLATFORMS = {0: "BIOS", 1: "PowerPC", 2: "Mac", 0xEF: "EFI"}

# El Torito 2.1: validation entry; the sum of its 16-bit words is 0
ValidationEntry = Struct(
    "header" / Const(b"\1"),
    "platform" / Int8ub,
    Padding(2),
    "developer" / Bytes(24),
    "checksum" / Int16ul,
    "key" / Const(b"\x55\xaa"),
)

# El Torito 2.2 and 2.4: initial and section entries
BootEntry = Struct(
    "indicator" / Int8ub,  # 0x88: bootable
    "media" / Int8ub,  # low nibble 0: no emulation
    "segment" / Int16ul,  # 0: the usual 0x7c0
    "system_type" / Int8ub,
    Padding(1),
    "sectors" / Int16ul,  # sectors of 512 bytes that the firmware loads
    "extent" / Int32ul,  # first logical block of the image
    "selection" / Bytes(20),
)

# El Torito 2.3: section header
SectionHeader = Struct(
    "indicator" / Int8ub,  # 0x90: more follow, 0x91: the last
    "platform" / Int8ub,
    "entries" / Int16ul,
    "id" / Bytes(28),
)

# ECMA-119 9.4: path table record, least significant byte first ("L") and most ("M")
PathRecordL = Struct(
    "name_length" / Int8ub,
    "attribute_length" / Int8ub,
    "extent" / Int32ul,
    "parent" / Int16ul,
    "name" / Bytes(this.name_length),
    "pad" / Bytes(this.name_length % 2),
)
PathRecordM = Struct(
    "name_length" / Int8ub,
    "attribute_length" / Int8ub,
    "extent" / Int32ub,
    "parent" / Int16ub,
    "name" / Bytes(this.name_length),
    "pad" / Bytes(this.name_length % 2),
)

# The start of a FAT file system (an EFI image): only what tells its size
BootSector = Struct(
    Padding(11),
    "sector_size" / Int16ul,
    Padding(6),
    "sectors_16" / Int16ul,  # 0: see sectors_32
    Padding(11),
    "sectors_32" / Int32ul,
)

# zisofs: the header of a compressed file (libisofs doc/zisofs_format.txt, version 1)
ZisofsHeader = Struct(
    "magic" / Const(b"\x37\xe4\x53\x96\xc9\xdb\xd6\x07"),
    "size" / Int32ul,  # decoded
    "header_words" / Int8ub,  # header size in units of 4 bytes
    "block_log2" / Int8ub,
    Padding(2),
)

# System use entries (SUSP 5, RRIP 4) as they are written; reading is susp.py's, by tables
PosixAttributes = Struct(  # RRIP 4.1.1
    "header" / Const(b"PX\x2c\x01"),
    "mode" / Both32,
    "links" / Both32,
    "uid" / Both32,
    "gid" / Both32,
    "serial" / Both32,
)
DeviceNumber = Struct("header" / Const(b"PN\x14\x01"), "high" / Both32, "low" / Both32)  # RRIP 4.1.2
Continuation = Struct(  # SUSP 5.1
    "header" / Const(b"CE\x1c\x01"), "block" / Both32, "offset" / Both32, "length" / Both32
)
Extension = Struct(  # SUSP 5.5: which extension is used
    "signature" / Const(b"ER"),
    "length" / Int8ub,
    "version" / Const(b"\x01"),
    "id_length" / Int8ub,
    "description_length" / Int8ub,
    "source_length" / Int8ub,
    "extension_version" / Const(b"\x01"),
    "id" / Bytes(this.id_length),
    "description" / Bytes(this.description_length),
    "source" / Bytes(this.source_length),
)
SHARING_PROTOCOL = b"SP\x07\x01\xbe\xef\x00"  # SUSP 5.3
