"""CRC-32C (Castagnoli, polynomial 0x1EDC6F41 reflected), of one buffer and of many rows at once.

One buffer is google-crc32c's work; what it has not is a table of many short rows (group descriptors, inodes), which
costs more in calls than in sums.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.source import Buffer

_REFLECTED = 0x82F63B78


def crc32c(data: Buffer, seed: int = 0) -> int:
    """Return the CRC-32C of `data`, going on from `seed`, the CRC-32C of what precedes it."""
    import google_crc32c  # noqa: PLC0415 - loads when first used

    return cast("int", google_crc32c.extend(seed, data if isinstance(data, bytes) else bytes(data)))


def crc32c_rows(rows: NDArray[Any], seeds: NDArray[Any] | int = 0) -> NDArray[np.uint32]:
    """Return the CRC-32C of each row of a two-dimensional array of bytes, going on from `seeds` (one for each, or all).

    The same convention as `crc32c`: `crc32c_rows(a, s)[i] == crc32c(a[i].tobytes(), s[i])`.
    """
    tables = _tables()
    table = np.ascontiguousarray(rows, np.uint8)
    crc = np.broadcast_to(np.asarray(seeds, np.uint32), (len(table),)) ^ np.uint32(0xFFFFFFFF)
    whole = table.shape[1] // 8
    words = table[:, : whole * 8].reshape(len(table), whole, 8)
    for index in range(whole):
        eight = words[:, index]
        low = crc ^ np.ascontiguousarray(eight[:, :4]).view("<u4").reshape(-1)
        crc = tables[7][low & 0xFF] ^ tables[6][low >> 8 & 0xFF] ^ tables[5][low >> 16 & 0xFF] ^ tables[4][low >> 24]
        for column in range(4, 8):
            crc ^= tables[7 - column][eight[:, column]]
    for column in range(whole * 8, table.shape[1]):
        crc = tables[0][(crc ^ table[:, column]) & 0xFF] ^ crc >> 8
    out: NDArray[np.uint32] = (crc ^ np.uint32(0xFFFFFFFF)).astype(np.uint32)
    return out


@cache
def _tables() -> NDArray[np.uint32]:
    """Return eight tables of 256: the sum of a byte followed by 0 to 7 zero bytes."""
    first = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = np.where(first & 1, first >> 1 ^ np.uint32(_REFLECTED), first >> 1)
    tables = [first]
    for _ in range(7):
        tables.append(first[tables[-1] & 0xFF] ^ tables[-1] >> 8)
    return np.stack(tables)
