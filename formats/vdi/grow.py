"""A larger disk in a dynamic VDI: its size and number of blocks, and entries between its block map and its data."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from diskmorph.formats.check import Patch
from diskmorph.formats.fields import fields_of
from diskmorph.formats.vdi.reader import read_header
from diskmorph.formats.vdi.schema import (
    DYNAMIC,
    FREE,
    HEADER1,
    HEADER1_PLUS_SIZE,
    POINTER,
    PREHEADER_SIZE,
)

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource

_GAP = {0x00, 0xFF}
"""What lies behind the map of an image whose gap nobody uses."""


def growth_patches(source: ByteSource, size: int) -> list[Patch] | None:
    """See convert.growing."""
    header = read_header(source)
    if header.type != DYNAMIC or header.version >> 16 != 1:
        return None
    blocks = -(-size // header.block_size)
    stop = header.map_offset + blocks * POINTER.itemsize
    added = max(stop - header.map_end, 0)
    if stop > header.data_offset or not set(source.read(header.map_end, added)) <= _GAP:
        return None
    found = HEADER1.parse(source.read_upto(PREHEADER_SIZE, HEADER1_PLUS_SIZE))
    fields = fields_of(found)
    fields |= {"disk_size": size, "blocks": max(blocks, header.blocks), "modify_uuid": uuid.uuid4()}
    why = f"the disk becomes {size} bytes large"
    entries = FREE.to_bytes(POINTER.itemsize, "little") * (added // POINTER.itemsize)
    return [Patch(header.map_end, entries, why), Patch(PREHEADER_SIZE, HEADER1.build(fields), why, sync=True)]
