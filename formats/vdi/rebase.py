"""Another parent for a VDI: the two UUIDs by which it knows it."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from diskmorph.formats.check import Patch
from diskmorph.formats.errors import OptionError, UnsupportedError
from diskmorph.formats.fields import fields_of
from diskmorph.formats.vdi.schema import DIFFERENCING, HEADER1, HEADER1_PLUS_SIZE, PREHEADER_SIZE

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewParent
    from diskmorph.formats.source import ByteSource


def parent_patches(source: ByteSource, parent: NewParent) -> list[Patch]:
    """Return what makes `parent` the image's parent. Raises OptionError (it is no VDI), UnsupportedError."""
    if not {"uuid", "modify uuid"} <= set(parent.identity):
        raise OptionError(f"a VDI's parent must be a VDI, not {parent.format}")
    raw = source.read_upto(PREHEADER_SIZE, HEADER1_PLUS_SIZE)
    found = HEADER1.parse(raw)
    if source.read(PREHEADER_SIZE - 2, 2) != b"\1\0" or found.type != DIFFERENCING:
        raise UnsupportedError("is no differencing VDI of version 1", feature="rebase", file=source.name, format="vdi")
    fields = fields_of(found)
    fields |= {
        "linkage_uuid": uuid.UUID(parent.identity["uuid"]),
        "parent_modify_uuid": uuid.UUID(parent.identity["modify uuid"]),
    }
    return [Patch(PREHEADER_SIZE, HEADER1.build(fields), f"the parent becomes {parent.name}")]
