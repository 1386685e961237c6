"""A larger disk in a fixed VHD: its footer, moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.check import Patch
from diskmorph.formats.fields import fields_of
from diskmorph.formats.vhd.footer import read_footers
from diskmorph.formats.vhd.schema import FIXED, MOST_BYTES, SECTOR, WRITTEN_BY, build_footer, geometry

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource


def growth_patches(source: ByteSource, size: int) -> list[Patch] | None:
    """See convert.growing."""
    found = read_footers(source)
    if found.fields.type != FIXED or found.last is None or size % SECTOR or size > MOST_BYTES:
        return None
    cylinders, heads, sectors = geometry(size)
    fields = fields_of(found.fields)
    fields |= {"current_size": size, "cylinders": cylinders, "heads": heads, "sectors": sectors, "checksum": 0}
    fields |= WRITTEN_BY
    why = f"the disk becomes {size} bytes large"
    gone = bytes(source.size - found.last.offset)
    if found.last.offset + len(gone) > size:  # the new footer lies over the old one
        gone = gone[: size - found.last.offset]
    return [Patch(size, build_footer(fields), why), Patch(found.last.offset, gone, why, sync=True)]
