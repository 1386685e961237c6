"""metadata_csum: CRC-32C without the final inversion, begun with ~0 (kernel docs, "Checksums")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.crc32c import crc32c, crc32c_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.source import Buffer

_ALL = 0xFFFFFFFF


def chain(seed: int, data: Buffer) -> int:
    """Return ext4's checksum of `data`, going on from `seed`."""
    return crc32c(data, seed ^ _ALL) ^ _ALL


def start(data: Buffer) -> int:
    """Return ext4's checksum of `data` from the beginning: `start(uuid)` seeds most others."""
    return chain(_ALL, data)


def chain_rows(seeds: NDArray[np.uint32] | int, rows: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the checksums of the rows of an array of bytes, going on from `seeds` (one for all, or one each)."""
    begun = np.asarray(seeds, np.uint32) ^ np.uint32(_ALL)
    return crc32c_rows(rows, begun) ^ np.uint32(_ALL)


def inode_seed(seed: int, inode: int, generation: int = 0) -> int:
    """Return what seeds the checksums of one inode and of its directory and extent blocks."""
    return chain(seed, inode.to_bytes(4, "little") + generation.to_bytes(4, "little"))


def inode_seeds(seed: int, inodes: NDArray[Any], generations: NDArray[Any] | int = 0) -> NDArray[np.uint32]:
    """Return what seeds the checksums of inodes and of their directory and extent blocks."""
    both = np.zeros((len(inodes), 2), "<u4")
    both[:, 0] = inodes
    both[:, 1] = generations
    return chain_rows(seed, both.view(np.uint8).reshape(len(inodes), 8))
