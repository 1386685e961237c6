"""Refcounts: how many references each cluster of the file has, 1 to 64 bits each, in blocks that a table points to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.qcow2 import schema as s

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.source import ByteSource

_U = np.uint64


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


def used_beyond(source: ByteSource, header: Header) -> bool:
    """Return whether a refcount says that a cluster is in use behind the one that the file ends in."""
    first = -(-source.size // header.cluster)
    table = read_table(source, header) & ~_U(s.TABLE_RESERVED)
    if (table + _U(header.cluster) > _U(source.size))[table != 0].any():
        return True
    start = first // header.block_entries
    for index in (np.flatnonzero(table[start:]) + start).tolist():
        counts = unpack(source.read(int(table[index]), header.cluster), header.refcount_bits)
        if counts[max(first - index * header.block_entries, 0) :].any():
            return True
    return False
