"""Builds block and inode bitmaps and the group descriptors (kernel docs, "Block and Inode Bitmaps")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import TargetError
from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.checksum import chain, chain_rows
from diskmorph.formats.ext4.geometry import BLOCK, GROUP_BLOCKS, Geometry, backup_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.ext4.inodes import InodeTable

_BATCH = 64  # groups whose bitmaps are made at once


@dataclass
class GroupTables:
    """Descriptors of all groups; bitmaps by group, where they are not left to be made when first needed."""

    descriptors: NDArray[np.void]
    block_bitmaps: dict[int, bytes]
    inode_bitmaps: dict[int, bytes]
    free_blocks: int
    free_inodes: int


def build_groups(geometry: Geometry, table: InodeTable, used: NDArray[np.int64], seed: int) -> GroupTables:
    """Return everything that stands in bitmaps and descriptors; `used`: ranges of blocks (first, count)."""
    rows = np.zeros(geometry.groups, s.GROUP_ROW)
    for name, places in (
        ("block_bitmap", geometry.block_bitmaps),
        ("inode_bitmap", geometry.inode_bitmaps),
        ("inode_table", geometry.inode_tables),
    ):
        rows[name + "_lo"], rows[name + "_hi"] = places & 0xFFFFFFFF, places >> 32
    rows["flags"] = s.INODE_ZEROED
    block_bitmaps = _blocks(geometry, rows, used, seed)
    inode_bitmaps = _inodes(geometry, rows, table, seed)
    whole = np.zeros((geometry.groups, 4), np.uint8)
    whole.view("<u4")[:, 0] = np.arange(geometry.groups)
    sums = chain_rows(chain_rows(seed, whole), rows.view(np.uint8).reshape(geometry.groups, -1))
    rows["checksum"] = sums & 0xFFFF
    return GroupTables(
        rows,
        block_bitmaps,
        inode_bitmaps,
        _total(rows, "free_blocks_count"),
        _total(rows, "free_inodes_count"),
    )


def _total(rows: NDArray[np.void], name: str) -> int:
    return int(rows[name + "_lo"].sum(dtype=np.int64)) + (int(rows[name + "_hi"].sum(dtype=np.int64)) << 16)


def _set(rows: NDArray[np.void], name: str, values: NDArray[np.int64]) -> None:
    rows[name + "_lo"], rows[name + "_hi"] = values & 0xFFFF, values >> 16


def _blocks(geometry: Geometry, rows: NDArray[np.void], used: NDArray[np.int64], seed: int) -> dict[int, bytes]:
    sizes = np.full(geometry.groups, GROUP_BLOCKS, np.int64)
    sizes[-1] = geometry.group_size(geometry.groups - 1)
    ranges = np.concatenate((used, _fixed(geometry)))
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    group = ranges[:, 0] // GROUP_BLOCKS
    taken = np.bincount(group, weights=ranges[:, 1], minlength=geometry.groups).astype(np.int64)
    _set(rows, "free_blocks_count", sizes - taken)
    explicit = geometry.foreign.copy()
    explicit[used[:, 0] // GROUP_BLOCKS] = True
    explicit[[0, -1]] = True
    rows["flags"] |= np.where(explicit, 0, s.BLOCK_UNINIT).astype(np.uint16)
    bitmaps: dict[int, bytes] = {}
    numbers = np.flatnonzero(explicit)
    for at in range(0, len(numbers), _BATCH):
        chosen = numbers[at : at + _BATCH]
        bits = _marked(chosen, ranges, group)
        last = np.flatnonzero(chosen == geometry.groups - 1)
        if len(last):
            bits[last[0], int(sizes[-1]) :] = 1
        packed = np.packbits(bits, axis=1, bitorder="little")
        for number, bitmap in zip(chosen.tolist(), packed, strict=True):
            bitmaps[number] = data = bitmap.tobytes()
            _set(rows[number : number + 1], "block_bitmap_csum", np.array([chain(seed, data)]))
    return bitmaps


def _marked(chosen: NDArray[np.int64], ranges: NDArray[np.int64], group: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return which blocks of some groups (ascending) are in use, shape (n, blocks of a group)."""
    steps = np.zeros((len(chosen), GROUP_BLOCKS + 1), np.int8)
    place = np.minimum(np.searchsorted(chosen, group), len(chosen) - 1)
    mine = np.flatnonzero(chosen[place] == group)
    begin = ranges[mine, 0] - group[mine] * GROUP_BLOCKS
    np.add.at(steps, (place[mine], begin), 1)
    np.add.at(steps, (place[mine], begin + ranges[mine, 1]), -1)
    marked: NDArray[np.uint8] = np.cumsum(steps[:, :-1], axis=1, dtype=np.int8).view(np.uint8)
    if marked.max(initial=0) > 1:
        raise AssertionError("a block of the file system is used twice")
    return marked


def _fixed(geometry: Geometry) -> NDArray[np.int64]:
    """Return the ranges of superblocks, descriptors, bitmaps and inode tables."""
    heads = np.array([0, *backup_groups(geometry.groups)], np.int64)
    length = 1 + geometry.gdt_blocks + geometry.reserved_gdt
    ones = np.ones(geometry.groups, np.int64)
    return np.concatenate(
        (
            np.column_stack((heads * GROUP_BLOCKS, np.full(len(heads), length))),
            np.column_stack((geometry.block_bitmaps, ones)),
            np.column_stack((geometry.inode_bitmaps, ones)),
            np.column_stack((geometry.inode_tables, ones * geometry.table_blocks)),
        )
    )


def _inodes(geometry: Geometry, rows: NDArray[np.void], table: InodeTable, seed: int) -> dict[int, bytes]:
    per = geometry.inodes_per_group
    last = int(np.flatnonzero(table.used)[-1]) + 1
    if last > geometry.inodes:
        raise TargetError("the file system has too few inodes", expected=last, found=geometry.inodes)
    _set(rows, "free_inodes_count", np.full(geometry.groups, per, np.int64))
    _set(rows, "itable_unused", np.full(geometry.groups, per, np.int64))
    rows["flags"] |= s.INODE_UNINIT
    bitmaps: dict[int, bytes] = {}
    for group in range(-(-last // per)):
        used = table.used[group * per : (group + 1) * per]
        count = int(used.sum())
        one = rows[group : group + 1]
        if not count:
            continue
        one["flags"] &= ~np.uint16(s.INODE_UNINIT)
        bits = np.ones(BLOCK * 8, np.uint8)
        bits[:per] = 0
        bits[: len(used)] = used
        bitmaps[group] = data = np.packbits(bits, bitorder="little").tobytes()
        _set(one, "inode_bitmap_csum", np.array([chain(seed, data[: per // 8])]))
        _set(one, "free_inodes_count", np.array([per - count]))
        _set(one, "itable_unused", np.array([per - int(np.flatnonzero(used)[-1]) - 1]))
        _set(one, "used_dirs_count", np.array([int(table.directories[group * per : (group + 1) * per].sum())]))
    return bitmaps
