"""Writing VHD: fixed, dynamic and differencing disks whose current_size is the disk's, exactly.

The creator is `win `: readers that take the size of unknown creators from the geometry (QEMU) take this one's from
current_size.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.allocator import PLACED, Allocator, NewImage, NewParent, Option, OptionReader, Write
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.extents import DATA, ZERO
from diskmorph.formats.vhd.schema import (
    DIFFERENCING,
    DYNAMIC,
    ENTRY,
    EPOCH,
    FIXED,
    FOOTER_SIZE,
    HEADER_SIZE,
    MOST_BYTES,
    NOWHERE,
    SECTOR,
    UNALLOCATED,
    WINDOWS_ABSOLUTE,
    WINDOWS_RELATIVE,
    WRITTEN_BY,
    bitmap_size,
    build_footer,
    build_header,
    geometry,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

OPTIONS = (
    Option("subformat", "dynamic|fixed", "dynamic", "allocate blocks as they are written, or store the whole disk"),
    Option("block_size", "SIZE", "2M", "of dynamic disks: bytes allocated together; Hyper-V wants 512K or 2M"),
    Option("force_size", "on|off", "on", "QEMU's word for keeping the size exactly, which is always done"),
    Option("preallocation", "off|falloc|full", "off", "of fixed disks: reserve the target's room, or write it all"),
)
SUBFORMATS = ("dynamic", "fixed", "differencing")

_DATA_ALIGN = 4096
_FEATURES = 2  # reserved, always set
_BITMAPS = 1024  # blocks whose bitmaps are made at once: 4 MiB of bits as bytes, with blocks of 2 MiB

# A piece of an allocated block whose sectors are present: where the block's bitmap lies, sectors within the block.
_PIECE = np.dtype([("bitmap", "<u8"), ("first", "<u4"), ("stop", "<u4")])


def _footer(image: NewImage, size: int, type: int, data_offset: int) -> bytes:
    cylinders, heads, sectors = geometry(size)
    # With --reproducible a child may have its parent's seed; its identity must be another one.
    parent = image.parent.identity["uuid"] if image.parent is not None else None
    return build_footer(
        {
            "features": _FEATURES,
            "data_offset": data_offset,
            "timestamp": min(max(int(image.identity.time()) - EPOCH, 0), 0xFFFF_FFFF),
            **WRITTEN_BY,
            "original_size": size,
            "current_size": size,
            "cylinders": cylinders,
            "heads": heads,
            "sectors": sectors,
            "type": type,
            "uuid": image.identity.uuid(f"vhd over {parent}"),
        }
    )


def _rounded(size: int) -> int:
    rounded = -(-size // SECTOR) * SECTOR
    if rounded > MOST_BYTES:
        raise TargetError("a VHD holds at most 2040 GiB", found=size, expected=f"at most {MOST_BYTES}", hint="use vhdx")
    return rounded


class FixedAllocator(Allocator):
    """Every byte of the disk at its own offset, the footer behind."""

    unit = 4096
    grain = 4096
    sequential = True
    alignment = 4096

    def __init__(self, image: NewImage, preallocation: str) -> None:
        self.size = _rounded(image.size)
        self.members = (image.name,)
        self.preallocation = preallocation
        self._image = image

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator."""
        placed = np.zeros(len(runs), PLACED)
        placed["start"] = placed["offset"] = runs["start"]
        placed["length"] = runs["length"]
        placed["kind"] = np.where(runs["kind"] == DATA, DATA, ZERO)
        return placed

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        yield Write(0, self.size, _footer(self._image, self.size, FIXED, NOWHERE))

    def sizes(self) -> Sequence[int]:
        """See Allocator."""
        return (self.size + FOOTER_SIZE,)


