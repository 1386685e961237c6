"""The structures of ext2, ext3 and ext4, declared once, for reading and for writing. Little-endian; jbd2's big-endian.

Sections are those of the kernel's Documentation/filesystems/ext4. Where there are thousands of a structure, a NumPy
dtype stands beside its Construct.
"""

from __future__ import annotations

import numpy as np
from construct import (
    Array,
    Bytes,
    Const,
    Int8ul,
    Int16ul,
    Int32ub,
    Int32ul,
    Int64ul,
    Padding,
    Struct,
)

MAGIC = 0xEF53
SUPER_OFFSET = 1024
SUPER_SIZE = 1024

# "The Super Block" (globals, 4.1): at byte 1024 of the file system, and copied to the start of some groups.
SUPER = Struct(
    "inodes_count" / Int32ul,  # 0x0
    "blocks_count_lo" / Int32ul,
    "r_blocks_count_lo" / Int32ul,  # kept for root
    "free_blocks_count_lo" / Int32ul,
    "free_inodes_count" / Int32ul,  # 0x10
    "first_data_block" / Int32ul,  # 1 where a block is 1 KiB, else 0
    "log_block_size" / Int32ul,  # a block has 1024 << log_block_size bytes
    "log_cluster_size" / Int32ul,
    "blocks_per_group" / Int32ul,  # 0x20
    "clusters_per_group" / Int32ul,
    "inodes_per_group" / Int32ul,
    "mtime" / Int32ul,
    "wtime" / Int32ul,  # 0x30
    "mnt_count" / Int16ul,
    "max_mnt_count" / Int16ul,
    "magic" / Int16ul,  # 0x38
    "state" / Int16ul,  # 1 unmounted cleanly, 2 errors found, 4 orphans being recovered
    "errors" / Int16ul,
    "minor_rev_level" / Int16ul,
    "lastcheck" / Int32ul,  # 0x40
    "checkinterval" / Int32ul,
    "creator_os" / Int32ul,  # 0 Linux, 1 Hurd
    "rev_level" / Int32ul,  # 0: 128-byte inodes, no features
    "def_resuid" / Int16ul,  # 0x50
    "def_resgid" / Int16ul,
    "first_ino" / Int32ul,  # first inode that is not reserved
    "inode_size" / Int16ul,
    "block_group_nr" / Int16ul,  # of the group that holds this copy
    "feature_compat" / Int32ul,
    "feature_incompat" / Int32ul,  # 0x60
    "feature_ro_compat" / Int32ul,
    "uuid" / Bytes(16),  # 0x68
    "volume_name" / Bytes(16),  # 0x78
    "last_mounted" / Bytes(64),  # 0x88
    "algorithm_usage_bitmap" / Int32ul,
    "prealloc_blocks" / Int8ul,
    "prealloc_dir_blocks" / Int8ul,
    "reserved_gdt_blocks" / Int16ul,  # blocks behind each copy of the group descriptors for growing
    "journal_uuid" / Bytes(16),  # 0xD0
    "journal_inum" / Int32ul,  # 0xE0
    "journal_dev" / Int32ul,
    "last_orphan" / Int32ul,
    "hash_seed" / Bytes(16),  # 0xEC
    "def_hash_version" / Int8ul,  # 1: half MD4
    "jnl_backup_type" / Int8ul,  # 1: jnl_blocks holds the journal inode's i_block and i_size
    "desc_size" / Int16ul,  # of a group descriptor, with the feature 64bit
    "default_mount_opts" / Int32ul,  # 0x100
    "first_meta_bg" / Int32ul,
    "mkfs_time" / Int32ul,
    "jnl_blocks" / Array(17, Int32ul),  # 0x10C
    "blocks_count_hi" / Int32ul,  # 0x150
    "r_blocks_count_hi" / Int32ul,
    "free_blocks_count_hi" / Int32ul,
    "min_extra_isize" / Int16ul,
    "want_extra_isize" / Int16ul,
    "flags" / Int32ul,  # 0x160; 1: signed hash of directory names
    "raid_stride" / Int16ul,
    "mmp_interval" / Int16ul,
    "mmp_block" / Int64ul,
    "raid_stripe_width" / Int32ul,  # 0x170
    "log_groups_per_flex" / Int8ul,
    "checksum_type" / Int8ul,  # 1: crc32c
    "encryption_level" / Int8ul,
    Padding(1),
    "kbytes_written" / Int64ul,
    "snapshot_inum" / Int32ul,  # 0x180
    "snapshot_id" / Int32ul,
    "snapshot_r_blocks_count" / Int64ul,
    "snapshot_list" / Int32ul,  # 0x190
    "error_fields" / Bytes(0x200 - 0x194),
    "mount_opts" / Bytes(64),  # 0x200
    "usr_quota_inum" / Int32ul,  # 0x240
    "grp_quota_inum" / Int32ul,
    "overhead_blocks" / Int32ul,
    "backup_bgs" / Array(2, Int32ul),
    "encrypt_algos" / Bytes(4),
    "encrypt_pw_salt" / Bytes(16),
    "lpf_ino" / Int32ul,  # 0x268
    "prj_quota_inum" / Int32ul,
    "checksum_seed" / Int32ul,  # 0x270, with the feature metadata_csum_seed
    "times_hi" / Bytes(8),
    "encoding" / Int16ul,
    "encoding_flags" / Int16ul,
    "orphan_file_inum" / Int32ul,  # 0x280
    "reserved" / Bytes(0x3FC - 0x284),
    "checksum" / Int32ul,  # 0x3FC: crc32c of all before
)

