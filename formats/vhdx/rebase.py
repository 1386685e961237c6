"""Another parent for a differencing VHDX: its parent locator, written through the file's own log."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import TargetError, UnsupportedError
from diskmorph.formats.vhdx import logged
from diskmorph.formats.vhdx.metadata import read_items, read_metadata
from diskmorph.formats.vhdx.schema import (
    LOG_SECTOR,
    METADATA_DTYPE,
    METADATA_REGION,
    METADATA_TABLE_SIZE,
    PARENT_LOCATOR,
    MetadataEntry,
    MetadataTableHeader,
)
from diskmorph.formats.vhdx.writer import parent_locator

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewParent
    from diskmorph.formats.check import Patch
    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.vhdx.headers import Region


def parent_patches(source: ByteSource, parent: NewParent) -> list[Patch]:
    """Return what makes `parent` the image's parent.

    Raises OptionError (it is no VHDX), TargetError (no room for its name), UnsupportedError (its log must be replayed
    first, or it has no parent).
    """
    item = parent_locator(parent)
    region = logged.regions_of_closed(source, "rebase")[METADATA_REGION]
    if not read_metadata(source, region).has_parent:
        raise UnsupportedError("is no differencing VHDX", feature="rebase", file=source.name, format="vhdx")
    return logged.patches(source, _sectors(source, region, item), f"the parent becomes {parent.name}")


def _sectors(source: ByteSource, region: Region, item: bytes) -> dict[int, bytes]:
    """Return the sectors of the metadata region that change, by their places in the file."""
    table = bytearray(source.read(region.offset, METADATA_TABLE_SIZE))
    count = MetadataTableHeader.parse(bytes(table)).entry_count
    rows = np.frombuffer(bytes(table), METADATA_DTYPE, count, MetadataTableHeader.sizeof())
    number = next(i for i, row in enumerate(rows) if uuid.UUID(bytes_le=row["item_id"].tobytes()) == PARENT_LOCATOR)
    offset = int(rows["offset"][number])
    assert region.offset + offset == read_items(source, region)[PARENT_LOCATOR].offset  # noqa: S101 - the same table
    ends = np.delete(rows["offset"].astype(np.int64) + rows["length"], number)
    later = np.delete(rows["offset"], number)
    room = int(min(later[later > offset], default=region.length)) - offset
    if len(item) > room:
        offset = -(-max(int(ends.max()), offset) // LOG_SECTOR) * LOG_SECTOR
        if offset < METADATA_TABLE_SIZE or offset + len(item) > region.length:
            raise TargetError("the metadata region has no room for the parent's name", file=source.name, format="vhdx")
    entry = MetadataTableHeader.sizeof() + MetadataEntry.sizeof() * number
    words = {"item_id": PARENT_LOCATOR, "offset": offset, "length": len(item), "reserved": 0}
    table[entry : entry + MetadataEntry.sizeof()] = MetadataEntry.build(words | {"flags": int(rows["flags"][number])})
    low = entry // LOG_SECTOR * LOG_SECTOR
    found = {region.offset + low: bytes(table[low : low + LOG_SECTOR])}
    return found | logged.sectors(source, region.offset + offset, item)
