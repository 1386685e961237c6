"""Hash trees of directories (kernel docs, "Hash Tree Directories"): hashes of names, and the blocks of the index.

Names lie in ordinary directory blocks, sorted by hash; the index says from which hash on each block goes. Only a
directory of several blocks has one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.geometry import BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

ROOT_ENTRIES = (BLOCK - s.DX_ROOT.sizeof() - s.DX_TAIL.sizeof()) // s.DX_ENTRY.itemsize
NODE_ENTRIES = (BLOCK - s.DX_NODE.sizeof() - s.DX_TAIL.sizeof()) // s.DX_ENTRY.itemsize
MOST_LEAVES = ROOT_ENTRIES * NODE_ENTRIES  # two levels of index; more need the feature large_dir
_PIECE = 32  # bytes of a name that one round of the hash takes
_LAST = 0xFFFFFFFE  # stands for the end of a directory

# Half MD4: of each round the function, the constant, and (word, bits to turn) of its eight steps.
_SHIFTS = ((3, 7, 11, 19), (3, 5, 9, 13), (3, 9, 11, 15))
_WORDS = ((0, 1, 2, 3, 4, 5, 6, 7), (1, 3, 5, 7, 0, 2, 4, 6), (3, 7, 2, 6, 1, 5, 0, 4))
_CONSTANTS = (0, 0x5A827999, 0x6ED9EBA1)


def name_hashes(names: Sequence[bytes], seed: bytes) -> NDArray[np.uint32]:
    """Return the half MD4 hashes of names, bytes being signed (superblock: def_hash_version 1, flags 1)."""
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    flat = np.frombuffer(b"".join(names) + bytes(_PIECE), np.int8)
    starts = np.cumsum(lengths) - lengths
    state = np.tile(np.frombuffer(seed, "<u4").astype(np.uint32), (len(names), 1))
    for at in range(0, int(lengths.max(initial=0)), _PIECE):
        chosen = np.flatnonzero(lengths > at)
        words = _words(flat, starts[chosen] + at, lengths[chosen] - at)
        state[chosen] = _transformed(state[chosen], words)
    found = state[:, 1] & np.uint32(_LAST)
    return np.where(found == _LAST, np.uint32(_LAST - 2), found)


def _words(flat: NDArray[np.int8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the eight words that the next bytes of each name come to, missing ones filled with the length."""
    pad = lengths.astype(np.uint32) * np.uint32(0x01010101)
    out = np.tile(pad, (_PIECE // 4, 1))
    for number in range(min(_PIECE, int(lengths.max()))):
        some = np.flatnonzero(lengths > number)
        row = out[number // 4]
        row[some] = (row[some] << np.uint32(8)) + flat[starts[some] + number].astype(np.uint32)
    return out


def _transformed(state: NDArray[np.uint32], words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    a, b, c, d = state.T.copy()
    for kind, constant in enumerate(_CONSTANTS):
        for step, word in enumerate(_WORDS[kind]):
            if kind == 0:
                mixed = d ^ (b & (c ^ d))
            elif kind == 1:
                mixed = (b & c) + ((b ^ c) & d)
            else:
                mixed = b ^ c ^ d
            a += mixed + words[word] + np.uint32(constant)
            turn = _SHIFTS[kind][step % 4]
            a, b, c, d = d, a << np.uint32(turn) | a >> np.uint32(32 - turn), b, c
    found: NDArray[np.uint32] = state + np.column_stack((a, b, c, d))
    return found


def index_blocks(leaves: int) -> int:
    """Return how many blocks the index of so many leaves takes, the root included."""
    return 1 if leaves <= ROOT_ENTRIES else 1 + -(-leaves // NODE_ENTRIES)


def put_index(blocks: NDArray[np.uint8], begins: NDArray[np.uint32], root: bytes) -> NDArray[np.int64]:
    """Write the index of one directory, whose blocks are: root, leaves, nodes between both.

    `begins`: the hash from which on each leaf goes; `root`: the entries `.` and `..`, 24 bytes. Returns of each block
    the bytes that its checksum covers; 0 for leaves.
    """
    leaves = len(begins)
    covered = np.zeros(len(blocks), np.int64)
    entries = np.zeros(leaves, s.DX_ENTRY)
    entries["hash"], entries["block"] = begins, np.arange(1, leaves + 1)
    for row in range(leaves + 1, len(blocks)):
        part = entries[(row - leaves - 1) * NODE_ENTRIES :][:NODE_ENTRIES]
        covered[row] = _put(blocks[row], s.DX_NODE.build({"rec_len": BLOCK}), part, NODE_ENTRIES)
    levels = int(len(blocks) > leaves + 1)
    if levels:
        entries = entries[::NODE_ENTRIES].copy()
        entries["block"] = np.arange(leaves + 1, len(blocks))
    head = s.DX_ROOT.build({"dots": root, "hash_version": s.HALF_MD4, "levels": levels})
    covered[0] = _put(blocks[0], head, entries, ROOT_ENTRIES)
    return covered


def _put(block: NDArray[np.uint8], head: bytes, entries: NDArray[np.void], most: int) -> int:
    """Write one block of an index; return the bytes that its checksum covers."""
    body = entries.tobytes()
    first = s.DX_LIMIT.build({"limit": most, "count": len(entries)})  # in place of the first hash, which none needs
    block[:] = 0
    found = head + first + body[len(first) :]
    block[: len(found)] = np.frombuffer(found, np.uint8)
    return len(found)