# Features ("The Super Block", feature bits).
COMPAT = {0x4: "has_journal", 0x8: "ext_attr", 0x10: "resize_inode", 0x20: "dir_index", 0x200: "sparse_super2"}
HAS_JOURNAL, EXT_ATTR, RESIZE_INODE, DIR_INDEX = 0x4, 0x8, 0x10, 0x20
INCOMPAT = {
    0x1: "compression",
    0x2: "filetype",
    0x4: "needs_recovery",
    0x8: "journal_dev",
    0x10: "meta_bg",
    0x40: "extent",
    0x80: "64bit",
    0x100: "mmp",
    0x200: "flex_bg",
    0x400: "ea_inode",
    0x1000: "dirdata",
    0x2000: "metadata_csum_seed",
    0x4000: "large_dir",
    0x8000: "inline_data",
    0x10000: "encrypt",
    0x20000: "casefold",
}
FILETYPE, RECOVER, META_BG, EXTENTS, BIT64, MMP, FLEX_BG = 0x2, 0x4, 0x10, 0x40, 0x80, 0x100, 0x200
EA_INODE, CSUM_SEED, LARGE_DIR, INLINE_DATA, CASEFOLD = 0x400, 0x2000, 0x4000, 0x8000, 0x20000
SPARSE_SUPER, LARGE_FILE, HUGE_FILE, GDT_CSUM, DIR_NLINK, EXTRA_ISIZE = 0x1, 0x2, 0x8, 0x10, 0x20, 0x40
BIGALLOC, METADATA_CSUM = 0x200, 0x400

