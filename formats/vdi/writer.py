"""Writing VDI: dynamic, static and differencing images of version 1.1, laid out as VirtualBox wants them."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.allocator import PLACED, Allocator, NewImage, Option, OptionReader, Write
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.extents import DATA
from diskmorph.formats.extents import ZERO as ZERO_KIND
from diskmorph.formats.vdi.schema import (
    DIFFERENCING,
    DYNAMIC,
    FREE,
    POINTER,
    STATIC,
    VERSION_1_1,
    ZERO,
    Header,
    build_header,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

OPTIONS = (
    Option("static", "on|off", "off", "store every block, in order (VirtualBox's fixed size)"),
    Option("block_size", "SIZE", "1M", "bytes allocated together; QEMU reads 1M alone"),
    Option("preallocation", "off|falloc|full", "off", "of static images: reserve the target's room, or write it all"),
)
SUBFORMATS = ("dynamic", "static", "differencing")

_MAP_OFFSET = 512
_DATA_ALIGN = 1 << 20  # as VirtualBox aligns data
_WINDOW = 1 << 16  # map entries written at once: 256 KiB
_WINDOWS = 16  # settled at once: 4 MiB
_NO_UUID = uuid.UUID(int=0)

# Blocks that have an entry of their own: `count` of them from number `first`; `pointer` is the first one's place.
_RUN = np.dtype([("first", "<u8"), ("count", "<u8"), ("pointer", "<u4"), ("zero", "?")])


class VdiAllocator(Allocator):
    """Dynamic and differencing images: blocks lie in the order in which they come."""

    def __init__(self, image: NewImage, type: int, block_size: int) -> None:
        self.size = -(-image.size // self.sector_size) * self.sector_size
        self.unit = self.grain = block_size
        self.members = (image.name,)
        self.overlay = type == DIFFERENCING
        self.alignment = min(block_size, _DATA_ALIGN)
        self._blocks = max(-(-self.size // block_size), 1)
        if self._blocks >= ZERO:
            raise TargetError(
                f"a VDI holds at most {ZERO} blocks, of {block_size} bytes here", hint="choose a larger block_size"
            )
        map_end = _MAP_OFFSET + self._blocks * POINTER.itemsize
        self._data_offset = -(-map_end // _DATA_ALIGN) * _DATA_ALIGN
        self._type = type
        self._image = image
        self._allocated = 0
        self._runs: list[NDArray[np.void]] = []
        self._written = 0  # blocks whose map entries were yielded

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator."""
        kept = runs[(runs["kind"] == DATA) | (runs["kind"] == ZERO_KIND)]
        data = kept["kind"] == DATA
        noted = np.zeros(len(kept), _RUN)
        noted["first"] = kept["start"] // np.uint64(self.unit)
        ends = kept["start"] + kept["length"] + np.uint64(self.unit - 1)
        noted["count"] = ends // np.uint64(self.unit) - noted["first"]
        noted["zero"] = ~data
        counts = np.where(data, noted["count"], np.uint64(0))
        firsts = self._allocated + np.cumsum(counts) - counts
        noted["pointer"] = np.where(data, firsts, 0)
        self._allocated += int(counts.sum())
        if len(noted):
            self._runs.append(noted)
        placed = np.zeros(int(data.sum()), PLACED)
        placed["start"], placed["length"] = kept["start"][data], kept["length"][data]
        placed["offset"] = np.uint64(self._data_offset) + firsts[data].astype(np.uint64) * np.uint64(self.unit)
        placed["kind"] = DATA
        return placed

    def settle(self, upto: int) -> Iterator[Write]:
        """See Allocator: whole windows of the map, not too many at once where a large hole was passed."""
        windows = min((upto // self.unit - self._written) // _WINDOW, _WINDOWS)
        if windows > 0:
            yield from self._map(self._written + windows * _WINDOW)

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        yield from self._map(self._blocks)
        yield Write(0, 0, build_header(self._header()))

    def sizes(self) -> Sequence[int]:
        """See Allocator."""
        return (self._data_offset + self._allocated * self.unit,)

    def _map(self, stop: int) -> Iterator[Write]:
        """Yield the map entries from where it was written last to block `stop`."""
        runs = np.concatenate(self._runs) if self._runs else np.zeros(0, _RUN)
        ends = runs["first"] + runs["count"]
        while self._written < stop:
            low, high = self._written, min(self._written + _WINDOW, stop)
            first = int(np.searchsorted(ends, np.uint64(low), side="right"))
            last = int(np.searchsorted(runs["first"], np.uint64(high), side="left"))
            entries = _entries(runs[first:last], low, high)
            yield Write(0, _MAP_OFFSET + low * POINTER.itemsize, entries.tobytes())
            self._written = high
        self._runs = [runs[int(np.searchsorted(ends, np.uint64(stop), side="right")) :]]

    def _header(self) -> Header:
        parent = self._image.parent.identity if self._image.parent is not None else {}
        identity = self._image.identity
        # With --reproducible a child may have its parent's seed; its identity must be another one.
        over = parent.get("modify uuid")
        return Header(
            version=VERSION_1_1,
            type=self._type,
            flags=0,
            comment="",
            map_offset=_MAP_OFFSET,
            data_offset=self._data_offset,
            disk_size=self.size,
            block_size=self.unit,
            block_extra=0,
            blocks=self._blocks,
            blocks_allocated=self._allocated,
            allocated_at=0,
            create_uuid=identity.uuid(f"vdi create over {over}"),
            modify_uuid=identity.uuid(f"vdi modify over {over}"),
            linkage_uuid=uuid.UUID(parent["uuid"]) if parent else _NO_UUID,
            parent_modify_uuid=uuid.UUID(parent["modify uuid"]) if parent else _NO_UUID,
        )


def _entries(runs: NDArray[np.void], low: int, high: int) -> NDArray[np.uint32]:
    """Return the map entries of blocks low..high from the (sorted) runs that reach into that range."""
    entries = np.full(high - low, FREE, POINTER)
    begins = np.maximum(runs["first"], np.uint64(low))
    counts = (np.minimum(runs["first"] + runs["count"], np.uint64(high)) - begins).astype(np.int64)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    skipped = (begins - runs["first"]).astype(np.int64)
    pointers = np.repeat(runs["pointer"] + skipped, counts) + within
    entries[np.repeat((begins - np.uint64(low)).astype(np.int64), counts) + within] = np.where(
        np.repeat(runs["zero"], counts), ZERO, pointers
    )
    return entries


class StaticAllocator(VdiAllocator):
    """Static images: every block has its place, in order; so header and map come first and a pipe can take it."""

    sequential = True

    def __init__(self, image: NewImage, block_size: int, preallocation: str) -> None:
        super().__init__(image, STATIC, block_size)
        self.preallocation = preallocation
        self._allocated = self._blocks

    def begin(self) -> Iterator[Write]:
        """See Allocator."""
        yield Write(0, 0, build_header(self._header()))
        for low in range(0, self._blocks, _WINDOW):
            entries = np.arange(low, min(low + _WINDOW, self._blocks), dtype=POINTER)
            yield Write(0, _MAP_OFFSET + low * POINTER.itemsize, entries.tobytes())

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator: what is not data has a place, too."""
        placed = np.zeros(len(runs), PLACED)
        placed["start"], placed["length"] = runs["start"], runs["length"]
        placed["offset"] = runs["start"] + np.uint64(self._data_offset)
        placed["kind"] = np.where(runs["kind"] == DATA, DATA, ZERO_KIND)
        return placed

    def settle(self, upto: int) -> Iterator[Write]:
        """See Allocator: all is written at the beginning."""
        del upto
        return iter(())

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        return iter(())


def new_allocator(image: NewImage) -> VdiAllocator:
    """See FormatModule."""
    options = OptionReader("vdi", image.options)
    static = options.flag("static")
    block_size = options.size("block_size", 1 << 20, least=4 << 10, most=256 << 20)
    preallocation = options.text("preallocation", "off", ("off", "falloc", "full"))
    options.done()
    if image.codec is not None:
        raise OptionError("vdi cannot be compressed", hint="use qcow2 or vmdk")
    if not image.size:
        raise TargetError("a VDI cannot hold a disk of 0 bytes")
    if image.parent is not None:
        if static:
            raise OptionError("a static VDI has no parent", hint="leave static=on away")
        if not {"uuid", "modify uuid"} <= set(image.parent.identity):
            raise OptionError(f"a VDI's parent must be a VDI, not {image.parent.format}")
    if static:
        return StaticAllocator(image, block_size, preallocation)
    if preallocation != "off":
        raise OptionError(f"vdi option preallocation={preallocation} needs static=on")
    return VdiAllocator(image, DYNAMIC if image.parent is None else DIFFERENCING, block_size)
