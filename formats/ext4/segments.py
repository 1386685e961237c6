"""Ranges on the data line: what files need, how ranges are cut where the line is broken, extent trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.checksum import chain
from diskmorph.formats.ext4.geometry import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# `count` blocks of object `owner` from its block `block`, at position `at` of the data line (or at a block number).
SEGMENT = np.dtype([("owner", "<i8"), ("block", "<i8"), ("count", "<i8"), ("at", "<i8")])

IN_INODE = 4  # extents that an inode holds itself
PER_BLOCK = (BLOCK - 12 - 4) // 12  # extents or indexes of a tree block: header before, checksum behind


def segments(pieces: NDArray[np.void]) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Return the runs of blocks that pieces (sorted) touch, unplaced, and for each piece the number of its run."""
    first = pieces["start"] // BLOCK
    last = (pieces["start"] + pieces["length"] - 1) // BLOCK
    begins = np.ones(len(pieces), np.bool_)
    begins[1:] = (pieces["owner"][1:] != pieces["owner"][:-1]) | (first[1:] > last[:-1] + 1)
    heads = np.flatnonzero(begins)
    tails = np.append(heads[1:], len(pieces)) - 1 if len(heads) else heads
    out = np.zeros(len(heads), SEGMENT)
    out["owner"], out["block"] = pieces["owner"][heads], first[heads]
    out["count"] = last[tails] + 1 - out["block"]
    return out, np.cumsum(begins) - 1


def cut(
    starts: NDArray[Any], lengths: NDArray[Any], bounds: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut ranges at sorted `bounds`: return for each part the number of its range, its start and its length."""
    stops = starts + lengths
    low = np.searchsorted(bounds, starts, side="right")
    parts = np.searchsorted(bounds, stops, side="left") - low + 1
    row = np.repeat(np.arange(len(starts)), parts)
    number = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
    padded = np.append(bounds, 0)
    begin = np.where(number == 0, starts[row], padded[low[row] + number - 1])
    end = np.where(number == parts[row] - 1, stops[row], padded[np.minimum(low[row] + number, len(bounds))])
    return row, begin.astype(np.int64), (end - begin).astype(np.int64)


def tree_blocks(extents: int) -> int:
    """Return how many blocks the tree of a file with so many extents takes beside its inode."""
    total = 0
    while extents > IN_INODE:
        extents = -(-extents // PER_BLOCK)
        total += extents
    return total


def build_tree(
    extents: NDArray[np.void], places: list[int], seed: int, write: Callable[[int, bytes], None]
) -> NDArray[np.uint32]:
    """Write the tree blocks of one file and return its inode's 15 words.

    `extents` are SEGMENT rows whose `at` is a block number; `places` the numbers of as many blocks as `tree_blocks`
    says; `seed` the inode's.
    """
    rows = np.zeros(len(extents), s.EXTENT_ROW)
    rows["block"], rows["length"] = extents["block"], extents["count"]
    rows["start_lo"], rows["start_hi"] = extents["at"] & 0xFFFFFFFF, extents["at"] >> 32
    depth, left = 0, list(places)
    while len(rows) > IN_INODE:
        count = -(-len(rows) // PER_BLOCK)
        mine, left = left[:count], left[count:]
        firsts = rows["block"][::PER_BLOCK]
        for number, place in enumerate(mine):
            part = rows[number * PER_BLOCK : (number + 1) * PER_BLOCK]
            body = _header(len(part), PER_BLOCK, depth) + part.tobytes()
            body += bytes(12 + 12 * PER_BLOCK - len(body))
            body += chain(seed, body).to_bytes(4, "little")
            write(place, body + bytes(BLOCK - len(body)))
        rows = np.zeros(count, s.EXTENT_INDEX_ROW)
        rows["block"] = firsts
        rows["leaf_lo"] = np.array(mine) & 0xFFFFFFFF
        rows["leaf_hi"] = np.array(mine) >> 32
        depth += 1
    body = _header(len(rows), IN_INODE, depth) + rows.tobytes()
    return np.frombuffer(body + bytes(60 - len(body)), "<u4")


def _header(entries: int, most: int, depth: int) -> bytes:
    return s.EXTENT_HEADER.build({"entries": entries, "max": most, "depth": depth, "generation": 0})


def small_roots(owner_rows: NDArray[np.int64], extents: NDArray[np.void], words: NDArray[np.uint32]) -> None:
    """Fill in the words of inodes with at most four extents: `owner_rows` are the rows of `words`, one per extent.

    Extents are sorted by owner and block, their `at` a block number; headers are in place already.
    """
    fresh = np.ones(len(owner_rows), np.bool_)
    fresh[1:] = owner_rows[1:] != owner_rows[:-1]
    heads = np.flatnonzero(fresh)
    number = np.arange(len(owner_rows)) - heads[np.cumsum(fresh) - 1] if len(heads) else np.zeros(0, np.int64)
    words[owner_rows, 3 + 3 * number] = extents["block"]
    words[owner_rows, 4 + 3 * number] = extents["count"] | (extents["at"] >> 32) << 16
    words[owner_rows, 5 + 3 * number] = extents["at"] & 0xFFFFFFFF
    counts = np.diff(np.append(heads, len(owner_rows)))
    words[owner_rows[heads], 0] = s.EXTENT_MAGIC | counts << 16