# "Block Group Descriptors": 32 bytes, 64 with the feature 64bit (desc_size).
GROUP = Struct(
    "block_bitmap_lo" / Int32ul,
    "inode_bitmap_lo" / Int32ul,
    "inode_table_lo" / Int32ul,
    "free_blocks_count_lo" / Int16ul,
    "free_inodes_count_lo" / Int16ul,
    "used_dirs_count_lo" / Int16ul,  # 0x10
    "flags" / Int16ul,
    "exclude_bitmap_lo" / Int32ul,
    "block_bitmap_csum_lo" / Int16ul,
    "inode_bitmap_csum_lo" / Int16ul,
    "itable_unused_lo" / Int16ul,
    "checksum" / Int16ul,  # 0x1E
    "block_bitmap_hi" / Int32ul,  # 0x20
    "inode_bitmap_hi" / Int32ul,
    "inode_table_hi" / Int32ul,
    "free_blocks_count_hi" / Int16ul,
    "free_inodes_count_hi" / Int16ul,
    "used_dirs_count_hi" / Int16ul,  # 0x30
    "itable_unused_hi" / Int16ul,
    "exclude_bitmap_hi" / Int32ul,
    "block_bitmap_csum_hi" / Int16ul,
    "inode_bitmap_csum_hi" / Int16ul,
    Padding(4),
)
GROUP_ROW = np.dtype(
    [
        ("block_bitmap_lo", "<u4"),
        ("inode_bitmap_lo", "<u4"),
        ("inode_table_lo", "<u4"),
        ("free_blocks_count_lo", "<u2"),
        ("free_inodes_count_lo", "<u2"),
        ("used_dirs_count_lo", "<u2"),
        ("flags", "<u2"),
        ("exclude_bitmap_lo", "<u4"),
        ("block_bitmap_csum_lo", "<u2"),
        ("inode_bitmap_csum_lo", "<u2"),
        ("itable_unused_lo", "<u2"),
        ("checksum", "<u2"),
        ("block_bitmap_hi", "<u4"),
        ("inode_bitmap_hi", "<u4"),
        ("inode_table_hi", "<u4"),
        ("free_blocks_count_hi", "<u2"),
        ("free_inodes_count_hi", "<u2"),
        ("used_dirs_count_hi", "<u2"),
        ("itable_unused_hi", "<u2"),
        ("exclude_bitmap_hi", "<u4"),
        ("block_bitmap_csum_hi", "<u2"),
        ("inode_bitmap_csum_hi", "<u2"),
        ("padding", "<u4"),
    ]
)
INODE_UNINIT, BLOCK_UNINIT, INODE_ZEROED = 1, 2, 4  # flags

# "Index Nodes": 128 bytes, and `extra_isize` more where inodes are larger; in-inode xattrs fill the rest.
INODE = Struct(
    "mode" / Int16ul,
    "uid_lo" / Int16ul,
    "size_lo" / Int32ul,
    "atime" / Int32ul,  # seconds, signed
    "ctime" / Int32ul,
    "mtime" / Int32ul,  # 0x10
    "dtime" / Int32ul,
    "gid_lo" / Int16ul,
    "links_count" / Int16ul,
    "blocks_lo" / Int32ul,  # of 512 bytes, or of the file system's size with HUGE_FILE_FL
    "flags" / Int32ul,  # 0x20
    "version" / Int32ul,
    "block" / Bytes(60),  # 0x28: extent tree, block map, symbolic link, device number or inline data
    "generation" / Int32ul,  # 0x64
    "file_acl_lo" / Int32ul,  # block of xattrs
    "size_hi" / Int32ul,
    "obso_faddr" / Int32ul,
    "blocks_hi" / Int16ul,  # 0x74
    "file_acl_hi" / Int16ul,
    "uid_hi" / Int16ul,
    "gid_hi" / Int16ul,
    "checksum_lo" / Int16ul,  # 0x7C
    Padding(2),
    "extra_isize" / Int16ul,  # 0x80: bytes from here that are used
    "checksum_hi" / Int16ul,
    "ctime_extra" / Int32ul,  # two bits of epoch, thirty of nanoseconds
    "mtime_extra" / Int32ul,
    "atime_extra" / Int32ul,
    "crtime" / Int32ul,  # 0x90
    "crtime_extra" / Int32ul,
    "version_hi" / Int32ul,
    "projid" / Int32ul,
)
INODE_ROW = np.dtype(
    [
        ("mode", "<u2"),
        ("uid_lo", "<u2"),
        ("size_lo", "<u4"),
        ("atime", "<u4"),
        ("ctime", "<u4"),
        ("mtime", "<u4"),
        ("dtime", "<u4"),
        ("gid_lo", "<u2"),
        ("links_count", "<u2"),
        ("blocks_lo", "<u4"),
        ("flags", "<u4"),
        ("version", "<u4"),
        ("block", "u1", 60),
        ("generation", "<u4"),
        ("file_acl_lo", "<u4"),
        ("size_hi", "<u4"),
        ("obso_faddr", "<u4"),
        ("blocks_hi", "<u2"),
        ("file_acl_hi", "<u2"),
        ("uid_hi", "<u2"),
        ("gid_hi", "<u2"),
        ("checksum_lo", "<u2"),
        ("reserved", "<u2"),
        ("extra_isize", "<u2"),
        ("checksum_hi", "<u2"),
        ("ctime_extra", "<u4"),
        ("mtime_extra", "<u4"),
        ("atime_extra", "<u4"),
        ("crtime", "<u4"),
        ("crtime_extra", "<u4"),
        ("version_hi", "<u4"),
        ("projid", "<u4"),
    ]
)
INODE_LARGE = 256  # bytes, as written
OLD_INODE = 128
EXTRA_ISIZE_BYTES = INODE_ROW.itemsize - OLD_INODE  # 32
ROOT_INO, RESIZE_INO, JOURNAL_INO, FIRST_INO = 2, 7, 8, 11

