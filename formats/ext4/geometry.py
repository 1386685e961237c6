"""Where the fixed parts of an ext4 file system lie, and what remains for data (kernel docs, "Layout").

The remainder is seen as one line of blocks, the data line: position 0 is the first free block of the first group.
Positions become block numbers by `Geometry.blocks_of`; so a tree can be laid out before the size is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.errors import TargetError
from diskmorph.formats.ext4.schema import INODE_LARGE

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 4096
GROUP_BLOCKS = 8 * BLOCK
FLEX = 16  # groups whose bitmaps and inode tables lie together (flex_bg)
_DESCRIPTORS = BLOCK // 64  # in a block
_INODES = BLOCK // INODE_LARGE  # in a block
_RATIO = 16 << 10  # bytes for each inode, as mke2fs has it
_GROWTH = 1024  # how many times larger resize_inode lets the file system become
_MOST_INODES = (1 << 32) - (1 << 24)
_MOST_BLOCKS = 1 << 32  # beyond, resize_inode cannot point
_LAST_GROUP = 50  # blocks that a last group must have beside its own overhead, else it is left out

# Journal blocks by the file system's blocks, as mke2fs has them.
_JOURNAL = ((32768, 1024), (256 << 10, 4096), (512 << 10, 8192), (4 << 20, 16384), (8 << 20, 32768), (16 << 20, 65536))


def journal_blocks(blocks: int) -> int:
    """Return how long the journal of a file system of `blocks` blocks is."""
    return next((length for most, length in _JOURNAL if blocks < most), 131072)


def backup_groups(groups: int) -> list[int]:
    """Return the groups beside the first that hold a copy of superblock and descriptors: 1, powers of 3, 5, 7."""
    found = {1} if groups > 1 else set()
    for base in (3, 5, 7):
        power = base
        while power < groups:
            found.add(power)
            power *= base
    return sorted(found)


@dataclass(frozen=True)
class Geometry:
    """The fixed layout of a file system of `blocks` blocks in `groups` groups.

    `block_bitmaps`, `inode_bitmaps`, `inode_tables`: a block number for each group. `run_starts`, `run_positions`: the
    free runs, each within one group: its first block and its place on the data line, which has `free` blocks.
    `foreign`: groups that hold bitmaps or tables, perhaps of other groups.
    """

    blocks: int
    groups: int
    inodes_per_group: int
    gdt_blocks: int
    reserved_gdt: int
    block_bitmaps: NDArray[np.int64]
    inode_bitmaps: NDArray[np.int64]
    inode_tables: NDArray[np.int64]
    run_starts: NDArray[np.int64]
    run_positions: NDArray[np.int64]
    free: int
    foreign: NDArray[np.bool_]

    @property
    def table_blocks(self) -> int:
        """Blocks of one group's inode table."""
        return self.inodes_per_group // _INODES

    @property
    def inodes(self) -> int:
        """Inodes of the whole file system."""
        return self.inodes_per_group * self.groups

    def blocks_of(self, positions: NDArray[Any]) -> NDArray[np.int64]:
        """Return the block numbers of positions on the data line."""
        run = np.searchsorted(self.run_positions, positions, side="right") - 1
        return np.asarray(self.run_starts[run] + (positions - self.run_positions[run]), np.int64)

    def group_size(self, group: int) -> int:
        """Return how many blocks a group has: the last may be short."""
        return min(GROUP_BLOCKS, self.blocks - group * GROUP_BLOCKS)

    def head(self, group: int) -> int:
        """Return how many blocks a group's copies of superblock and descriptors take, those for growth included."""
        return 1 + self.gdt_blocks + self.reserved_gdt if group == 0 or group in set(backup_groups(self.groups)) else 0


