"""Puts names into directory blocks (kernel docs, "Directory Entries"): in their order, or by hash behind an index."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.geometry import BLOCK
from diskmorph.formats.ext4.htree import MOST_LEAVES, index_blocks, name_hashes, put_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.ext4.collect import Names

_CAPACITY = BLOCK - 12  # of a directory block: a tail with its checksum comes last
_CHUNK = 1 << 16  # directory entries put into blocks at once
_DOTS = 24  # bytes of `.` and `..`


@dataclass
class Directories:
    """Directory blocks: `objects` and the blocks of each; `blocks` all of them, shape (n, 4096), without checksums.

    `indexed`: which objects have an index; `covered`: of each block the bytes that its checksum covers before the eight
    of its tail, 0 for blocks of names.
    """

    objects: NDArray[np.int64]
    counts: NDArray[np.int64]
    indexed: NDArray[np.bool_]
    blocks: NDArray[np.uint8]
    covered: NDArray[np.int64]


@dataclass
class _Layout:
    """Which entries go into which blocks: the first entry of each block of names, and which of all blocks it is.

    `per`: blocks of each directory; `roots`: (directory, its first leaf's place among the blocks of names, leaves).
    """

    firsts: NDArray[np.int64]
    numbers: NDArray[np.int64]
    per: NDArray[np.int64]
    roots: list[tuple[int, int, int]] = field(default_factory=list)


def pack(names: Names, inodes: NDArray[np.int64], types: NDArray[np.int64], seed: bytes) -> Directories:
    """Put all names into directory blocks; `inodes` and `types` (file_type) are by object number.

    A directory of one block keeps the order of its names; a larger one has an index, of hashes begun with `seed`.
    """
    counts = np.array(names.counts, np.int64)
    lengths = np.fromiter(map(len, names.names), np.int64, len(names.names))
    room = 8 + (lengths + 3 & ~3)
    ends = np.cumsum(counts)
    begins = ends - counts
    objects = np.array(names.objects, np.int64)
    texts = names.names
    total = np.add.reduceat(room, begins)
    large = np.flatnonzero(total > _CAPACITY)
    order, hashes = _by_hash(texts, begins, ends, large, seed)
    if order is not None:
        texts = [texts[number] for number in order.tolist()]
        lengths, room, objects = lengths[order], room[order], objects[order]
    reach = np.concatenate(([0], np.cumsum(room)))
    layout = _laid_out(reach, begins, ends, large)
    blocks = np.zeros((int(layout.per.sum()), BLOCK), np.uint8)
    firsts, numbers = layout.firsts, layout.numbers
    at = 0
    while at < len(firsts):
        stop = max(int(np.searchsorted(firsts, firsts[at] + _CHUNK)), at + 1)
        low, high = int(firsts[at]), int(firsts[stop]) if stop < len(firsts) else len(lengths)
        found = objects[low:high]
        part = (texts[low:high], lengths[low:high], reach[low : high + 1], inodes[found], types[found])
        _fill(blocks, numbers[at:stop], firsts[at:stop] - low, *part)
        at = stop
    covered = np.zeros(len(blocks), np.int64)
    indexed = np.zeros(len(counts), np.bool_)
    starts = np.cumsum(layout.per) - layout.per
    for number, leaf, leaves in layout.roots:
        start, stop = int(starts[number]), int(starts[number] + layout.per[number])
        begin = firsts[leaf : leaf + leaves]
        hashed = hashes[begin]
        hashed[1:] |= np.where(hashed[1:] == hashes[begin[1:] - 1], np.uint32(s.DX_CONTINUED), np.uint32(0))
        dots = blocks[start, :_DOTS].tobytes()
        dots = dots[: _DOTS - 8] + (BLOCK - 12).to_bytes(2, "little") + dots[_DOTS - 6 :]  # `..` takes the rest
        covered[start:stop] = put_index(blocks[start:stop], hashed, dots)
        indexed[number] = True
    return Directories(np.array(names.directories, np.int64), layout.per, indexed, blocks, covered)


def _by_hash(
    texts: list[bytes], begins: NDArray[np.int64], ends: NDArray[np.int64], large: NDArray[np.int64], seed: bytes
) -> tuple[NDArray[np.int64] | None, NDArray[np.uint32]]:
    """Return the order of entries in which those of large directories are sorted by hash, and their hashes in it."""
    if not len(large):
        return None, np.zeros(0, np.uint32)
    order = np.arange(len(texts))
    hashes = np.zeros(len(texts), np.uint32)
    counts = ends[large] - begins[large] - 2
    owner = np.repeat(np.arange(len(large)), counts)
    mine = np.repeat(begins[large] + 2 - (np.cumsum(counts) - counts), counts) + np.arange(len(owner))
    found = name_hashes([texts[number] for number in mine.tolist()], seed)
    by = np.lexsort((found, owner))
    order[mine] = mine[by]
    hashes[mine] = found[by]
    return order, hashes


def _laid_out(
    reach: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64], large: NDArray[np.int64]
) -> _Layout:
    """Return the blocks of all directories: of a large one the root of its index, leaves as full as can be, nodes."""
    kept = np.ones(len(begins), np.int64)  # blocks of names, `.` and `..` of a root being one
    nodes = np.zeros(len(begins), np.int64)
    more: list[tuple[int, list[int]]] = []
    indexed: list[tuple[int, int]] = []
    for number in large.tolist():
        begin, end = int(begins[number]), int(ends[number])
        found = _cut(reach, begin + 2, end)
        if len(found) <= MOST_LEAVES:
            nodes[number] = index_blocks(len(found)) - 1
            indexed.append((number, len(found)))
            found.insert(0, begin)
        else:  # more than two levels of index: the kernel looks through it from the front
            found = _cut(reach, begin, end)
        kept[number] = len(found)
        more.append((number, found))
    per = kept + nodes
    places = np.cumsum(kept) - kept
    firsts = np.zeros(int(kept.sum()), np.int64)
    firsts[places] = begins
    for number, found in more:
        firsts[places[number] : places[number] + len(found)] = found
    numbers = np.arange(len(firsts)) + np.repeat(np.cumsum(per) - per - places, kept)
    return _Layout(firsts, numbers, per, [(number, int(places[number]) + 1, leaves) for number, leaves in indexed])


def _cut(reach: NDArray[np.int64], begin: int, end: int) -> list[int]:
    """Return the first entry of each block that entries from `begin` to `end` take."""
    found = []
    while begin < end:
        found.append(begin)
        begin = min(int(np.searchsorted(reach, reach[begin] + _CAPACITY, side="right")) - 1, end)
    return found


def _fill(
    blocks: NDArray[np.uint8],
    numbers: NDArray[np.int64],
    firsts: NDArray[np.int64],
    names: list[bytes],
    lengths: NDArray[np.int64],
    reach: NDArray[np.int64],
    inodes: NDArray[np.int64],
    types: NDArray[np.int64],
) -> None:
    """Write entries into the blocks `numbers`: `firsts` are their first entries, `reach` the room of all, summed."""
    count = len(names)
    per = np.diff(np.append(firsts, count))
    block = np.repeat(np.arange(len(firsts)), per)
    within = reach[:-1] - reach[firsts][block]
    rec_len = np.diff(reach)
    lasts = np.append(firsts[1:], count) - 1
    rec_len[lasts] = _CAPACITY - within[lasts]
    places = numbers[block] * BLOCK + within
    words = blocks.reshape(-1).view("<u4")
    words[places // 4] = inodes
    words[places // 4 + 1] = rec_len | lengths << 16 | types << 24
    total = int(lengths.sum())
    flat = np.frombuffer(b"".join(names), np.uint8)
    spread = np.repeat(places + 8 - (np.cumsum(lengths) - lengths), lengths) + np.arange(total)
    blocks.reshape(-1)[spread] = flat
    words[numbers * (BLOCK // 4) + BLOCK // 4 - 2] = 12 | 0xDE << 24  # the tail, without its checksum
