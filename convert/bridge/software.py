"""Packages of distributions as trees, unpacked in memory and an unlinked spool: .deb, .rpm, .apk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from construct import Bytes, Const, Int32ub, Padding, Struct

from diskmorph.formats.cpio import read_cpio
from diskmorph.formats.errors import FormatError
from diskmorph.formats.source import ByteSource, FileSource
from diskmorph.formats.spool import decoded, head_of
from diskmorph.formats.tar import is_tar, read_tar

if TYPE_CHECKING:
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.tree import Tree

_AR_MAGIC = b"!<arch>\n"
_AR_MEMBER = Struct(
    "name" / Bytes(16), "mtime" / Bytes(12), "uid" / Bytes(6), "gid" / Bytes(6), "mode" / Bytes(8), "size" / Bytes(10),
    "end" / Bytes(2),
)  # fmt: skip
_MOST_MEMBERS = 64
_RPM_MAGIC = b"\xed\xab\xee\xdb"
_RPM_LEAD = 96
_RPM_HEADER = Struct("magic" / Const(b"\x8e\xad\xe8\x01"), Padding(4), "entries" / Int32ub, "bytes" / Int32ub)
_RPM_MOST = 256 << 20


def is_package(source: ByteSource) -> bool:
    """Return whether a file is a package that can be read."""
    head = source.read_upto(0, 8)
    if head == _AR_MAGIC or head[:4] == _RPM_MAGIC:
        return True
    return head[:2] == b"\x1f\x8b" and is_tar(head_of(source, 512))


def open_software(path: str | os.PathLike[str], limits: Limits) -> Tree:
    """Return the files of a package; close the tree. Raises FormatError, UnsupportedError, SourceError."""
    source: ByteSource = FileSource(path)
    head = source.read_upto(0, 8)
    try:
        if head[:4] == _RPM_MAGIC:
            return read_cpio(decoded(_rpm_payload(source), limits), limits=limits)
        part = _deb_data(source) if head == _AR_MAGIC else source
        return read_tar(decoded(part, limits), limits=limits, name=source.name)
    except FormatError as error:
        source.close()
        raise error.located(file=source.name) from error.__cause__


def _deb_data(source: ByteSource) -> ByteSource:
    """Return the member data.tar of a .deb (deb(5)), compressed as it is."""
    at = len(_AR_MAGIC)
    for _ in range(_MOST_MEMBERS):
        raw = source.read_upto(at, _AR_MEMBER.sizeof())
        if len(raw) < _AR_MEMBER.sizeof():
            break
        size = raw[48:58].strip()
        if raw[58:] != b"`\n" or not size.isdigit():
            raise FormatError("is damaged: no member begins here", file=source.name, format="deb", offset=at)
        at += len(raw)
        if raw[:16].startswith(b"data.tar"):
            return source.window(at, int(size), source.name)
        at += int(size) + int(size) % 2
    raise FormatError("has no files: its data.tar is missing", file=source.name, format="deb", offset=at)


def _rpm_payload(source: ByteSource) -> ByteSource:
    """Return the compressed cpio archive behind an .rpm's two headers."""
    at = _RPM_LEAD
    for padded in (True, False):
        raw = source.read_upto(at, _RPM_HEADER.sizeof())
        if len(raw) < _RPM_HEADER.sizeof() or raw[:4] != b"\x8e\xad\xe8\x01":
            raise FormatError("is damaged: no header begins here", file=source.name, format="rpm", offset=at)
        header = _RPM_HEADER.parse(raw)
        length = len(raw) + 16 * header.entries + header.bytes
        if length > _RPM_MOST:
            raise FormatError("has an impossibly large header", file=source.name, format="rpm", offset=at)
        at += length + (-length % 8 if padded else 0)
    return source.window(at, source.size - at, source.name)
