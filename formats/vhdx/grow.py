"""A larger disk in a VHDX: its size in the metadata, behind it entries of the BAT that are free already."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from diskmorph.formats.vhdx import logged
from diskmorph.formats.vhdx.metadata import read_items, read_metadata
from diskmorph.formats.vhdx.schema import (
    BAT_ENTRY,
    BAT_REGION,
    MAX_DISK,
    METADATA_REGION,
    VIRTUAL_DISK_SIZE,
    VirtualDiskSize,
)

if TYPE_CHECKING:
    from diskmorph.formats.check import Patch
    from diskmorph.formats.source import ByteSource


def growth_patches(source: ByteSource, size: int) -> list[Patch] | None:
    """See convert.growing. Raises UnsupportedError where the log must be replayed first."""
    regions = logged.regions_of_closed(source, "resize")
    bat, region = regions[BAT_REGION], regions[METADATA_REGION]
    now = read_metadata(source, region)
    if now.has_parent or now.leave_blocks_allocated or size > MAX_DISK or size % now.sector_size:
        return None
    first, stop = (meta.bat_entries * BAT_ENTRY.itemsize for meta in (now, replace(now, size=size)))
    if stop > bat.length or source.read(bat.offset + first, stop - first).strip(b"\0"):
        return None
    item = read_items(source, region)[VIRTUAL_DISK_SIZE]
    changed = logged.sectors(source, item.offset, VirtualDiskSize.build({"size": size}))
    # Before what a guest can see changes, its size too, the GUID that children know it by must (2.2.2).
    return logged.patches(source, changed, f"the disk becomes {size} bytes large", data_write_guid=uuid.uuid4())
