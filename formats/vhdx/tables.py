"""Tables of a new VHDX file while they fill: the BAT in pages and the sector bitmaps of a differencing disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.allocator import Write
from diskmorph.formats.vhdx.schema import BAT_ENTRY, BITMAP_PRESENT, CHUNK_SECTORS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_PAGE = 1 << 13
"""BAT entries of a page: 64 KiB, so that whole pages fit the region."""


class Bat:
    """The BAT of a file that reads zero where it is not written; `offset` is its place in bytes.

    Blocks are set in any order; pages exist only where an entry is not zero, and only until they are taken.
    """

    def __init__(self, offset: int, chunk_ratio: int) -> None:
        self._offset = offset
        self._ratio = chunk_ratio
        self._pages: dict[int, NDArray[np.uint64]] = {}

    def set_blocks(self, blocks: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Set the payload entries of ascending `blocks`: offset in bytes and state in one number each."""
        self._set(blocks + blocks // self._ratio, values.astype(np.uint64))

    def set_bitmap(self, chunk: int, offset: int) -> None:
        """Set where the sector bitmap block of a chunk lies."""
        number = chunk * (self._ratio + 1) + self._ratio
        self._set(np.array([number], np.int64), np.array([offset | BITMAP_PRESENT], np.uint64))

    def _set(self, numbers: NDArray[np.int64], values: NDArray[np.uint64]) -> None:
        pages = numbers // _PAGE
        heads = np.flatnonzero(np.diff(pages, prepend=-1))
        for low, high in zip(heads.tolist(), [*heads[1:].tolist(), len(numbers)], strict=True):
            page = self._pages.setdefault(int(pages[low]), np.zeros(_PAGE, BAT_ENTRY))
            page[numbers[low:high] % _PAGE] = values[low:high]

    def take(self, before_block: int | None = None) -> Iterator[Write]:
        """Yield and forget the pages that hold only entries of blocks below `before_block`; all where it is None."""
        done = None if before_block is None else (before_block + before_block // self._ratio) // _PAGE
        for number in sorted(self._pages):
            if done is None or number < done:
                yield Write(0, self._offset + number * _PAGE * BAT_ENTRY.itemsize, self._pages.pop(number).tobytes())


class Bitmaps:
    """The sector bitmaps of the partially present blocks, kept as ranges until they are taken.

    `per_block` is the number of sectors in a block.
    """

    def __init__(self, sector_size: int, per_block: int) -> None:
        self._sector = sector_size
        self._per_block = per_block
        self._held: list[NDArray[np.int64]] = []  # rows of first sector, sector after the last
        self.places: dict[int, int] = {}
        """Offset of the bitmap block in the file, by chunk."""

    def add(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Note ranges of the disk, in bytes, ascending, each within one block, that are present."""
        if len(starts):
            self._held.append(np.stack((starts // self._sector, -(-(starts + lengths) // self._sector)), axis=1))

    def take(self, before: int | None = None) -> Iterator[Write]:
        """Yield and forget the bits of the blocks below disk offset `before`, a multiple of the block; all for None."""
        if not self._held:
            return
        ranges = np.concatenate(self._held)
        split = len(ranges) if before is None else int(np.searchsorted(ranges[:, 0], before // self._sector))
        self._held = [ranges[split:]] if split < len(ranges) else []
        chunks = ranges[:split, 0] // CHUNK_SECTORS
        for chunk in np.unique(chunks).tolist():
            yield self._write(chunk, ranges[:split][chunks == chunk] - chunk * CHUNK_SECTORS)

    def _write(self, chunk: int, ranges: NDArray[np.int64]) -> Write:
        low = int(ranges[0, 0]) // self._per_block * self._per_block
        high = -(-int(ranges[-1, 1]) // self._per_block) * self._per_block
        steps = np.zeros(high - low + 1, np.int8)
        np.add.at(steps, ranges[:, 0] - low, 1)
        np.add.at(steps, ranges[:, 1] - low, -1)
        bits = np.cumsum(steps[:-1], dtype=np.int8)
        return Write(0, self.places[chunk] + low // 8, np.packbits(bits.view(np.uint8), bitorder="little").tobytes())
