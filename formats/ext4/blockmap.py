"""Where a file's blocks lie: extent trees, and the indirect blocks of ext2 and ext3.

See the kernel's documentation, "The Contents of inode.i_block".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.checksum import chain, inode_seed
from diskmorph.formats.tree import Piece

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.errors import FormatError
    from diskmorph.formats.ext4.volume import Inode, Volume

_DEEPEST = 5  # levels of an extent tree (kernel: EXT4_MAX_EXTENT_DEPTH)
_DIRECT = 12
_HEADER = s.EXTENT_HEADER_ROW.itemsize


class Run(NamedTuple):
    """`length` blocks of a file from its block `block`, at block `at` of the file system; 0: written as zeroes."""

    block: int
    length: int
    at: int


def runs_of(volume: Volume, inode: Inode) -> list[Run]:
    """Return the runs of blocks of a file, ascending, those preallocated left out. Raises FormatError."""
    if inode.flags & s.EXTENTS_FL:
        found: list[Run] = []
        _walk_extents(volume, inode, inode.block, _DEEPEST + 1, found, set())
        return found
    return _indirect_runs(volume, inode)


def pieces_of(volume: Volume, inode: Inode) -> tuple[Piece, ...]:
    """Return a file's content as pieces of the file system's source, cut at the file's size."""
    size, block = inode.size, volume.block_size
    pieces = []
    for run in runs_of(volume, inode):
        start = run.block * block
        length = min(run.length * block, size - start)
        if length > 0:
            pieces.append(Piece(start, length, volume.source, run.at * block))
    return tuple(pieces)


def read_all(volume: Volume, inode: Inode, most: int) -> bytes:
    """Return the content of a small file (an xattr's value, a long symbolic link). Raises FormatError beyond `most`."""
    if inode.size > most:
        raise _damaged(volume, inode, "is too large for what it is", found=inode.size)
    out = bytearray(inode.size)
    for start, length, source, offset in pieces_of(volume, inode):
        out[start : start + length] = source.read(offset, length)
    return bytes(out)


def _damaged(volume: Volume, inode: Inode, problem: str, **values: object) -> FormatError:
    return volume.error(f"inode {inode.number} {problem}", "inode", 0, **values)


def _walk_extents(volume: Volume, inode: Inode, node: bytes, above: int, found: list[Run], seen: set[int]) -> None:
    """Append the extents of a tree node and all below it; `above` is the depth of the node above it."""
    magic, entries, most, depth, _ = np.frombuffer(node, s.EXTENT_HEADER_ROW, 1)[0].item()
    room = (len(node) - _HEADER) // s.EXTENT_ROW.itemsize
    if (
        magic != s.EXTENT_MAGIC
        or entries > most
        or most > room
        or depth >= above
        or (above <= _DEEPEST and depth != above - 1)
    ):
        raise _damaged(volume, inode, "has a damaged extent tree")
    if depth == 0:
        _leaf(volume, inode, np.frombuffer(node, s.EXTENT_ROW, entries, _HEADER), found)
        return
    for _, low, high, _ in np.frombuffer(node, s.EXTENT_INDEX_ROW, entries, _HEADER).tolist():
        block = low | high << 32
        if block in seen:
            raise _damaged(volume, inode, "has an extent tree that meets itself", found=block)
        seen.add(block)
        data = volume.read_block(block, "extent block")
        if volume.sums:
            _verify(volume, inode, data, block)
        _walk_extents(volume, inode, data, depth, found, seen)


def _verify(volume: Volume, inode: Inode, data: bytes, block: int) -> None:
    most = int.from_bytes(data[4:6], "little")
    end = _HEADER + most * s.EXTENT_ROW.itemsize
    seed = inode_seed(volume.seed, inode.number, inode.generation)
    if data[end : end + 4] != chain(seed, data[:end]).to_bytes(4, "little"):
        raise volume.error("an extent block is damaged", "extent block", block * volume.block_size, field="checksum")


def _leaf(volume: Volume, inode: Inode, rows: NDArray[np.void], found: list[Run]) -> None:
    reach = found[-1].block + found[-1].length if found else 0
    for block, length, high, low in rows.tolist():
        count = length if length <= s.EXTENT_LONGEST else length - s.EXTENT_LONGEST
        at = low | high << 32
        if block < reach or not count:
            raise _damaged(volume, inode, "has extents out of order", found=block)
        if at + count > volume.blocks or not at:
            raise volume.error(
                f"an extent of inode {inode.number} lies beyond the end of the file system",
                "extent",
                at * volume.block_size,
                expected=f"blocks below {volume.blocks}",
                found=f"{count} at {at}",
            )
        reach = block + count
        if length <= s.EXTENT_LONGEST:
            found.append(Run(block, count, at))


def _indirect_runs(volume: Volume, inode: Inode) -> list[Run]:
    """Return the runs of an inode with twelve direct blocks and trees of one, two and three levels."""
    words = np.frombuffer(inode.block, "<u4")
    per = volume.block_size // 4
    blocks = -(-inode.size // volume.block_size)
    parts = [(0, words[:_DIRECT].astype(np.int64))]
    first = _DIRECT
    seen: set[int] = set()
    for level in (1, 2, 3):
        if blocks > first:
            _descend(volume, inode, int(words[_DIRECT + level - 1]), level, first, parts, seen)
        first += per**level
    numbers = np.concatenate([first + np.arange(len(part)) for first, part in parts])
    places = np.concatenate([part for _, part in parts])
    keep = (places > 0) & (numbers < blocks)
    numbers, places = numbers[keep], places[keep]
    if len(places) and int(places.max()) >= volume.blocks:
        raise _damaged(volume, inode, "has a block beyond the end of the file system", found=int(places.max()))
    begins = np.ones(len(numbers), np.bool_)
    begins[1:] = (np.diff(numbers) != 1) | (np.diff(places) != 1)
    heads = np.flatnonzero(begins)
    counts = np.diff(np.append(heads, len(numbers)))
    return [Run(*run) for run in zip(numbers[heads].tolist(), counts.tolist(), places[heads].tolist(), strict=True)]


def _descend(
    volume: Volume,
    inode: Inode,
    block: int,
    level: int,
    first: int,
    parts: list[tuple[int, NDArray[np.int64]]],
    seen: set[int],
) -> None:
    """Append the block numbers below an indirect block; `first` is the first block of the file that it stands for."""
    if not block:
        return
    if block in seen:
        raise _damaged(volume, inode, "has an indirect block twice", found=block)
    seen.add(block)
    pointers = np.frombuffer(volume.read_block(block, "indirect block"), "<u4").astype(np.int64)
    if level == 1:
        parts.append((first, pointers))
        return
    span = (volume.block_size // 4) ** (level - 1)
    for number in np.flatnonzero(pointers).tolist():
        _descend(volume, inode, int(pointers[number]), level - 1, first + number * span, parts, seen)