MOST_LINKS = 65000  # names of one inode; directories with more say 1
MOST_SIZE = ((1 << 32) - 1) * 4096  # bytes of a file of 4 KiB blocks: their numbers in it have 32 bits
FIRST_TIME, LAST_TIME = -(1 << 31), (1 << 34) - (1 << 31) - 1  # seconds: what two bits of epoch reach
# flags
INDEX_FL, EXTENTS_FL, EA_INODE_FL, INLINE_DATA_FL = 0x1000, 0x80000, 0x200000, 0x10000000
HUGE_FILE_FL, ENCRYPT_FL, VERITY_FL, CASEFOLD_FL = 0x40000, 0x800, 0x100000, 0x40000000

# "Extent Tree": in an inode's block, or filling a block with a checksum behind the last entry.
EXTENT_HEADER = Struct(
    "magic" / Const(0xF30A, Int16ul),
    "entries" / Int16ul,
    "max" / Int16ul,
    "depth" / Int16ul,  # 0: extents follow; else indexes
    "generation" / Int32ul,
)
EXTENT_MAGIC = 0xF30A
EXTENT_HEADER_ROW = np.dtype(
    [("magic", "<u2"), ("entries", "<u2"), ("max", "<u2"), ("depth", "<u2"), ("generation", "<u4")]
)
EXTENT = Struct(
    "block" / Int32ul,  # first block of the file that it covers
    "length" / Int16ul,  # blocks; above 32768: that much more, not yet written, reads as zeroes
    "start_hi" / Int16ul,
    "start_lo" / Int32ul,
)
EXTENT_ROW = np.dtype([("block", "<u4"), ("length", "<u2"), ("start_hi", "<u2"), ("start_lo", "<u4")])
EXTENT_INDEX_ROW = np.dtype([("block", "<u4"), ("leaf_lo", "<u4"), ("leaf_hi", "<u2"), ("unused", "<u2")])
EXTENT_LONGEST = 32768

# "Directory Entries": names padded to 4 bytes; with metadata_csum a block ends in a tail that looks like an entry.
DIRENT = Struct(
    "inode" / Int32ul,  # 0: unused
    "rec_len" / Int16ul,
    "name_len" / Int8ul,
    "file_type" / Int8ul,
)
DIRENT_ROW = np.dtype([("inode", "<u4"), ("rec_len", "<u2"), ("name_len", "u1"), ("file_type", "u1")])
DIRENT_TAIL = Struct(
    "inode" / Const(0, Int32ul),
    "rec_len" / Const(12, Int16ul),
    "name_len" / Const(0, Int8ul),
    "file_type" / Const(0xDE, Int8ul),
    "checksum" / Int32ul,
)
# file_type, by the type bits of a mode >> 12
FILE_TYPES = {0o10: 1, 0o04: 2, 0o02: 3, 0o06: 4, 0o01: 5, 0o14: 6, 0o12: 7}

