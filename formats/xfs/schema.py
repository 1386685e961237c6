"""The structures of XFS (XFS Algorithms & Data Structures, 3rd edition). Big-endian, but for checksums.

Structures of version 5 describe themselves: each has its place, its owner and a CRC-32C of itself.
"""

from __future__ import annotations

import struct

import numpy as np
from construct import Bytes, Int8ub, Int16ub, Int32ub, Int32ul, Int64ub, Struct

# "Superblocks" (13.1): at the start of every allocation group.
SUPER = Struct(
    "magic" / Bytes(4),  # XFSB
    "blocksize" / Int32ub,
    "dblocks" / Int64ub,  # 8: blocks for data and metadata
    "rblocks" / Int64ub,
    "rextents" / Int64ub,
    "uuid" / Bytes(16),  # 32
    "logstart" / Int64ub,  # 48: block of the log; 0: the log lies on another device
    "rootino" / Int64ub,
    "rbmino" / Int64ub,  # 64
    "rsumino" / Int64ub,
    "rextsize" / Int32ub,  # 80
    "agblocks" / Int32ub,  # blocks of an allocation group
    "agcount" / Int32ub,
    "rbmblocks" / Int32ub,
    "logblocks" / Int32ub,  # 96
    "versionnum" / Int16ub,  # low four bits: 4 or 5
    "sectsize" / Int16ub,
    "inodesize" / Int16ub,  # 104
    "inopblock" / Int16ub,
    "fname" / Bytes(12),
    "blocklog" / Int8ub,  # 120
    "sectlog" / Int8ub,
    "inodelog" / Int8ub,
    "inopblog" / Int8ub,
    "agblklog" / Int8ub,  # 124: bits that a block number within a group takes
    "rextslog" / Int8ub,
    "inprogress" / Int8ub,
    "imax_pct" / Int8ub,
    "icount" / Int64ub,  # 128
    "ifree" / Int64ub,
    "fdblocks" / Int64ub,
    "frextents" / Int64ub,
    "uquotino" / Int64ub,  # 160
    "gquotino" / Int64ub,
    "qflags" / Int16ub,
    "flags" / Int8ub,
    "shared_vn" / Int8ub,
    "inoalignmt" / Int32ub,  # 180
    "unit" / Int32ub,
    "width" / Int32ub,
    "dirblklog" / Int8ub,  # 192: a directory block has 1 << this blocks
    "logsectlog" / Int8ub,
    "logsectsize" / Int16ub,
    "logsunit" / Int32ub,
    "features2" / Int32ub,  # 200
    "bad_features2" / Int32ub,
    "features_compat" / Int32ub,
    "features_ro_compat" / Int32ub,
    "features_incompat" / Int32ub,  # 216
    "features_log_incompat" / Int32ub,
    "crc" / Int32ul,  # 224
    "spino_align" / Int32ub,
    "pquotino" / Int64ub,
    "lsn" / Int64ub,
    "meta_uuid" / Bytes(16),  # 248: what metadata carry, with the feature META_UUID
)
SUPER_CRC = 224
DIRV2, FTYPE_V4 = 0x2000, 0x200  # versionnum, features2
INCOMPAT = {
    0x1: "ftype",
    0x2: "sparse inodes",
    0x4: "meta_uuid",
    0x8: "bigtime",
    0x20: "nrext64",
    0x40: "exchange-range",
    0x80: "parent pointers",
}
INCOMPAT_NAMES = {0x10: "needsrepair", 0x100: "metadir", 0x200: "zoned", 0x400: "zone gaps"}
FTYPE = 0x1