class DynamicAllocator(Allocator):
    """Blocks in the order in which they come, the data of each on a 4 KiB boundary, its bitmap just before."""

    type = DYNAMIC

    def __init__(self, image: NewImage, block_size: int) -> None:
        self.size = _rounded(image.size)
        self.unit = self.grain = block_size
        self.alignment = _DATA_ALIGN
        self.members = (image.name,)
        self._image = image
        self._bitmap_size = bitmap_size(block_size)
        self._stride = block_size + -(-self._bitmap_size // _DATA_ALIGN) * _DATA_ALIGN
        self._locators = self._locator_data()
        self._table_offset = FOOTER_SIZE + HEADER_SIZE + sum(_padded(len(raw)) for _, raw in self._locators)
        self._table = np.full(max(-(-self.size // block_size), 1), UNALLOCATED, ENTRY)
        tables_end = self._table_offset + _padded(self._table.nbytes)
        self._first = -(-(tables_end + self._bitmap_size) // _DATA_ALIGN) * _DATA_ALIGN
        self._tables_end = tables_end
        self._allocated = 0
        self._pieces: list[NDArray[np.void]] = []

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator."""
        kept = runs[self._present(runs)]
        pieces = _by_block(kept, self.unit)
        blocks, index = np.unique(pieces["start"] // np.uint64(self.unit), return_inverse=True)
        data = np.uint64(self._first) + (np.arange(len(blocks), dtype=np.uint64) + np.uint64(self._allocated)) * (
            np.uint64(self._stride)
        )
        bitmaps = data - np.uint64(self._bitmap_size)
        self._note(blocks, bitmaps)
        within = pieces["start"] - blocks[index] * np.uint64(self.unit)
        noted = np.zeros(len(pieces), _PIECE)
        noted["bitmap"] = bitmaps[index]
        noted["first"] = within // np.uint64(SECTOR)
        noted["stop"] = -(-(within + pieces["length"]).astype(np.int64) // SECTOR)
        if len(noted):
            self._pieces.append(noted)
        placed = np.zeros(len(pieces), PLACED)
        placed["start"], placed["length"], placed["kind"] = pieces["start"], pieces["length"], pieces["kind"]
        placed["offset"] = data[index] + within
        return placed

    def settle(self, upto: int) -> Iterator[Write]:
        """See Allocator: the bitmaps of what was placed."""
        del upto
        if not self._pieces:
            return
        pieces = np.concatenate(self._pieces)
        self._pieces = []
        heads = np.flatnonzero(np.diff(pieces["bitmap"], prepend=np.uint64(0)))
        for low in range(0, len(heads), _BITMAPS):
            some = heads[low : low + _BITMAPS]
            stop = int(heads[low + _BITMAPS]) if low + _BITMAPS < len(heads) else len(pieces)
            made = self._bitmaps(pieces[int(some[0]) : stop], len(some))
            for place, bitmap in zip(pieces["bitmap"][some].tolist(), made, strict=True):
                yield Write(0, place, bitmap.tobytes())

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        yield from self.settle(self.size)
        padding = b"\xff" * (_padded(self._table.nbytes) - self._table.nbytes)
        yield Write(0, self._table_offset, self._table.tobytes() + padding)
        at = FOOTER_SIZE + HEADER_SIZE
        for _, raw in self._locators:
            yield Write(0, at, raw.ljust(_padded(len(raw)), b"\0"))
            at += _padded(len(raw))
        footer = _footer(self._image, self.size, self.type, FOOTER_SIZE)
        yield Write(0, self._end(), footer)
        yield Write(0, 0, footer + build_header(self._header()))

    def sizes(self) -> Sequence[int]:
        """See Allocator."""
        return (self._end() + FOOTER_SIZE,)

    def _end(self) -> int:
        if not self._allocated:
            return self._tables_end
        return self._first + (self._allocated - 1) * self._stride + self.unit

    def _present(self, runs: NDArray[np.void]) -> NDArray[np.bool_]:
        """Return which runs need room: without a parent, what is not there reads as zeroes anyway."""
        present: NDArray[np.bool_] = runs["kind"] == DATA
        return present

    def _note(self, blocks: NDArray[np.uint64], bitmaps: NDArray[np.uint64]) -> None:
        sectors = bitmaps // np.uint64(SECTOR)
        if len(sectors) and int(sectors[-1]) >= UNALLOCATED:
            raise TargetError("a VHD's blocks lie below 2 TiB of the file", hint="choose a larger block_size, or vhdx")
        self._table[blocks.astype(np.int64)] = sectors
        self._allocated += len(blocks)

    def _bitmaps(self, pieces: NDArray[np.void], blocks: int) -> NDArray[np.uint8]:
        """Return the bitmaps of so many blocks, a row each: of a disk without a parent every sector is there."""
        del pieces
        return np.full((blocks, self._bitmap_size), 0xFF, np.uint8)

    def _locator_data(self) -> list[tuple[bytes, bytes]]:
        """Return (platform code, data) of the parent locators."""
        return []

    def _header(self) -> dict[str, Any]:
        """Return the dynamic header's fields."""
        locators = [{"platform": bytes(4), "space": 0, "length": 0, "reserved": 0, "offset": 0} for _ in range(8)]
        at = FOOTER_SIZE + HEADER_SIZE
        for locator, (platform, raw) in zip(locators, self._locators, strict=False):
            locator.update({"platform": platform, "space": _padded(len(raw)), "length": len(raw), "offset": at})
            at += _padded(len(raw))
        return {
            "table_offset": self._table_offset,
            "entries": len(self._table),
            "block_size": self.unit,
            "parent_uuid": uuid.UUID(int=0),
            "parent_timestamp": 0,
            "parent_name": bytes(512),
            "locators": locators,
        }


class DifferencingAllocator(DynamicAllocator):
    """A dynamic disk whose sectors that are not there are the parent's."""

    type = DIFFERENCING
    overlay = True

    def __init__(self, image: NewImage, parent: NewParent, block_size: int) -> None:
        self._parent = parent
        super().__init__(image, block_size)
        self.grain = SECTOR
        self.alignment = SECTOR

    def _present(self, runs: NDArray[np.void]) -> NDArray[np.bool_]:
        # Explicit zeroes need room: nothing else would hide the parent's data.
        present: NDArray[np.bool_] = (runs["kind"] == DATA) | (runs["kind"] == ZERO)
        return present

    def _bitmaps(self, pieces: NDArray[np.void], blocks: int) -> NDArray[np.uint8]:
        number = np.cumsum(np.diff(pieces["bitmap"], prepend=pieces["bitmap"][0]) != 0)
        sectors = self.unit // SECTOR
        edges = np.zeros(blocks * sectors + 1, np.int8)
        edges[number * sectors + pieces["first"]] += 1
        edges[number * sectors + pieces["stop"]] -= 1
        bits = np.cumsum(edges[:-1], dtype=np.int8).astype(np.uint8).reshape(blocks, sectors)
        made = np.zeros((blocks, self._bitmap_size), np.uint8)
        packed = np.packbits(bits, axis=1)
        made[:, : packed.shape[1]] = packed
        return made

    def _locator_data(self) -> list[tuple[bytes, bytes]]:
        name, path = self._parent.unicode_name(), self._parent.path
        found = []
        if not name.startswith("/"):
            found.append((WINDOWS_RELATIVE, _windows(name if name.startswith("../") else f"./{name}")))
        # A reproducible image must not tell where it was made.
        absolute = name if name.startswith("/") else None if path is None else str(path.absolute())
        if absolute is not None and not (found and self._image.identity.reproducible):
            found.append((WINDOWS_ABSOLUTE, _windows(absolute)))
        return found

    def _header(self) -> dict[str, Any]:
        name = self._parent.unicode_name().rsplit("/", 1)[-1].encode("utf-16-be")
        return super()._header() | {
            "parent_uuid": uuid.UUID(self._parent.identity["uuid"]),
            "parent_timestamp": int(self._parent.identity.get("timestamp", 0)),
            "parent_name": name[:510].ljust(512, b"\0"),
        }


def _windows(path: str) -> bytes:
    return path.replace("/", "\\").encode("utf-16-le", "surrogatepass")


def _padded(length: int) -> int:
    return -(-length // SECTOR) * SECTOR


def _by_block(runs: NDArray[np.void], unit: int) -> NDArray[np.void]:
    """Return RUN rows cut where a block ends."""
    stops = runs["start"] + runs["length"]
    first = runs["start"] // np.uint64(unit)
    counts = ((stops + np.uint64(unit - 1)) // np.uint64(unit) - first).astype(np.int64)
    pieces = np.repeat(runs, counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = (np.repeat(first, counts) + within.astype(np.uint64)) * np.uint64(unit)
    pieces["start"] = np.maximum(pieces["start"], begins)
    pieces["length"] = np.minimum(np.repeat(stops, counts), begins + np.uint64(unit)) - pieces["start"]
    return pieces


def new_allocator(image: NewImage) -> Allocator:
    """See FormatModule."""
    options = OptionReader("vhd", image.options)
    subformat = options.text("subformat", "dynamic", ("dynamic", "fixed"))
    chosen = "block_size" in image.options
    block_size = options.size("block_size", 2 << 20, least=4 << 10, most=256 << 20)
    preallocation = options.text("preallocation", "off", ("off", "falloc", "full"))
    options.flag("force_size", default=True)
    options.done()
    if image.codec is not None:
        raise OptionError("vhd cannot be compressed", hint="use qcow2 or vmdk")
    if preallocation != "off" and subformat != "fixed":
        raise OptionError(f"vhd option preallocation={preallocation} needs subformat=fixed")
    if subformat == "fixed":
        if image.parent is not None:
            raise OptionError("a fixed VHD has no parent", hint="leave subformat=fixed away")
        if chosen:
            raise OptionError("a fixed VHD has no blocks", hint="leave block_size away")
        return FixedAllocator(image, preallocation)
    if image.size // block_size > _MOST_ENTRIES:
        raise OptionError(f"vhd option block_size={block_size} is too small for this disk", hint="take 2M")
    if image.parent is None:
        return DynamicAllocator(image, block_size)
    if "uuid" not in image.parent.identity or image.parent.format != "vhd":
        raise OptionError(f"a VHD's parent must be a VHD, not {image.parent.format}")
    return DifferencingAllocator(image, image.parent, block_size)


_MOST_ENTRIES = (64 << 20) // ENTRY.itemsize  # the table is held in memory
