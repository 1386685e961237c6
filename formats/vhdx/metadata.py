"""The metadata region: its table and the items that it lists (2.6)."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from construct import ConstructError

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.vhdx.schema import (
    CHUNK_SECTORS,
    FILE_PARAMETERS,
    HAS_PARENT,
    IS_REQUIRED,
    LEAVE_BLOCKS_ALLOCATED,
    LOCATOR_ENTRY_DTYPE,
    LOGICAL_SECTOR_SIZE,
    MAX_BLOCK,
    MAX_DISK,
    MAX_ENTRIES,
    METADATA_DTYPE,
    METADATA_ITEM_LIMIT,
    METADATA_TABLE_SIZE,
    MIN_BLOCK,
    PARENT_LOCATOR,
    PHYSICAL_SECTOR_SIZE,
    SECTOR_SIZES,
    VHDX_LOCATOR,
    VIRTUAL_DISK_ID,
    VIRTUAL_DISK_SIZE,
    FileParameters,
    MetadataTableHeader,
    ParentLocatorHeader,
    SectorSize,
    VirtualDiskId,
    VirtualDiskSize,
    bat_entries,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.vhdx.headers import Region

ITEM_NAMES = {
    FILE_PARAMETERS: "file parameters",
    VIRTUAL_DISK_SIZE: "virtual disk size",
    VIRTUAL_DISK_ID: "virtual disk ID",
    LOGICAL_SECTOR_SIZE: "logical sector size",
    PHYSICAL_SECTOR_SIZE: "physical sector size",
    PARENT_LOCATOR: "parent locator",
}
_LOCATOR_ENTRIES = 64  # five keys are defined


@dataclass(frozen=True, slots=True)
class Item:
    """Where a metadata item lies in the file."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the metadata items say. Sizes in bytes."""

    size: int
    block_size: int
    leave_blocks_allocated: bool
    has_parent: bool
    sector_size: int
    physical_sector_size: int
    disk_id: uuid.UUID | None
    locator: Mapping[str, str]

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks that one sector bitmap block describes (2.4)."""
        return CHUNK_SECTORS * self.sector_size // self.block_size

    @property
    def blocks(self) -> int:
        """Payload blocks of the disk."""
        return -(-self.size // self.block_size)

    @property
    def bat_entries(self) -> int:
        """Entries of the BAT, sector bitmap entries included."""
        return bat_entries(self.blocks, self.chunk_ratio, differencing=self.has_parent)


def read_items(source: ByteSource, region: Region) -> dict[uuid.UUID, Item]:
    """Return the items that the metadata table lists, those that we know.

    Raises FormatError where the table is damaged, UnsupportedError for an unknown item that is required, by its GUID.
    """
    block = source.read(region.offset, METADATA_TABLE_SIZE)
    try:
        header = MetadataTableHeader.parse(block)
    except ConstructError:
        raise FormatError(
            "the metadata table's signature is wrong",
            structure="metadata table",
            field="signature",
            offset=region.offset,
            expected="metadata",
            found=repr(block[:8])[1:],
        ) from None
    if header.entry_count > MAX_ENTRIES:
        raise FormatError(
            "the metadata table has too many entries",
            structure="metadata table",
            field="entry_count",
            offset=region.offset + 10,
            expected=f"at most {MAX_ENTRIES}",
            found=header.entry_count,
        )
    rows = np.frombuffer(block, METADATA_DTYPE, header.entry_count, MetadataTableHeader.sizeof())
    items: dict[uuid.UUID, Item] = {}
    for number, (raw, offset, length, flags, _) in enumerate(rows.tolist()):
        at = region.offset + 32 + 32 * number
        guid = uuid.UUID(bytes_le=raw)
        if guid not in ITEM_NAMES:
            _require_optional(guid, flags, at)
            continue
        if guid in items:
            raise FormatError(
                f"the {ITEM_NAMES[guid]} stands twice in the metadata table",
                structure="metadata table",
                field="item_id",
                offset=at,
            )
        _require_inside(ITEM_NAMES[guid], offset, length, region, at)
        items[guid] = Item(ITEM_NAMES[guid], region.offset + offset, length)
    return items


def _require_optional(guid: uuid.UUID, flags: int, at: int) -> None:
    if flags & IS_REQUIRED:
        raise UnsupportedError(
            f"needs the metadata item {guid}, which is not known",
            feature=f"metadata item {guid}",
            structure="metadata table",
            field="item_id",
            offset=at,
        )


def _require_inside(name: str, offset: int, length: int, region: Region, at: int) -> None:
    inside = offset >= METADATA_TABLE_SIZE and offset + length <= region.length
    if inside and 0 < length <= METADATA_ITEM_LIMIT:
        return
    raise FormatError(
        f"the {name} lies outside the metadata region",
        structure="metadata table",
        field="offset",
        offset=at + 16,
        expected=f"within {METADATA_TABLE_SIZE}..{region.length}",
        found=f"{length} bytes at {offset}",
    )


def read_metadata(source: ByteSource, region: Region) -> Metadata:
    """Return what the metadata region says. Raises FormatError and UnsupportedError."""
    items = read_items(source, region)
    parameters = _value(source, items, FILE_PARAMETERS, FileParameters)
    logical = int(_value(source, items, LOGICAL_SECTOR_SIZE, SectorSize).size)
    physical = int(_value(source, items, PHYSICAL_SECTOR_SIZE, SectorSize).size)
    size = int(_value(source, items, VIRTUAL_DISK_SIZE, VirtualDiskSize).size)
    disk_id = _value(source, items, VIRTUAL_DISK_ID, VirtualDiskId).guid if VIRTUAL_DISK_ID in items else None
    block = int(parameters.block_size)
    _require(MIN_BLOCK <= block <= MAX_BLOCK and not block & (block - 1), items[FILE_PARAMETERS], "block_size", block)
    _require(logical in SECTOR_SIZES, items[LOGICAL_SECTOR_SIZE], "size", logical)
    _require(physical in SECTOR_SIZES, items[PHYSICAL_SECTOR_SIZE], "size", physical)
    _require(size <= MAX_DISK and size % logical == 0, items[VIRTUAL_DISK_SIZE], "size", size)
    has_parent = bool(parameters.flags & HAS_PARENT)
    if has_parent and PARENT_LOCATOR not in items:
        raise FormatError(
            "is a differencing disk without a parent locator", structure="metadata table", offset=region.offset
        )
    locator = read_locator(source, items[PARENT_LOCATOR]) if has_parent else {}
    leave = bool(parameters.flags & LEAVE_BLOCKS_ALLOCATED)
    return Metadata(size, block, leave, has_parent, logical, physical, disk_id, locator)


def _value(source: ByteSource, items: Mapping[uuid.UUID, Item], guid: uuid.UUID, schema: Any) -> Any:
    item = items.get(guid)
    if item is None:
        raise FormatError(f"has no {ITEM_NAMES[guid]}", structure="metadata table", field="item_id")
    if item.length < schema.sizeof():
        raise FormatError(
            f"the {item.name} is too short",
            structure=item.name,
            offset=item.offset,
            expected=f"{schema.sizeof()} bytes",
            found=item.length,
        )
    return schema.parse(source.read(item.offset, schema.sizeof()))


def _require(good: bool, item: Item, field: str, found: int) -> None:
    if not good:
        raise FormatError(
            f"the {item.name} is out of range", structure=item.name, field=field, offset=item.offset, found=found
        )


def read_locator(source: ByteSource, item: Item) -> dict[str, str]:
    """Return the keys and values of a VHDX parent locator (2.6.2.6).

    Raises UnsupportedError for another type of locator, FormatError where entries lie outside it.
    """
    block = source.read(item.offset, item.length)
    if len(block) < ParentLocatorHeader.sizeof():
        raise FormatError("the parent locator is too short", structure=item.name, offset=item.offset, found=len(block))
    header = ParentLocatorHeader.parse(block)
    if header.locator_type != VHDX_LOCATOR:
        raise UnsupportedError(
            f"names its parent by a locator of type {header.locator_type}, which is not known",
            feature=f"parent locator {header.locator_type}",
            structure=item.name,
            field="locator_type",
            offset=item.offset,
        )
    count = int(header.key_value_count)
    room = (len(block) - ParentLocatorHeader.sizeof()) // LOCATOR_ENTRY_DTYPE.itemsize
    if count > min(room, _LOCATOR_ENTRIES):
        raise FormatError(
            "the parent locator has too many entries",
            structure=item.name,
            field="key_value_count",
            offset=item.offset + 18,
            expected=f"at most {min(room, _LOCATOR_ENTRIES)}",
            found=count,
        )
    rows = np.frombuffer(block, LOCATOR_ENTRY_DTYPE, count, ParentLocatorHeader.sizeof())
    texts: dict[str, str] = {}
    for number, (key_at, value_at, key_length, value_length) in enumerate(rows.tolist()):
        at = item.offset + ParentLocatorHeader.sizeof() + LOCATOR_ENTRY_DTYPE.itemsize * number
        key = _text(block, key_at, key_length, item, at)
        texts[key] = _text(block, value_at, value_length, item, at + 4)
    return texts


def _text(block: bytes, offset: int, length: int, item: Item, at: int) -> str:
    if offset + length > len(block) or length % 2:
        raise FormatError(
            "a text of the parent locator lies outside it",
            structure=item.name,
            field="offset",
            offset=at,
            expected=f"within {len(block)} bytes",
            found=f"{length} bytes at {offset}",
        )
    return block[offset : offset + length].decode("utf-16-le", "replace")