# "On-disk Inode" (14.1): the core, 100 bytes in version 2, 176 in version 3; the forks follow.
INODE = Struct(
    "magic" / Bytes(2),  # IN
    "mode" / Int16ub,
    "version" / Int8ub,
    "format" / Int8ub,  # of the data fork
    "onlink" / Int16ub,
    "uid" / Int32ub,  # 8
    "gid" / Int32ub,
    "nlink" / Int32ub,  # 16
    "projid" / Bytes(4),
    "big_nextents" / Int64ub,  # 24: extents of the data fork, with NREXT64; else unused
    "atime" / Int64ub,
    "mtime" / Int64ub,  # 40: seconds and nanoseconds, or with BIGTIME nanoseconds since 1901
    "ctime" / Int64ub,
    "size" / Int64ub,  # 56
    "nblocks" / Int64ub,
    "extsize" / Int32ub,  # 72
    "nextents" / Int32ub,  # with NREXT64: extents of the attribute fork
    "anextents" / Int16ub,  # 80
    "forkoff" / Int8ub,  # where the attribute fork begins, in 8 bytes behind the core; 0: there is none
    "aformat" / Int8ub,
    "dmevmask" / Int32ub,
    "dmstate" / Int16ub,
    "flags" / Int16ub,  # 90
    "gen" / Int32ub,
    "next_unlinked" / Int32ub,  # 96
)
INODE_V3 = Struct(
    "crc" / Int32ul,  # 100
    "changecount" / Int64ub,
    "lsn" / Int64ub,
    "flags2" / Int64ub,  # 120
    "cowextsize" / Int32ub,
    "padding" / Bytes(12),
    "crtime" / Int64ub,  # 144
    "ino" / Int64ub,
    "uuid" / Bytes(16),
)
# The same by one call for each inode; a test holds it against the two.
INODE_FAST = struct.Struct(">2sHBBHIII4xQ8xq8xQQ4xIHBB4x2xHI")
INODE_CRC, INODE_FLAGS2, INODE_INO = 100, 120, 152
CORE_V2, CORE_V3 = 100, 176
DEV, LOCAL, EXTENTS, BTREE = 0, 1, 2, 3  # formats of forks
REALTIME = 0x1  # flags
BIGTIME, NREXT64 = 0x8, 0x10  # flags2
BIGTIME_EPOCH = 1 << 31  # seconds before 1970

# "Extent List" (17.1): 128 bits: unwritten 1, file block 54, block 52, count 21.
EXTENT_ROW = np.dtype([("high", ">u8"), ("low", ">u8")])

# Headers of blocks: where each kind's own CRC lies, and how long it is.
BTREE_LONG_V4, BTREE_LONG_V5 = 24, 72  # "Long Format B+trees": level and records at 4 and 6
BTREE_CRC, BTREE_OWNER = 64, 56
DIR_DATA_V4, DIR_DATA_V5 = 16, 64  # "Directories", block and data blocks: entries begin there
DIR_CRC, DIR_OWNER = 4, 40
DIRENT_FIXED = 9  # inode number, length of the name
ATTR_LEAF_V4, ATTR_LEAF_V5 = 32, 80  # "Attribute leaves": entries of 8 bytes begin there
ATTR_NODE_V4, ATTR_NODE_V5 = 16, 64
ATTR_CRC, ATTR_OWNER = 12, 48
REMOTE_HEADER = 56  # "Remote attribute values", "Symbolic links" of version 5
REMOTE_CRC, REMOTE_OWNER = 12, 32

MAGIC_BMAP = {4: b"BMAP", 5: b"BMA3"}
MAGIC_DIR_BLOCK = {4: b"XD2B", 5: b"XDB3"}
MAGIC_DIR_DATA = {4: b"XD2D", 5: b"XDD3"}
MAGIC_ATTR_LEAF = {4: b"\xfb\xee", 5: b"\x3b\xee"}
MAGIC_ATTR_NODE = {4: b"\xfe\xbe", 5: b"\x3e\xbe"}
MAGIC_SYMLINK, MAGIC_REMOTE = b"XSLM", b"XARM"
DIR_LEAF_OFFSET = 1 << 35  # bytes of a directory; beyond lie hashes and free space

# Attributes' flags
ATTR_LOCAL, ATTR_ROOT, ATTR_SECURE, ATTR_PARENT, ATTR_INCOMPLETE = 0x1, 0x2, 0x4, 0x8, 0x80
ACL_ROW = np.dtype([("tag", ">u4"), ("id", ">u4"), ("perm", ">u2"), ("padding", ">u2")])
ACL_NAMES = {b"SGI_ACL_FILE": b"system.posix_acl_access", b"SGI_ACL_DEFAULT": b"system.posix_acl_default"}

# "Log Record Header": 512 bytes at the start of each record; every block of the log begins with its cycle.
LOG_RECORD = Struct(
    "magic" / Int32ub,
    "cycle" / Int32ub,
    "version" / Int32ub,
    "length" / Int32ub,  # bytes that follow the header
    "lsn" / Int64ub,
    "tail_lsn" / Int64ub,
    "crc" / Int32ul,
    "prev_block" / Int32ub,
    "num_logops" / Int32ub,  # 40
    "cycle_data" / Bytes(256),
    "format" / Int32ub,  # 300
    "fs_uuid" / Bytes(16),
    "size" / Int32ub,  # 320: of log buffers; headers take a block for each 32 KiB of it
)
LOG_MAGIC = 0xFEEDBABE
LOG_UNMOUNT = 0x20  # flags of an operation header
