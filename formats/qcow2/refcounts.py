"""Refcounts: how many references each cluster of the file has, 1 to 64 bits each, in blocks that a table points to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.qcow2 import schema as s

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.source import ByteSource

_U = np.uint64
PIECE = 1 << 19
"""Refcounts that are held at once."""


def unpack(data: bytes | memoryview, bits: int) -> NDArray[np.uint64]:
    """Return the refcounts in a block's bytes ("Refcount block": narrow ones from the least significant bit)."""
    if bits >= 8:
        return np.frombuffer(data, s.refcount_dtype(bits)).astype(_U)
    raw = np.frombuffer(data, np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1).astype(_U)


def pack(counts: NDArray[np.uint64], bits: int) -> bytes:
    """Return the bytes of refcounts, which must fit in `bits` each; the inverse of `unpack`."""
    if bits < 64 and len(counts) and int(counts.max()) >> bits:
        raise ValueError(f"a refcount of {int(counts.max())} does not fit in {bits} bits")
    if bits >= 8:
        return counts.astype(s.refcount_dtype(bits)).tobytes()
    parts = counts.astype(np.uint8).reshape(-1, 8 // bits) << np.arange(0, 8, bits, dtype=np.uint8)
    return bytes(np.bitwise_or.reduce(parts, axis=1).astype(np.uint8))


def read_table(source: ByteSource, header: Header) -> NDArray[np.uint64]:
    """Return the refcount table's entries (its place was checked with the header)."""
    return np.frombuffer(
        source.read(header.refcount_offset, header.refcount_clusters << header.cluster_bits), s.ENTRY
    ).astype(_U)


def stored_refcounts(
    source: ByteSource, header: Header, blocks: NDArray[np.uint64], base: int, count: int
) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yield (number less `base`, refcounts) of the clusters base..base + count, piece by piece; 0 without a block.

    `blocks` are the refcount table's entries, all of them in the file.
    """
    for low in range(base, base + count, PIECE):
        high = min(low + PIECE, base + count)
        counts = np.zeros(high - low, _U)
        for index in range(low // header.block_entries, -(-high // header.block_entries)):
            start, stop = max(index * header.block_entries, low), min((index + 1) * header.block_entries, high)
            offset = int(blocks[index]) if index < len(blocks) else 0
            if offset:
                counts[start - low : stop - low] = _part(
                    source, header, offset, start % header.block_entries, stop - start
                )
        yield low - base, counts


def _part(source: ByteSource, header: Header, offset: int, first: int, count: int) -> NDArray[np.uint64]:
    """Return `count` refcounts of the block at `offset`, from number `first` on."""
    bits = header.refcount_bits
    before = first % max(8 // bits, 1)
    start = (first - before) * bits // 8
    stop = -(-(first + count) * bits // 8)
    return unpack(source.read(offset + start, stop - start), bits)[before : before + count]


def refcounts_at(
    source: ByteSource, header: Header, blocks: NDArray[np.uint64], clusters: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Return the refcounts of single clusters, in the file or not; 0 without a block."""
    bits = header.refcount_bits
    out = np.zeros(len(clusters), _U)
    number = clusters // header.block_entries
    within = number < len(blocks)
    for block in np.unique(number[within]).tolist():
        if not blocks[block]:
            continue
        picked = np.flatnonzero(number == block)
        place = clusters[picked] % header.block_entries
        data = source.read(int(blocks[block]), header.cluster)
        if bits >= 8:
            out[picked] = np.frombuffer(data, s.refcount_dtype(bits))[place]
        else:
            raw = np.frombuffer(data, np.uint8)[place * bits // 8]
            out[picked] = raw >> (place * bits % 8).astype(np.uint8) & np.uint8((1 << bits) - 1)
    return out
