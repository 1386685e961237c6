"""A larger disk in a qcow2 image: its size, and an L1 table with more of its cluster's entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.check import Patch
from diskmorph.formats.fields import fields_of
from diskmorph.formats.limits import Limits
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.header import read_header

if TYPE_CHECKING:
    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.source import ByteSource

_ENTRY = 8
_AUTOCLEAR_AT = 88


def growth_patches(source: ByteSource, size: int) -> list[Patch] | None:
    """See convert.growing. None also with bitmaps, which cover the disk, and snapshots of version 2, without sizes."""
    header = read_header(source, Limits())
    bitmaps = header.extensions.bitmaps is not None
    if header.has_data_file or bitmaps or (header.version == 2 and header.snapshot_count):
        return None
    if header.incompatible & (s.DIRTY | s.CORRUPT) or size % 512:
        return None
    count = max(-(-size // header.coverage), header.l1_size)
    if not _has_room(source, header, count):
        return None
    raw = s.HEADER.parse(source.read(0, s.V2_LENGTH))
    fields = fields_of(raw)
    fields |= {"size": size, "l1_size": count}
    why = f"the disk becomes {size} bytes large"
    found = [Patch(0, s.HEADER.build(fields), why)]
    if header.autoclear:  # what is not known to be kept right must not look as if it were
        found.insert(0, Patch(_AUTOCLEAR_AT, bytes(8), why))
    return found


def _has_room(source: ByteSource, header: Header, count: int) -> bool:
    """Whether the L1 table's last cluster has `count` entries, and nothing in those that are new."""
    used, need = header.l1_size * _ENTRY, count * _ENTRY
    if need == used:
        return True
    room = -(-used // header.cluster) * header.cluster
    if need > min(room, s.L1_MOST) or header.l1_offset + need > source.size:
        return False
    return not source.read(header.l1_offset + used, need - used).strip(b"\0")