# "Hash Tree Directories": in the first block the entries of `.` and `..`, which takes the rest of it for readers that
# know no index, and the root; in further blocks an entry without a name, and a node. Then limit and entries by hash.
HALF_MD4 = 1
DX_ROOT = Struct(
    "dots" / Bytes(24),
    "reserved" / Const(0, Int32ul),
    "hash_version" / Int8ul,
    "info_length" / Const(8, Int8ul),
    "levels" / Int8ul,  # of nodes below the root
    "unused" / Const(0, Int8ul),
)
DX_NODE = Struct("inode" / Const(0, Int32ul), "rec_len" / Int16ul, "name_len" / Const(0, Int16ul))
DX_LIMIT = Struct("limit" / Int16ul, "count" / Int16ul)
DX_ENTRY = np.dtype([("hash", "<u4"), ("block", "<u4")])
DX_TAIL = Struct("reserved" / Const(0, Int32ul), "checksum" / Int32ul)
DX_CONTINUED = 1  # in a hash: the leaf before ends with names of the same

# "Extended Attributes": behind this in a block, or behind the magic alone in an inode.
XATTR_MAGIC = 0xEA020000
XATTR_HEADER = Struct(
    "magic" / Const(XATTR_MAGIC, Int32ul),
    "refcount" / Int32ul,  # inodes that share the block
    "blocks" / Const(1, Int32ul),
    "hash" / Int32ul,  # of all entries' hashes
    "checksum" / Int32ul,
    Padding(12),
)
XATTR_ENTRY = Struct(
    "name_len" / Int8ul,
    "name_index" / Int8ul,  # stands for the beginning of the name
    "value_offs" / Int16ul,  # from the block's start, or in an inode from the first entry
    "value_inum" / Int32ul,  # with ea_inode: the inode that holds the value
    "value_size" / Int32ul,
    "hash" / Int32ul,
)
XATTR_PREFIXES = {
    0: b"",
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
    7: b"system.",
    8: b"system.richacl",
}

# "Journal (jbd2)": every block begins with this header.
JOURNAL_MAGIC = 0xC03B3998
JOURNAL_HEADER = Struct("magic" / Const(JOURNAL_MAGIC, Int32ub), "blocktype" / Int32ub, "sequence" / Int32ub)
J_DESCRIPTOR, J_COMMIT, J_SUPER_V1, J_SUPER_V2, J_REVOKE = 1, 2, 3, 4, 5
JOURNAL_SUPER = Struct(
    "header" / JOURNAL_HEADER,
    "blocksize" / Int32ub,  # 0xC
    "maxlen" / Int32ub,  # blocks
    "first" / Int32ub,  # first block of the log
    "sequence" / Int32ub,  # first commit expected
    "start" / Int32ub,  # where the log starts; 0: it is empty
    "errno" / Int32ub,
    "feature_compat" / Int32ub,  # 0x24
    "feature_incompat" / Int32ub,
    "feature_ro_compat" / Int32ub,
    "uuid" / Bytes(16),  # 0x30
    "nr_users" / Int32ub,
    "dynsuper" / Int32ub,
    "max_transaction" / Int32ub,
    "max_trans_data" / Int32ub,
    "checksum_type" / Int8ul,  # 0x50
    Padding(3),
    "num_fc_blocks" / Int32ub,
    "head" / Int32ub,
    Padding(160),
    "checksum" / Int32ub,  # 0xFC
    "users" / Bytes(768),
)
J_REVOKES, J_64BIT, J_ASYNC_COMMIT, J_CSUM_V2, J_CSUM_V3, J_FAST_COMMIT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
J_ESCAPE, J_SAME_UUID, J_DELETED, J_LAST_TAG = 1, 2, 4, 8  # flags of a tag