def lay_out(blocks: int, inodes: int) -> Geometry:
    """Return the layout of at most `blocks` blocks with at least `inodes` inodes. Raises TargetError: too small."""
    while True:
        groups = -(-blocks // GROUP_BLOCKS)
        gdt = -(-groups // _DESCRIPTORS)
        reserved = _reserved(blocks, gdt)
        per_group = -(-max(inodes, _INODES) // (max(groups, 1) * _INODES)) * _INODES
        backups = set(backup_groups(groups))
        last = blocks % GROUP_BLOCKS
        head = 1 + gdt + reserved
        overhead = 2 + per_group // _INODES + (head if groups - 1 in backups | {0} else 0)
        if blocks < 64 or per_group > GROUP_BLOCKS or (groups == 1 and last and last < overhead):
            raise TargetError("the file system would be too small for what comes into it", expected="more blocks")
        if groups > 1 and last and last < overhead + _LAST_GROUP:
            blocks -= last
            continue
        return _place(blocks, groups, per_group, gdt, reserved, backups | {0})


def _reserved(blocks: int, gdt: int) -> int:
    most = min(blocks * _GROWTH, _MOST_BLOCKS - 1)
    groups = -(-most // GROUP_BLOCKS)
    return max(0, min(-(-groups // _DESCRIPTORS) - gdt, BLOCK // 4))


def _place(blocks: int, groups: int, per_group: int, gdt: int, reserved: int, heads: set[int]) -> Geometry:
    block_bitmaps: NDArray[np.int64] = np.zeros(groups, np.int64)
    inode_bitmaps, tables = block_bitmaps.copy(), block_bitmaps.copy()
    foreign = np.zeros(groups, np.bool_)
    starts: list[int] = []
    lengths: list[int] = []
    for first in range(0, groups, FLEX):
        members = range(first, min(first + FLEX, groups))
        runs = []
        for group in members:
            begin = group * GROUP_BLOCKS + (1 + gdt + reserved if group in heads else 0)
            runs.append([begin, min((group + 1) * GROUP_BLOCKS, blocks)])
        for where, length in ((block_bitmaps, 1), (inode_bitmaps, 1), (tables, per_group // _INODES)):
            for group in members:
                place = _take(runs, length)
                where[group] = place
                foreign[place // GROUP_BLOCKS] = foreign[(place + length - 1) // GROUP_BLOCKS] = True
        for begin, end in runs:
            if end > begin:
                starts.append(begin)
                lengths.append(end - begin)
    positions = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return Geometry(
        blocks=blocks,
        groups=groups,
        inodes_per_group=per_group,
        gdt_blocks=gdt,
        reserved_gdt=reserved,
        block_bitmaps=block_bitmaps,
        inode_bitmaps=inode_bitmaps,
        inode_tables=tables,
        run_starts=np.array(starts, np.int64),
        run_positions=positions[:-1],
        free=int(positions[-1]),
        foreign=foreign,
    )


def _take(runs: list[list[int]], length: int) -> int:
    for run in runs:
        if run[1] - run[0] >= length:
            run[0] += length
            return run[0] - length
    raise TargetError("the file system would be too small for its own tables", expected="more blocks")


def sized(size: int, inodes: int) -> Geometry:
    """Return the layout of a file system of at most `size` bytes that can hold `inodes` inodes."""
    return lay_out(size // BLOCK, max(inodes, min(size // _RATIO, _MOST_INODES)))


def smallest(needed: int, inodes: int, slack: int = 0) -> Geometry:
    """Return the smallest layout with `needed` blocks on the data line beside the journal, and `slack` bytes free."""
    wanted = needed + -(-slack // BLOCK)
    blocks = wanted + journal_blocks(wanted) + 64
    while True:
        count = max(inodes, blocks * BLOCK // _RATIO)
        try:
            found = lay_out(blocks, count)
        except TargetError:
            if blocks > _MOST_BLOCKS:
                raise
            blocks += max(64, count // _INODES // 8)
            continue
        lacking = wanted + journal_blocks(found.blocks) - found.free
        if lacking <= 0:
            return found
        blocks = max(blocks, found.blocks) + max(lacking, 16)
