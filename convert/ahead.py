"""Reading ahead: encoded units that lie side by side in a file are read in one call, then decoded one by one."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import DiskmorphError
from diskmorph.formats.source import HeldSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.source import ByteSource

_GAP = 32 << 10
"""Bytes between two units that are read although nobody needs them: cheaper than another call."""
_MOST = 4 << 20
"""Bytes read at once: what hostile tables say of sizes is not trusted with memory."""
_MARKER = 64
"""Bytes in front of a unit that formats read too (a grain's marker)."""


def read_ahead(files: Sequence[ByteSource], rows: NDArray[np.void]) -> list[HeldSource | None]:
    """Return for each encoded row what has been read of its file, None where it is to be read by itself.

    So where a group cannot be read: the fault may lie in a gap that nobody needs, and a unit's reader names the unit.
    """
    held: list[HeldSource | None] = [None] * len(rows)
    if len(rows) < 2:
        return held
    order = np.lexsort((rows["offset"], rows["file"]))
    file = rows["file"][order]
    start = rows["offset"][order].astype(np.int64)
    stop = start + rows["stored"][order]
    apart = (file[1:] != file[:-1]) | (start[1:] > np.maximum.accumulate(stop)[:-1] + _GAP)
    bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(rows)]
    for low, high in pairwise(bounds):
        begin, end = int(start[low]) - _MARKER, int(stop[low:high].max())
        if high - low < 2 or end - begin > _MOST:
            continue
        source = files[int(file[low])]
        begin, end = max(begin, 0), min(end, source.size)
        if begin >= end:
            continue
        data = bytearray(end - begin)
        try:
            source.read_into(begin, memoryview(data))
        except DiskmorphError:
            continue
        group = HeldSource(source, begin, memoryview(data))
        for index in order[low:high].tolist():
            held[index] = group
    return held
