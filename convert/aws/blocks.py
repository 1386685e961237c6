"""A disk as EBS blocks: which are data, which are zeroes that were written, which were never allocated.

Blocks are 512 KiB (EBS direct APIs, "Concepts"). Tasks come in ascending order, each small enough for one worker's
buffer; holes cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.convert.buffers import PIECE
from diskmorph.convert.windows import READ, Grid, windows
from diskmorph.formats.extents import ABSENT, ZERO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.convert.moves import Reader
    from diskmorph.formats.disk import Disk

BLOCK = 512 << 10
GIB = 1 << 30
MOST_GIB = 65_536
"""StartSnapshot, VolumeSize."""

# A block that is in a snapshot, and the SHA-256 of its content.
HASH = np.dtype([("index", "<u4"), ("sha256", "u1", (32,))])


def blocks_of(size: int) -> int:
    """Return how many blocks hold `size` bytes."""
    return -(-size // BLOCK)


@dataclass(frozen=True, slots=True)
class Task:
    """Blocks `first` to `first + count`: to be read by `rows`, or zeroes where that is None."""

    first: int
    count: int
    rows: NDArray[np.void] | None

    @property
    def stop(self) -> int:
        """The block behind the last one."""
        return self.first + self.count


def capacity_of(disk: Disk) -> int:
    """Return the bytes of a worker's buffer: whole blocks that hold one encoded unit, so that none is decoded twice."""
    return blocks_of(max(BLOCK, disk.unit_size())) * BLOCK


def tasks(disk: Disk, *, zeroes: bool, below: NDArray[np.void] | None = None) -> Iterator[Task]:
    """Yield what must be looked at: data, zeroes if `zeroes`, and what the parent `below` (HASH rows) has there."""
    unit = capacity_of(disk)
    held = below["index"] if below is not None else np.zeros(0, np.uint32)
    for window in windows(disk, Grid(disk.size, unit, BLOCK, unit, BLOCK)):
        for start, length, kind, mode in window.segments.tolist():
            first, stop = start // BLOCK, blocks_of(start + length)
            if kind == ABSENT:
                disk.read(start, 1)  # raises: the parent is not open
            if mode == READ:
                yield Task(first, stop - first, window.rows)
            elif kind == ZERO and zeroes:
                yield from (Task(at, 1, None) for at in range(first, stop))
            else:
                yield from _held(held, first, stop)
    yield from _held(held, blocks_of(disk.size), 1 << 32)


def _held(indexes: NDArray[np.uint32], first: int, stop: int) -> Iterator[Task]:
    low, high = np.searchsorted(indexes, [first, stop])
    yield from (Task(at, 1, None) for at in indexes[int(low) : int(high)].tolist())


def fill(reader: Reader, task: Task, buffer: memoryview) -> memoryview:
    """Read a task's blocks into the beginning of a buffer; behind the disk's end are zeroes."""
    view = buffer[: task.count * BLOCK]
    start = task.first * BLOCK
    piece = np.zeros(1, PIECE)
    piece["start"], piece["length"] = start, min(len(view), reader.disk.size - start)
    assert task.rows is not None  # noqa: S101 - tasks of zeroes are not read
    reader.fill(task.rows, piece, view)
    return view


def is_zero(view: memoryview) -> bool:
    """Whether a block is all zeroes."""
    words = np.frombuffer(view, np.uint64)
    return not words[::64].any() and not words.any()
