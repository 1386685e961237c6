"""The structures of btrfs (btrfs documentation, "On-disk Format"; include/uapi/linux/btrfs_tree.h). Little-endian.

Everything but the superblock lies in trees of items; an item's key says what it is of what.
"""

from __future__ import annotations

import struct

import numpy as np
from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64sl, Int64ul, Struct

SUPER_OFFSETS = (64 << 10, 64 << 20, 256 << 30)
SUPER_SIZE = 4096
MAGIC = b"_BHRfS_M"

# "Superblock"
SUPER = Struct(
    "csum" / Bytes(32),  # of all that follows
    "fsid" / Bytes(16),
    "bytenr" / Int64ul,  # 0x30: where this copy lies
    "flags" / Int64ul,
    "magic" / Bytes(8),  # 0x40
    "generation" / Int64ul,
    "root" / Int64ul,  # 0x50: logical address of the tree of trees
    "chunk_root" / Int64ul,
    "log_root" / Int64ul,  # 0x60: what was synced since the last commit; 0: nothing
    "log_root_transid" / Int64ul,
    "total_bytes" / Int64ul,  # 0x70
    "bytes_used" / Int64ul,
    "root_dir_objectid" / Int64ul,  # 0x80
    "num_devices" / Int64ul,
    "sectorsize" / Int32ul,  # 0x90
    "nodesize" / Int32ul,
    "leafsize" / Int32ul,
    "stripesize" / Int32ul,
    "sys_chunk_array_size" / Int32ul,  # 0xA0
    "chunk_root_generation" / Int64ul,
    "compat_flags" / Int64ul,
    "compat_ro_flags" / Int64ul,
    "incompat_flags" / Int64ul,  # 0xBC
    "csum_type" / Int16ul,
    "root_level" / Int8ul,
    "chunk_root_level" / Int8ul,
    "log_root_level" / Int8ul,
    "dev_item" / Bytes(98),  # 0xC9
    "label" / Bytes(256),  # 0x12B
    "cache_generation" / Int64ul,
    "uuid_tree_generation" / Int64ul,
    "metadata_uuid" / Bytes(16),
    "reserved" / Bytes(224),
    "sys_chunk_array" / Bytes(2048),  # 0x32B: keys and chunks, enough to read the chunk tree
    "root_backups" / Bytes(672),
    "padding" / Bytes(565),
)
CRC32C, XXHASH64, SHA256, BLAKE2B = range(4)  # csum_type
INCOMPAT = {
    0x1: "mixed backrefs",
    0x2: "default subvolume",
    0x4: "mixed groups",
    0x8: "lzo",
    0x10: "zstd",
    0x20: "big metadata",
    0x40: "extended inode references",
    0x80: "raid56",
    0x100: "skinny metadata",
    0x200: "no holes",
    0x400: "metadata uuid",
    0x800: "raid1c34",
    0x10000: "simple quotas",
}
INCOMPAT_NAMES = {0x1000: "zoned", 0x2000: "extent tree v2", 0x4000: "raid stripe tree"}

# "Keys"
KEY = Struct("objectid" / Int64ul, "type" / Int8ul, "offset" / Int64ul)
KEY_SIZE = 17

# "Nodes": header, then in leaves items whose data lie from the end, in inner nodes pointers.
HEADER = Struct(
    "csum" / Bytes(32),
    "fsid" / Bytes(16),
    "bytenr" / Int64ul,  # 48
    "flags" / Int64ul,
    "chunk_tree_uuid" / Bytes(16),
    "generation" / Int64ul,  # 80
    "owner" / Int64ul,
    "nritems" / Int32ul,  # 96
    "level" / Int8ul,
)
HEADER_SIZE = 101
CSUM_SIZE = 32
ITEM_ROW = np.dtype(
    [("objectid", "<u8"), ("type", "u1"), ("key", "<u8"), ("offset", "<u4"), ("size", "<u4")]
)  # offset: of the data, from the header's end
POINTER_ROW = np.dtype([("objectid", "<u8"), ("type", "u1"), ("key", "<u8"), ("block", "<u8"), ("generation", "<u8")])

