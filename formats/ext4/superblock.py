"""Builds superblocks, the journal and the inode that keeps room for growing (kernel docs, "The Super Block")."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.checksum import inode_seeds, start
from diskmorph.formats.ext4.geometry import BLOCK, FLEX, GROUP_BLOCKS, Geometry, backup_groups, journal_blocks
from diskmorph.formats.ext4.segments import SEGMENT, build_tree, cut, tree_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.ext4.groups import GroupTables
    from diskmorph.formats.ext4.image import Canvas, Contents
    from diskmorph.formats.ext4.inodes import InodeTable

_POINTERS = BLOCK // 4  # in a block
_DOUBLE = 13  # place of the doubly indirect block among the 15 words
_COMPAT = s.HAS_JOURNAL | s.EXT_ATTR | s.RESIZE_INODE | s.DIR_INDEX
_INCOMPAT = s.FILETYPE | s.EXTENTS | s.BIT64 | s.FLEX_BG
_RO_COMPAT = s.SPARSE_SUPER | s.LARGE_FILE | s.HUGE_FILE | s.DIR_NLINK | s.EXTRA_ISIZE | s.METADATA_CSUM
_SIGNED_HASH = 1
_USER_XATTR_ACL = 0xC


def _reserved_inode(contents: Contents, table: InodeTable, number: int, size: int, sectors: int) -> None:
    row = np.zeros(1, s.INODE_ROW)
    row["mode"], row["links_count"], row["extra_isize"] = stat.S_IFREG | 0o600, 1, s.EXTRA_ISIZE_BYTES
    row["size_lo"], row["size_hi"], row["blocks_lo"] = size & 0xFFFFFFFF, size >> 32, sectors
    for name in ("atime", "ctime", "mtime", "crtime"):
        row[name] = contents.now & 0xFFFFFFFF
    table.fields[number - 1 : number] = row


def journal_extents(geometry: Geometry) -> NDArray[np.void]:
    """Return where the journal lies, SEGMENT rows with block numbers: at the start of the data line."""
    length = np.array([journal_blocks(geometry.blocks)])
    _, begin, count = cut(np.array([0]), length, geometry.run_positions)
    extents = np.zeros(len(begin), SEGMENT)
    extents["block"], extents["at"], extents["count"] = begin, geometry.blocks_of(begin), count
    return extents


def line_reserved(geometry: Geometry) -> int:
    """Return how many blocks of the data line come before the tree's.

    They are the journal, the resize inode's block, and the tree blocks of the journal, in this order.
    """
    return journal_blocks(geometry.blocks) + 1 + tree_blocks(len(journal_extents(geometry)))


def put_journal(
    contents: Contents, geometry: Geometry, table: InodeTable, seed: int, canvas: Canvas
) -> NDArray[np.uint32]:
    """Lay an empty journal; return the 17 words that the superblock keeps of it."""
    blocks = journal_blocks(geometry.blocks)
    extents = journal_extents(geometry)
    places = geometry.blocks_of(np.arange(blocks + 1, line_reserved(geometry))).tolist()
    size = blocks * BLOCK
    _reserved_inode(contents, table, s.JOURNAL_INO, size, (blocks + len(places)) * BLOCK // 512)
    own = int(inode_seeds(seed, np.array([s.JOURNAL_INO]))[0])
    words = build_tree(extents, places, own, lambda at, data: canvas.put_small(at * BLOCK, data))
    table.words()[s.JOURNAL_INO - 1] = words
    table.fields["flags"][s.JOURNAL_INO - 1] |= s.EXTENTS_FL
    head = s.JOURNAL_SUPER.build(
        {
            "header": {"blocktype": s.J_SUPER_V2, "sequence": 0},
            "blocksize": BLOCK,
            "maxlen": blocks,
            "first": 1,
            "sequence": 1,
            "start": 0,
            "errno": 0,
            "feature_compat": 0,
            "feature_incompat": 0,
            "feature_ro_compat": 0,
            "uuid": contents.uuid,
            "nr_users": 1,
            "dynsuper": 0,
            "max_transaction": 0,
            "max_trans_data": 0,
            "checksum_type": 0,
            "num_fc_blocks": 0,
            "head": 0,
            "checksum": 0,
            "users": bytes(768),
        }
    )
    canvas.put_small(int(extents["at"][0]) * BLOCK, head)
    return np.concatenate((words, np.array([size >> 32, size & 0xFFFFFFFF], np.uint32)))


def put_resize(contents: Contents, geometry: Geometry, table: InodeTable, canvas: Canvas) -> None:
    """Lay the resize inode.

    Its doubly indirect block points to the reserved descriptor blocks, which point to their copies in other groups.
    """
    place = int(geometry.blocks_of(np.array([journal_blocks(geometry.blocks)]))[0])
    groups = backup_groups(geometry.groups)
    pointers = np.zeros(_POINTERS, "<u4")
    for number in range(geometry.reserved_gdt):
        block = 1 + geometry.gdt_blocks + number
        pointers[(geometry.gdt_blocks + number) % _POINTERS] = block
        copies = np.zeros(_POINTERS, "<u4")
        copies[: len(groups)] = np.array(groups, np.int64) * GROUP_BLOCKS + block
        canvas.put_small(block * BLOCK, copies.tobytes())
    canvas.put_small(place * BLOCK, pointers.tobytes())
    size = (_POINTERS * _POINTERS + _POINTERS + 12) * BLOCK
    blocks = 1 + geometry.reserved_gdt * (1 + len(groups))
    _reserved_inode(contents, table, s.RESIZE_INO, size, blocks * BLOCK // 512)
    table.words()[s.RESIZE_INO - 1, _DOUBLE] = place


def build_super(contents: Contents, geometry: Geometry, groups: GroupTables, journal: NDArray[np.uint32]) -> bytes:
    """Return the superblock, 1024 bytes."""
    now = contents.now & 0xFFFFFFFF
    reserved = min(geometry.blocks * contents.reserved // 100, groups.free_blocks // 2)
    return _sealed(
        {
            **_NOTHING,
            "inodes_count": geometry.inodes,
            "blocks_count_lo": geometry.blocks & 0xFFFFFFFF,
            "blocks_count_hi": geometry.blocks >> 32,
            "r_blocks_count_lo": reserved & 0xFFFFFFFF,
            "r_blocks_count_hi": reserved >> 32,
            "free_blocks_count_lo": groups.free_blocks & 0xFFFFFFFF,
            "free_blocks_count_hi": groups.free_blocks >> 32,
            "free_inodes_count": groups.free_inodes,
            "log_block_size": 2,
            "log_cluster_size": 2,
            "blocks_per_group": GROUP_BLOCKS,
            "clusters_per_group": GROUP_BLOCKS,
            "inodes_per_group": geometry.inodes_per_group,
            "wtime": now,
            "max_mnt_count": 0xFFFF,
            "magic": s.MAGIC,
            "state": 1,
            "errors": 1,
            "lastcheck": now,
            "rev_level": 1,
            "first_ino": s.FIRST_INO,
            "inode_size": s.INODE_LARGE,
            "feature_compat": _COMPAT,
            "feature_incompat": _INCOMPAT,
            "feature_ro_compat": _RO_COMPAT,
            "uuid": contents.uuid,
            "volume_name": contents.label[:16].ljust(16, b"\0"),
            "reserved_gdt_blocks": geometry.reserved_gdt,
            "journal_inum": s.JOURNAL_INO,
            "hash_seed": contents.hash_seed,
            "def_hash_version": 1,
            "jnl_backup_type": 1,
            "desc_size": s.GROUP_ROW.itemsize,
            "default_mount_opts": _USER_XATTR_ACL,
            "mkfs_time": now,
            "jnl_blocks": journal.tolist(),
            "min_extra_isize": s.EXTRA_ISIZE_BYTES,
            "want_extra_isize": s.EXTRA_ISIZE_BYTES,
            "flags": _SIGNED_HASH,
            "log_groups_per_flex": FLEX.bit_length() - 1,
            "checksum_type": 1,
        }
    )


_NOTHING: dict[str, object] = {
    field.name: field.parse(bytes(field.sizeof())) for field in s.SUPER.subcons if field.name is not None
}


def _sealed(values: dict[str, object]) -> bytes:
    body = s.SUPER.build(values)
    return body[:-4] + start(body[:-4]).to_bytes(4, "little")


def copy_of_super(main: bytes, group: int) -> bytes:
    """Return the superblock's copy in a group."""
    values = dict(s.SUPER.parse(main))
    values["block_group_nr"] = group & 0xFFFF
    return _sealed(values)
