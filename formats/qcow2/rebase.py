"""Another backing file for a qcow2 image: the header's cluster written anew, nothing else touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.check import Patch
from diskmorph.formats.errors import TargetError
from diskmorph.formats.fields import fields_of
from diskmorph.formats.limits import Limits
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.building import backing_format_name
from diskmorph.formats.qcow2.header import read_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.allocator import NewParent
    from diskmorph.formats.source import ByteSource


def parent_patches(source: ByteSource, parent: NewParent) -> list[Patch]:
    """Return what makes `parent` the backing file. Raises TargetError where its name does not fit the first cluster."""
    header = read_header(source, Limits())
    name = parent.name.encode("utf-8", "surrogateescape")
    start = s.V2_LENGTH if header.version == 2 else header.header_length
    parts = [_extension(s.EXT_BACKING_FORMAT, backing_format_name(parent.format).encode())]
    parts += [_extension(kind, data) for kind, data in _kept(source, header.header_length, header.cluster)]
    middle = b"".join(parts) + _extension(s.EXT_END, b"")
    end = start + len(middle) + len(name)
    if len(name) > s.BACKING_NAME_MOST or end > header.cluster:
        raise TargetError(
            "the backing file's name is too long for the image's header",
            file=source.name,
            format="qcow2",
            structure="header",
            field="backing_file_name",
            found=f"{len(name)} bytes",
        )
    raw = s.HEADER.parse(source.read(0, s.V2_LENGTH))
    fields = fields_of(raw)
    fields |= {"backing_offset": start + len(middle), "backing_length": len(name)}
    head = s.HEADER.build(fields) + _more(source, start)
    block = (head + middle + name).ljust(min(header.cluster, source.size), b"\0")
    return [Patch(0, block, f"the backing file becomes {parent.name}")]


def _more(source: ByteSource, stop: int) -> bytes:
    """Return the header behind version 2's fields; autoclear bits of features that are not known here are cleared."""
    raw = source.read(s.V2_LENGTH, stop - s.V2_LENGTH)
    if not raw:
        return raw
    found = s.HEADER_V3.parse(raw)
    fields = fields_of(found)
    fields["autoclear"] &= s.AUTOCLEAR_BITMAPS | s.AUTOCLEAR_RAW
    return s.HEADER_V3.build(fields) + raw[s.HEADER_V3.sizeof() :]


def _kept(source: ByteSource, at: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield the extensions that stay, as they are; the header was checked before."""
    while at + 8 <= min(stop, source.size):
        head = s.EXTENSION.parse(source.read(at, 8))
        if head.type == s.EXT_END:
            return
        if head.type != s.EXT_BACKING_FORMAT:
            yield int(head.type), source.read(at + 8, head.length)
        at += 8 + -(-head.length // 8) * 8


def _extension(kind: int, data: bytes) -> bytes:
    return s.EXTENSION.build({"type": kind, "length": len(data)}) + data + bytes(-len(data) % 8)
