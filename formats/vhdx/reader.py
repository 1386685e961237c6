"""Reading VHDX: from headers, log, regions and metadata to a disk whose BAT is streamed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.disk import ImageDisk, ImageInfo, ParentRef
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, EXTENT, HOLE, ZERO, clip, require_within
from diskmorph.formats.vhdx.headers import (
    current_header,
    has_log,
    header_copies,
    parse_regions,
    read_creator,
    region_copies,
    require_one,
)
from diskmorph.formats.vhdx.log import Log
from diskmorph.formats.vhdx.metadata import read_metadata
from diskmorph.formats.vhdx.schema import (
    BAT_ENTRY,
    BAT_REGION,
    BITMAP_BLOCK,
    BITMAP_PRESENT,
    BLOCK_ZERO,
    FULLY_PRESENT,
    HEADER_SECTION,
    METADATA_REGION,
    NOT_PRESENT,
    OFFSET_MASK,
    PARTIALLY_PRESENT,
    STATE_MASK,
    UNDEFINED,
    UNMAPPED,
    UNMAPPED_OLD,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.vhdx.headers import Copy, Region
    from diskmorph.formats.vhdx.metadata import Metadata

_BATCH_BLOCKS = 1 << 16
_BATCH_BITS = 1 << 18
"""Sectors of partially present blocks that are told apart at once: each may become an extent of its own."""
RESERVED_STATE, _PARTIAL = 255, 254


@dataclass(frozen=True, slots=True)
class Opened:
    """What the structures of a file say; `source` has the log replayed."""

    source: ByteSource
    creator: str
    header: Copy
    bat: Region
    metadata: Metadata
    warnings: tuple[str, ...]


def open_structures(source: ByteSource, context: OpenContext) -> Opened:
    """Read and check everything in front of the BAT. Raises FormatError and UnsupportedError."""
    warnings: list[str] = []
    creator = read_creator(source)
    headers = header_copies(source)
    header = current_header(headers)
    warnings += [f"{copy.name}: {copy.fault}; the other one is used" for copy in headers if not copy.valid]
    if has_log(header):
        source = Log(source, header, context.limits).replay()
        warnings.append("was not closed properly: its log is replayed in memory, the file stays as it is")
    tables = region_copies(source)
    regions = parse_regions(require_one(tables, "region table")[0])
    warnings += [f"{copy.name}: {copy.fault}; the other one is used" for copy in tables if not copy.valid]
    metadata = read_metadata(source, regions[METADATA_REGION])
    bat = regions[BAT_REGION]
    _require_bat(bat, metadata, source)
    return Opened(source, creator, header, bat, metadata, tuple(warnings))


def _require_bat(bat: Region, metadata: Metadata, source: ByteSource) -> None:
    need = metadata.bat_entries * BAT_ENTRY.itemsize
    if need > bat.length:
        raise FormatError(
            "the BAT region is too small for the disk",
            structure="region table",
            field="length",
            expected=f"{need} bytes",
            found=bat.length,
        )
    if bat.offset + need > source.size:
        raise FormatError(
            "the BAT lies beyond the end of the file: it is truncated",
            structure="BAT",
            offset=bat.offset,
            expected=f"{need} bytes",
            found=f"the end at {source.size}",
        )


def kinds_of_states(*, has_parent: bool) -> NDArray[np.uint8]:
    """Return the kind of each payload block state (2.5.1.1); 255 for the reserved ones.

    In a differencing disk only NOT_PRESENT asks the parent: the other states without data read as zeroes.
    """
    empty = ZERO if has_parent else HOLE
    kinds = np.full(8, RESERVED_STATE, np.uint8)
    kinds[NOT_PRESENT] = ABSENT if has_parent else HOLE
    kinds[[UNDEFINED, UNMAPPED, UNMAPPED_OLD]] = empty
    kinds[BLOCK_ZERO] = ZERO
    kinds[FULLY_PRESENT] = DATA
    if has_parent:
        kinds[PARTIALLY_PRESENT] = DATA
    return kinds


class VhdxDisk(ImageDisk):
    """A VHDX file as one layer."""

    format = "vhdx"

    def __init__(self, opened: Opened) -> None:
        meta = opened.metadata
        self._opened = opened
        self._meta = meta
        self._kinds = kinds_of_states(has_parent=meta.has_parent)
        self.size = meta.size
        self.sector_size = meta.sector_size
        self.files = (opened.source,)
        self.name = opened.source.name
        self.identity = {"data write guid": str(opened.header.fields.data_write_guid)}
        self.info = _info(opened)

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        block = self._meta.block_size
        last = -(-stop // block)
        for first in range(start // block, last, _BATCH_BLOCKS):
            entries = self._payload_entries(first, min(first + _BATCH_BLOCKS, last))
            states = entries & np.uint64(STATE_MASK)
            for rows in self._rows(first, states, entries & np.uint64(OFFSET_MASK)):
                part = clip(rows, start, stop)
                self._require_places(part)
                yield part

    def _payload_entries(self, first: int, last: int) -> NDArray[np.uint64]:
        """Return the BAT entries of the blocks first..last, the sector bitmap entries between them left out."""
        ratio = self._meta.chunk_ratio
        begin = first + first // ratio
        entries = self._entries(begin, last - 1 + (last - 1) // ratio + 1)
        if first // ratio == (last - 1) // ratio:
            return entries
        numbers = np.arange(begin, begin + len(entries))
        payload: NDArray[np.uint64] = entries[numbers % (ratio + 1) != ratio]
        return payload

    def _entries(self, begin: int, end: int) -> NDArray[np.uint64]:
        size = BAT_ENTRY.itemsize
        table = self.files[0].read(self._opened.bat.offset + begin * size, (end - begin) * size)
        return np.frombuffer(table, BAT_ENTRY)

    def _rows(self, first: int, states: NDArray[Any], offsets: NDArray[Any]) -> Iterator[NDArray[np.void]]:
        kinds = self._kinds[states]
        bad = np.flatnonzero(kinds == RESERVED_STATE)
        if len(bad):
            self._refuse_state(first + int(bad[0]), int(states[bad[0]]))
        partial = np.flatnonzero(states == PARTIALLY_PRESENT)
        at_once = max(1, _BATCH_BITS * self.sector_size // self._meta.block_size)
        bounds = [0, *partial[at_once::at_once].tolist(), len(states)]
        marked = np.where(states == PARTIALLY_PRESENT, _PARTIAL, kinds)
        for low, high in pairwise(bounds):
            rows = self._whole_rows(first + low, marked[low:high], offsets[low:high])
            inner = partial[(partial >= low) & (partial < high)]
            if len(inner):
                fine = self._partial_rows(first + inner, offsets[inner])
                rows = np.concatenate((rows[rows["kind"] != _PARTIAL], fine))
                rows = rows[np.argsort(rows["start"], kind="stable")]
            yield rows

    def _whole_rows(self, first: int, kinds: NDArray[Any], offsets: NDArray[Any]) -> NDArray[np.void]:
        """Return the extents of blocks of one kind each, merged before they become rows: most BATs are long runs."""
        block = np.uint64(self._meta.block_size)
        heads = np.ones(len(kinds), bool)
        heads[1:] = (kinds[1:] != kinds[:-1]) | ((kinds[1:] == DATA) & (offsets[1:] - offsets[:-1] != block))
        index = np.flatnonzero(heads)
        rows = np.zeros(len(index), EXTENT)
        rows["start"] = (first + index).astype(np.uint64) * block
        rows["length"] = np.diff(index, append=len(kinds)).astype(np.uint64) * block
        rows["kind"] = kinds[index]
        rows["offset"] = np.where(rows["kind"] == DATA, offsets[index], np.uint64(0))
        return rows

    def _partial_rows(self, blocks: NDArray[Any], offsets: NDArray[Any]) -> NDArray[np.void]:
        """Return the extents of partially present blocks: DATA where the sector's bit is 1, else ABSENT (2.4)."""
        per_block = self._meta.block_size // self.sector_size
        bits = np.unpackbits(self._bitmaps(blocks, per_block // 8), axis=1, bitorder="little")
        change = np.ones(bits.shape, bool)
        change[:, 1:] = bits[:, 1:] != bits[:, :-1]
        heads = np.flatnonzero(change)
        block, sector = np.divmod(heads, per_block)
        present = bits.reshape(-1)[heads] == 1
        rows = np.zeros(len(heads), EXTENT)
        within = (sector * self.sector_size).astype(np.uint64)
        rows["start"] = (blocks[block] * self._meta.block_size).astype(np.uint64) + within
        rows["length"] = np.diff(heads, append=bits.size) * self.sector_size
        rows["kind"] = np.where(present, DATA, ABSENT)
        rows["offset"] = np.where(present, offsets[block] + within, np.uint64(0))
        return rows

    def _bitmaps(self, blocks: NDArray[Any], size: int) -> NDArray[np.uint8]:
        """Return the part of the sector bitmap, `size` bytes, of each of the ascending `blocks`."""
        chunks, places = np.divmod(blocks, self._meta.chunk_ratio)
        out = np.empty((len(blocks), size), np.uint8)
        for chunk in np.unique(chunks).tolist():
            mine = np.flatnonzero(chunks == chunk)
            low = int(places[mine[0]])
            high = int(places[mine[-1]]) + 1
            data = self.files[0].read(self._bitmap_offset(chunk) + low * size, (high - low) * size)
            out[mine] = np.frombuffer(data, np.uint8).reshape(-1, size)[places[mine] - low]
        return out

    def _bitmap_offset(self, chunk: int) -> int:
        number = chunk * (self._meta.chunk_ratio + 1) + self._meta.chunk_ratio
        entry = int(self._entries(number, number + 1)[0])
        offset = entry & OFFSET_MASK
        inside = HEADER_SECTION <= offset <= self.files[0].size - BITMAP_BLOCK
        if entry & STATE_MASK == BITMAP_PRESENT and inside:
            return offset
        raise FormatError(
            f"the sector bitmap of chunk {chunk} is missing or beyond the end, though blocks are partially present",
            file=self.name,
            format=self.format,
            structure="BAT",
            field="sector bitmap entry",
            offset=self._opened.bat.offset + BAT_ENTRY.itemsize * number,
            expected=f"state {BITMAP_PRESENT} within the file",
            found=f"state {entry & STATE_MASK} at {offset}",
        )

    def _refuse_state(self, block: int, state: int) -> None:
        number = block + block // self._meta.chunk_ratio
        raise FormatError(
            f"the BAT entry of block {block} has a state that is not valid here",
            file=self.name,
            format=self.format,
            structure="BAT",
            field="state",
            offset=self._opened.bat.offset + BAT_ENTRY.itemsize * number,
            found=state,
        )

    def _require_places(self, rows: NDArray[np.void]) -> None:
        low = np.flatnonzero((rows["kind"] == DATA) & (rows["offset"] < HEADER_SECTION))
        if len(low):
            block = int(rows["start"][low[0]]) // self._meta.block_size
            raise FormatError(
                f"block {block} lies in the header section",
                file=self.name,
                format=self.format,
                structure="BAT",
                field="file offset",
                offset=self._opened.bat.offset + BAT_ENTRY.itemsize * (block + block // self._meta.chunk_ratio),
                expected=f"at least {HEADER_SECTION}",
                found=int(rows["offset"][low[0]]),
            )
        require_within(rows, [self.files[0].size], file=self.name, format=self.format, structure="block")


def _info(opened: Opened) -> ImageInfo:
    meta = opened.metadata
    subformat = "differencing" if meta.has_parent else "fixed" if meta.leave_blocks_allocated else "dynamic"
    features = {
        "physical_sector_size": meta.physical_sector_size,
        "data_write_guid": str(opened.header.fields.data_write_guid),
        "virtual_disk_id": None if meta.disk_id is None else str(meta.disk_id),
        "creator": opened.creator,
        "log_pending": has_log(opened.header),
        "log_size": int(opened.header.fields.log_length),
    }
    return ImageInfo(
        "vhdx",
        subformat,
        meta.size,
        meta.sector_size,
        meta.block_size,
        features,
        parent=parent_of(meta.locator) if meta.has_parent else None,
        warnings=opened.warnings,
    )


def parent_of(locator: Mapping[str, str]) -> ParentRef:
    """Return the parent that a locator names (2.6.2.6.3), with Windows' separators made the local ones.

    Raises FormatError without a parent_linkage, which the parent's DataWriteGuid must equal.
    """
    linkage = tuple(locator[key].strip("{}").lower() for key in ("parent_linkage", "parent_linkage2") if key in locator)
    if not linkage:
        raise FormatError(
            "the parent locator does not say which parent is the right one",
            structure="parent locator",
            field="parent_linkage",
            expected="a GUID",
            found="nothing",
        )
    return ParentRef(tuple(_parent_names(locator)), "vhdx", {"data write guid": linkage})


def _parent_names(locator: Mapping[str, str]) -> list[str]:
    """Return file names in the order in which they are to be tried; last the parent's bare name, beside the image."""
    names: list[str] = []
    for key in ("relative_path", "volume_path", "absolute_win32_path"):
        path = PureWindowsPath(locator.get(key, "").removeprefix("\\\\?\\"))
        if not path.name:
            continue
        names.append(path.as_posix())
        if path.drive:
            names.append(path.relative_to(path.anchor).as_posix() if path.anchor else path.as_posix())
        names.append(path.name)
    return list(dict.fromkeys(names))


def open_image(source: ByteSource, context: OpenContext) -> VhdxDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(f"VHDX has no snapshot {context.snapshot!r}", feature="snapshots")
    return VhdxDisk(open_structures(source, context))