# Types of items
INODE_ITEM, XATTR_ITEM, DIR_ITEM, DIR_INDEX, EXTENT_DATA, ROOT_ITEM, CHUNK_ITEM = 1, 24, 84, 96, 108, 132, 228
ROOT_REF = 156
# Trees and other objects
CHUNK_TREE, FS_TREE, ROOT_TREE_DIR, FIRST_FREE = 3, 5, 6, 256

# "Chunk item": from logical to physical addresses; stripes follow.
CHUNK = Struct(
    "length" / Int64ul,
    "owner" / Int64ul,
    "stripe_len" / Int64ul,
    "type" / Int64ul,
    "io_align" / Int32ul,
    "io_width" / Int32ul,
    "sector_size" / Int32ul,
    "num_stripes" / Int16ul,
    "sub_stripes" / Int16ul,
)
STRIPE = Struct("devid" / Int64ul, "offset" / Int64ul, "dev_uuid" / Bytes(16))
DEVICE_ID = struct.Struct("<Q")  # what a device item begins with
METADATA_ONLY = 1 << 33 | 1 << 34  # superblock's flags: an image made by btrfs-image
STRIPED = 0x8 | 0x40 | 0x80 | 0x100  # RAID0, RAID10, RAID5, RAID6

# "Inode item": 160 bytes; what is needed of it by one call, held against this by a test.
INODE = Struct(
    "generation" / Int64ul,
    "transid" / Int64ul,
    "size" / Int64ul,  # 16
    "nbytes" / Int64ul,
    "block_group" / Int64ul,
    "nlink" / Int32ul,  # 40
    "uid" / Int32ul,
    "gid" / Int32ul,
    "mode" / Int32ul,  # 52
    "rdev" / Int64ul,
    "flags" / Int64ul,
    "sequence" / Int64ul,
    "reserved" / Bytes(32),
    "atime" / Bytes(12),
    "ctime" / Bytes(12),
    "mtime_sec" / Int64sl,  # 136
    "mtime_nsec" / Int32ul,
    "otime" / Bytes(12),
)
INODE_FAST = struct.Struct("<16xQ16xIIIIQ72xqI12x")

# "Root item": an inode item, then where the tree's root lies.
ROOT = Struct(
    "inode" / Bytes(160),
    "generation" / Int64ul,
    "root_dirid" / Int64ul,  # 168
    "bytenr" / Int64ul,
    "byte_limit" / Int64ul,
    "bytes_used" / Int64ul,
    "last_snapshot" / Int64ul,
    "flags" / Int64ul,
    "refs" / Int32ul,
    "drop_progress" / Bytes(17),
    "drop_level" / Int8ul,
    "level" / Int8ul,  # 238
)

# "Root ref": which directory of which tree holds a subvolume; the name follows.
ROOT_REFERENCE = struct.Struct("<QQH")  # directory, sequence, bytes of the name
# "Dir item", also of xattrs: name and data follow.
DIRENT = struct.Struct("<QBQQHHB")  # location (a key), transid, bytes of data and name, type
# "Extent data": the fixed part; inline data follow, or of other types the place.
EXTENT_HEAD = struct.Struct("<QQBBHB")  # generation, decoded bytes, compression, encryption, other, type
EXTENT_PLACE = struct.Struct("<QQQQ")  # logical address, stored bytes, bytes to skip, bytes
INLINE, REGULAR, PREALLOCATED = range(3)
NONE, ZLIB, LZO, ZSTD = range(4)
LARGEST_COMPRESSED = 128 << 10  # decoded bytes of one extent
LARGEST_WINDOW = 1 << 20  # of zstd; the kernel's are 128 KiB at most
