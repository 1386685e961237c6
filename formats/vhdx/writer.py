"""Writing VHDX: dynamic, fixed and differencing files.

The file is laid out as Hyper-V does: header section, log, metadata, BAT, then blocks at multiples of 1 MiB, one after
the other. Both headers come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.allocator import PLACED, Allocator, NewImage, NewParent, Option, OptionReader, Write
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.extents import ABSENT, DATA, PLAIN, ZERO
from diskmorph.formats.vhdx.schema import (
    BAT_ENTRY,
    BAT_REGION,
    BITMAP_BLOCK,
    BLOCK_ZERO,
    CHUNK_SECTORS,
    FILE_PARAMETERS,
    FULLY_PRESENT,
    HAS_PARENT,
    HEADER_SECTION,
    HEADERS_AT,
    IDENTIFIER_AT,
    IS_REQUIRED,
    IS_VIRTUAL_DISK,
    LEAVE_BLOCKS_ALLOCATED,
    LOG_VERSION,
    LOGICAL_SECTOR_SIZE,
    MAX_BLOCK,
    MAX_DISK,
    METADATA_REGION,
    METADATA_TABLE_SIZE,
    MIB,
    MIN_BLOCK,
    NO_GUID,
    PARENT_LOCATOR,
    PARTIALLY_PRESENT,
    PHYSICAL_SECTOR_SIZE,
    REGION_TABLE_SIZE,
    REGION_TABLES_AT,
    TIB,
    VERSION,
    VHDX_LOCATOR,
    VIRTUAL_DISK_ID,
    VIRTUAL_DISK_SIZE,
    FileParameters,
    Header,
    Identifier,
    MetadataEntry,
    MetadataTableHeader,
    ParentLocatorEntry,
    ParentLocatorHeader,
    RegionEntry,
    RegionTableHeader,
    SectorSize,
    VirtualDiskId,
    VirtualDiskSize,
    bat_entries,
    sealed,
)
from diskmorph.formats.vhdx.tables import Bat, Bitmaps

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

OPTIONS = (
    Option("subformat", "dynamic|fixed", "dynamic", "allocate blocks as they are needed, or all"),
    Option("block_size", "SIZE", "2M (8M above 2T, 32M above 8T)", "what is allocated at once: 1M to 256M"),
    Option("logical_sector_size", "512|4096", "the source's", "the sector that the guest sees"),
    Option("physical_sector_size", "512|4096", "4096", "the sector that the guest is told the disk has"),
    Option("log_size", "SIZE", "1M", "room for the log, a multiple of 1M up to 256M"),
)
SUBFORMATS = ("dynamic", "fixed", "differencing")

CREATOR = "diskmorph"
_METADATA_LENGTH = MIB
_FIXED_GRAIN = 4096
_BLOCKS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class Layout:
    """What does not depend on data: sizes and places in bytes. `content` is the disk before it was rounded up."""

    content: int
    size: int
    block: int
    sector: int
    physical: int
    log_size: int
    flags: int

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks of a chunk."""
        return CHUNK_SECTORS * self.sector // self.block

    @property
    def blocks(self) -> int:
        """Payload blocks of the disk."""
        return -(-self.size // self.block)

    @property
    def metadata_at(self) -> int:
        """Where the metadata region begins: behind the log."""
        return HEADER_SECTION + self.log_size

    @property
    def bat_at(self) -> int:
        """Where the BAT region begins."""
        return self.metadata_at + _METADATA_LENGTH

    @property
    def bat_length(self) -> int:
        """The BAT region's length."""
        entries = bat_entries(self.blocks, self.chunk_ratio, differencing=bool(self.flags & HAS_PARENT))
        return max(-(-entries * BAT_ENTRY.itemsize // MIB), 1) * MIB

    @property
    def data_at(self) -> int:
        """Where the first block lies."""
        return self.bat_at + self.bat_length


class VhdxAllocator(Allocator):
    """What all three kinds of file have in common: everything but blocks."""

    def __init__(self, image: NewImage, layout: Layout, locator: bytes = b"") -> None:
        self.size = layout.size
        self.sector_size = layout.sector
        self.members = (image.name,)
        self._layout = layout
        self._identity = image.identity
        self._locator = locator
        self._next = layout.data_at
        self._bat = Bat(layout.bat_at, layout.chunk_ratio)

    def settle(self, upto: int) -> Iterator[Write]:
        """See Allocator."""
        yield from self._bat.take(upto // self._layout.block)

    def finish(self) -> Iterator[Write]:
        """See Allocator: tables, metadata, region tables, file identifier, headers."""
        yield from self._bat.take()
        yield from self._metadata()
        table = self._region_table()
        yield from (Write(0, at, table) for at in REGION_TABLES_AT)
        creator = CREATOR.encode("utf-16-le").ljust(512, b"\0")
        yield Write(0, IDENTIFIER_AT, Identifier.build({"creator": creator}))
        yield from (Write(0, at, self._header(number + 1)) for number, at in enumerate(HEADERS_AT))

    def sizes(self) -> Sequence[int]:
        """See Allocator."""
        return (self._next,)

    def _header(self, sequence: int) -> bytes:
        fields = {
            "checksum": 0,
            "sequence_number": sequence,
            "file_write_guid": self._identity.uuid("vhdx/file write"),
            "data_write_guid": self._identity.uuid("vhdx/data write"),
            "log_guid": NO_GUID,
            "log_version": LOG_VERSION,
            "version": VERSION,
            "log_length": self._layout.log_size,
            "log_offset": HEADER_SECTION,
        }
        return sealed(Header.build(fields))

    def _region_table(self) -> bytes:
        regions = (
            (METADATA_REGION, self._layout.metadata_at, _METADATA_LENGTH),
            (BAT_REGION, self._layout.bat_at, self._layout.bat_length),
        )
        head = RegionTableHeader.build({"checksum": 0, "entry_count": len(regions), "reserved": 0})
        entries = b"".join(
            RegionEntry.build({"guid": guid, "file_offset": offset, "length": length, "required": 1})
            for guid, offset, length in regions
        )
        return sealed((head + entries).ljust(REGION_TABLE_SIZE, b"\0"))

    def _items(self) -> list[tuple[uuid.UUID, int, bytes]]:
        """Return the metadata items: identifier, flags, content."""
        layout = self._layout
        disk = IS_VIRTUAL_DISK | IS_REQUIRED
        items = [
            (FILE_PARAMETERS, IS_REQUIRED, FileParameters.build({"block_size": layout.block, "flags": layout.flags})),
            (VIRTUAL_DISK_SIZE, disk, VirtualDiskSize.build({"size": layout.size})),
            (VIRTUAL_DISK_ID, disk, VirtualDiskId.build({"guid": self._identity.uuid("vhdx/disk")})),
            (LOGICAL_SECTOR_SIZE, disk, SectorSize.build({"size": layout.sector})),
            (PHYSICAL_SECTOR_SIZE, disk, SectorSize.build({"size": layout.physical})),
        ]
        if self._locator:
            items.append((PARENT_LOCATOR, IS_REQUIRED, self._locator))
        return items

    def _metadata(self) -> Iterator[Write]:
        items = self._items()
        table = [MetadataTableHeader.build({"reserved": 0, "entry_count": len(items)})]
        offset = METADATA_TABLE_SIZE
        for guid, flags, content in items:
            entry = {"item_id": guid, "offset": offset, "length": len(content), "flags": flags, "reserved": 0}
            table.append(MetadataEntry.build(entry))
            offset += len(content)
        yield Write(0, self._layout.metadata_at, b"".join(table))
        yield Write(0, self._layout.metadata_at + METADATA_TABLE_SIZE, b"".join(content for _, _, content in items))


class FixedAllocator(VhdxAllocator):
    """Every block in its place, in order."""

    unit = _FIXED_GRAIN
    grain = _FIXED_GRAIN
    alignment = _FIXED_GRAIN

    def __init__(self, image: NewImage, layout: Layout) -> None:
        super().__init__(image, layout)
        self._next = layout.data_at + layout.blocks * layout.block

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator."""
        placed = np.zeros(len(runs), PLACED)
        placed["start"] = runs["start"]
        placed["length"] = runs["length"]
        placed["offset"] = runs["start"] + np.uint64(self._layout.data_at)
        placed["kind"] = np.where(runs["kind"] == DATA, DATA, ZERO)
        return placed

    def settle(self, upto: int) -> Iterator[Write]:
        """See Allocator."""
        del upto
        return iter(())

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        for first in range(0, self._layout.blocks, _BLOCKS_AT_ONCE):
            stop = min(first + _BLOCKS_AT_ONCE, self._layout.blocks)
            blocks = np.arange(first, stop, dtype=np.int64)
            self._bat.set_blocks(blocks, self._layout.data_at + blocks * self._layout.block | FULLY_PRESENT)
            yield from self._bat.take(stop)
        yield from super().finish()


class DynamicAllocator(VhdxAllocator):
    """Blocks as they come; nothing for holes, a state alone for zeroes."""

    alignment = MIB

    def __init__(self, image: NewImage, layout: Layout) -> None:
        super().__init__(image, layout)
        self.unit = self.grain = layout.block

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator."""
        block = self._layout.block
        for run in runs[runs["kind"] == ZERO]:
            self._bat_range(int(run["start"]) // block, -(-int(run["start"] + run["length"]) // block), BLOCK_ZERO, 0)
        data = runs[runs["kind"] == DATA]
        placed = np.zeros(len(data), PLACED)
        counts = -(-data["length"].astype(np.int64) // block)
        offsets = self._next + (np.cumsum(counts) - counts) * block
        self._next += int(counts.sum()) * block
        for start, count, offset in zip(data["start"].tolist(), counts.tolist(), offsets.tolist(), strict=True):
            self._bat_range(start // block, start // block + count, offset | FULLY_PRESENT, block)
        for field in ("start", "length", "kind"):
            placed[field] = data[field]
        placed["offset"] = offsets
        return placed

    def _bat_range(self, first: int, stop: int, value: int, step: int) -> None:
        for low in range(first, stop, _BLOCKS_AT_ONCE):
            blocks = np.arange(low, min(low + _BLOCKS_AT_ONCE, stop), dtype=np.int64)
            self._bat.set_blocks(blocks, value + (blocks - first) * step)


class DifferencingAllocator(VhdxAllocator):
    """What differs from a parent: blocks wholly or partially present, the latter told by sector bitmaps."""

    overlay = True

    def __init__(self, image: NewImage, layout: Layout, locator: bytes) -> None:
        super().__init__(image, layout, locator)
        self.unit = layout.block
        self.grain = self.alignment = layout.sector
        self._bitmaps = Bitmaps(layout.sector, layout.block // layout.sector)

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator."""
        starts, lengths, is_data = _pieces(runs[runs["kind"] != ABSENT], self._layout.block)
        if not len(starts):
            return np.zeros(0, PLACED)
        numbers = starts // self._layout.block
        heads = np.flatnonzero(np.diff(numbers, prepend=-1))
        index = np.cumsum(np.diff(numbers, prepend=-1) != 0) - 1
        blocks = numbers[heads]
        room = np.minimum(self._layout.content - blocks * self._layout.block, self._layout.block)
        partial = np.add.reduceat(lengths, heads) < room
        stored = partial | np.logical_or.reduceat(is_data, heads)
        offsets = self._allocate(blocks, partial, stored)
        self._bat.set_blocks(
            blocks, offsets | np.where(partial, PARTIALLY_PRESENT, np.where(stored, FULLY_PRESENT, BLOCK_ZERO))
        )
        inside = partial[index]
        self._bitmaps.add(starts[inside], lengths[inside])
        keep = stored[index]
        placed = np.zeros(int(keep.sum()), PLACED)
        placed["start"] = starts[keep]
        placed["length"] = lengths[keep]
        placed["offset"] = offsets[index][keep] + starts[keep] % self._layout.block
        placed["kind"] = np.where(is_data[keep], DATA, ZERO)
        placed["codec"] = PLAIN
        return placed

    def _allocate(self, blocks: NDArray[np.int64], partial: NDArray[Any], stored: NDArray[Any]) -> NDArray[np.int64]:
        """Return the blocks' offsets, 0 where not stored; a chunk's bitmap comes before its first partial block."""
        chunks, firsts = np.unique(blocks[partial] // self._layout.chunk_ratio, return_index=True)
        fresh = np.array([chunk not in self._bitmaps.places for chunk in chunks.tolist()], bool)
        before = np.zeros(len(blocks), np.int64)
        heads = np.flatnonzero(partial)[firsts[fresh]]
        before[heads] = BITMAP_BLOCK
        sizes = np.where(stored, self._layout.block, 0)
        stops = self._next + np.cumsum(before + sizes)
        offsets = stops - sizes
        for chunk, head in zip(chunks[fresh].tolist(), heads.tolist(), strict=True):
            place = int(offsets[head]) - BITMAP_BLOCK
            self._bitmaps.places[chunk] = place
            self._bat.set_bitmap(chunk, place)
        self._next = int(stops[-1])
        return np.where(stored, offsets, 0)

    def settle(self, upto: int) -> Iterator[Write]:
        """See Allocator."""
        yield from self._bitmaps.take(upto // self._layout.block * self._layout.block)
        yield from super().settle(upto)

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        yield from self._bitmaps.take()
        yield from super().finish()


def _pieces(runs: NDArray[np.void], unit: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return runs cut at multiples of `unit`: start, length, whether they are data."""
    starts = runs["start"].astype(np.int64)
    stops = starts + runs["length"].astype(np.int64)
    first = starts // unit
    counts = -(-stops // unit) - first
    index = np.repeat(np.arange(len(runs)), counts)
    number = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts) + first[index]
    low = np.maximum(starts[index], number * unit)
    high = np.minimum(stops[index], (number + 1) * unit)
    return low, high - low, runs["kind"][index] == DATA


def default_block_size(size: int) -> int:
    """Return a block size that keeps small files small and the BAT of the largest disk at 16 MiB."""
    if size <= 2 * TIB:
        return 2 * MIB
    return 8 * MIB if size <= 8 * TIB else 32 * MIB


def parent_locator(parent: NewParent) -> bytes:
    """Return the item that names the parent (2.6.2.6). Raises OptionError: it is no VHDX, or its name no Unicode."""
    guid = parent.identity.get("data write guid")
    if parent.format != "vhdx" or guid is None:
        raise OptionError(
            f"the parent of a VHDX file must be VHDX, not {parent.format}",
            hint="convert the parent first, or write the overlay as qcow2",
        )
    path = PurePosixPath(parent.unicode_name())
    windows = str(path).replace("/", "\\")
    key = "absolute_win32_path" if path.is_absolute() else "relative_path"
    value = windows if path.is_absolute() or windows.startswith("..") else f".\\{windows}"
    return build_locator({"parent_linkage": f"{{{guid}}}", key: value})


def build_locator(texts: dict[str, str]) -> bytes:
    """Return a parent locator of the VHDX type with these keys and values."""
    head = ParentLocatorHeader.build({"locator_type": VHDX_LOCATOR, "reserved": 0, "key_value_count": len(texts)})
    at = len(head) + ParentLocatorEntry.sizeof() * len(texts)
    entries, content = b"", b""
    for key, value in texts.items():
        words = key.encode("utf-16-le"), value.encode("utf-16-le")
        entries += ParentLocatorEntry.build(
            {
                "key_offset": at + len(content),
                "value_offset": at + len(content) + len(words[0]),
                "key_length": len(words[0]),
                "value_length": len(words[1]),
            }
        )
        content += b"".join(words)
    return head + entries + content


def new_allocator(image: NewImage) -> VhdxAllocator:
    """See FormatModule."""
    if image.codec is not None:
        raise OptionError("VHDX cannot be compressed", hint="use qcow2 or vmdk")
    options = OptionReader("vhdx", image.options)
    subformat = options.text("subformat", "dynamic", ("dynamic", "fixed"))
    block = options.size("block_size", default_block_size(image.size), least=MIN_BLOCK, most=MAX_BLOCK)
    native = "4096" if image.sector_size == 4096 else "512"
    sector = int(options.text("logical_sector_size", native, ("512", "4096")))
    physical = int(options.text("physical_sector_size", "4096", ("512", "4096")))
    log_size = options.size("log_size", MIB, least=MIB, most=256 * MIB, power_of_two=False)
    options.done()
    if log_size % MIB:
        raise OptionError(f"vhdx option log_size={log_size} is not a multiple of 1M")
    size = -(-image.size // sector) * sector
    if size > MAX_DISK:
        raise TargetError(
            "is too large for VHDX", file=image.name, expected=f"at most {MAX_DISK} bytes", found=f"{size} bytes"
        )
    flags = HAS_PARENT if image.parent else LEAVE_BLOCKS_ALLOCATED if subformat == "fixed" else 0
    layout = Layout(image.size, size, block, sector, physical, log_size, flags)
    if image.parent is None:
        return FixedAllocator(image, layout) if subformat == "fixed" else DynamicAllocator(image, layout)
    if subformat == "fixed":
        raise OptionError("a fixed VHDX file has no parent", hint="leave subformat=fixed out")
    return DifferencingAllocator(image, layout, parent_locator(image.parent))
