"""Another parent for a VMDK: two lines of its descriptor, in a file of its own or embedded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from diskmorph.formats.check import Patch
from diskmorph.formats.errors import OptionError, TargetError, UnsupportedError
from diskmorph.formats.vmdk import hosted
from diskmorph.formats.vmdk.reader import is_sparse
from diskmorph.formats.vmdk.schema import SECTOR

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewParent
    from diskmorph.formats.source import ByteSource

_CID = re.compile(rb"^[ \t]*parentCID[ \t]*=[^\r\n]*", re.IGNORECASE | re.MULTILINE)
_HINT = re.compile(rb"^[ \t]*parentFileNameHint[ \t]*=[^\r\n]*(\r\n|\n|\r)?", re.IGNORECASE | re.MULTILINE)


def parent_patches(source: ByteSource, parent: NewParent) -> list[Patch]:
    """Return what makes `parent` the image's parent.

    Raises OptionError (it is no VMDK), TargetError (its name cannot stand there), UnsupportedError (no descriptor).
    """
    if parent.format != "vmdk" or "cid" not in parent.identity:
        raise OptionError(f"the parent of a vmdk must be a vmdk with a CID, not {parent.format}")
    if any(mark in parent.name for mark in '"\n\r\0'):
        raise TargetError(f"the name {parent.name!r} cannot stand in a VMDK descriptor", file=source.name)
    start, size = _place(source)
    raw = source.read(start, size)
    text = raw.split(b"\0", 1)[0]
    name = parent.unicode_name().encode()
    lines = b'parentCID=%08x\nparentFileNameHint="%s"' % (int(parent.identity["cid"], 16), name)
    text, count = _CID.subn(lambda _: lines, _HINT.sub(b"", text), count=1)
    if not count:
        raise UnsupportedError("its descriptor has no parentCID", feature="rebase", file=source.name, format="vmdk")
    embedded = start > 0
    if embedded and len(text) > size:
        raise TargetError("the descriptor has no room for the parent's name", file=source.name, format="vmdk")
    filler = b"\0" if embedded else b"\n"  # a shorter text must hide what stood there
    return [Patch(start, text.ljust(size, filler), f"the parent becomes {parent.name}")]


def _place(source: ByteSource) -> tuple[int, int]:
    """Return offset and size of the descriptor in bytes."""
    if not is_sparse(source):
        return 0, source.size
    header = hosted.parse_header(source)
    if not header.descriptor_offset:
        raise UnsupportedError("has no descriptor of its own", feature="rebase", file=source.name, format="vmdk")
    return header.descriptor_offset * SECTOR, header.descriptor_size * SECTOR
