"""The index of an OVA: a tar archive whose members are read where they lie (DSP0243 6.3).

Only regular files may be in it. Names are flat or relative; no name may come twice. Nothing is extracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError, PolicyError, UnsupportedError
from diskmorph.formats.numbers import whole_number
from diskmorph.formats.tar.schema import BLOCK, HEADER, is_tar, number

if TYPE_CHECKING:
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.source import ByteSource

_FILES = frozenset({b"0", b"\0", b"7"})
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"K": "a link with a long name",
}
_LONGEST_NAME = 4096
_LARGEST_PAX = 1 << 20


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar archive: where its header, its data begin (bytes) and how long it is.

    `extensions` names what stood before or in its header beyond ustar: "PAX", "GNU long name", "base-256 size".
    """

    name: str
    header: int
    offset: int
    size: int
    mtime: int
    extensions: tuple[str, ...] = ()


@dataclass(slots=True)
class _Pending:
    """What extension headers say of the member that follows them."""

    name: str | None = None
    size: int | None = None
    extensions: tuple[str, ...] = ()


def read_index(source: ByteSource, limits: Limits) -> dict[str, TarMember]:
    """Return the archive's files by their names, in order; directories are passed over.

    Raises FormatError (damaged, cut off, a name twice, names outside), PolicyError (links, devices) and
    UnsupportedError (sparse members).
    """
    return _Index(source, limits).read()


class _Index:
    def __init__(self, source: ByteSource, limits: Limits) -> None:
        self._source, self._limits = source, limits
        self._found: dict[str, TarMember] = {}

    def read(self) -> dict[str, TarMember]:
        """Walk over all headers."""
        at, pending, headers = 0, _Pending(), 0
        while at < self._source.size:
            block = self._source.read(at, BLOCK) if at + BLOCK <= self._source.size else b""
            if len(block) < BLOCK:
                raise self._fault("is cut off within a member's header", at)
            if not any(block):
                self._require_end(at)
                break
            headers += 1
            if headers > 3 * self._limits.members:
                raise self._fault(f"holds more than {self._limits.members} members", at)
            at, pending = self._member(block, at, pending)
        if pending.extensions:
            raise self._fault("ends with a header that no member follows", at)
        return self._found

    def _fault(self, problem: str, at: int, **place: Any) -> FormatError:
        return FormatError(problem, file=self._source.name, format="ova", structure="tar header", offset=at, **place)

    def _require_end(self, at: int) -> None:
        if any(self._source.read_upto(at + BLOCK, BLOCK)):
            raise self._fault("has a member behind a block of zeroes, which ends an archive", at + BLOCK)

    def _member(self, block: bytes, at: int, pending: _Pending) -> tuple[int, _Pending]:
        """Note one member; return where the next header is, and what is pending for it."""
        if not is_tar(block):
            raise self._fault("is damaged: a header's checksum does not agree", at, field="chksum")
        header = HEADER.parse(block)
        size, mtime = number(header.size), number(header.mtime)
        if size is None or mtime is None or size < 0:
            raise self._fault("is damaged: a number of a header is none", at, field="size")
        name = self._name(header, at)
        kind = header.typeflag
        if kind in b"xgL":
            self._require_inside(name, at, size)
            return _after(at, size), self._extension(kind, at, size, pending)
        if kind in _REFUSED:
            raise PolicyError(
                f"holds {_REFUSED[kind]}, {pending.name or name!r}; a package holds plain files only",
                file=self._source.name,
                format="ova",
                structure="tar header",
                field="typeflag",
                offset=at,
            )
        if kind == b"5":
            return _after(at, 0), _Pending()
        if kind not in _FILES:
            raise UnsupportedError(
                f"holds {name!r} of tar's kind {kind!r}, which cannot be read in place",
                feature="sparse members" if kind == b"S" else "tar member kinds",
                file=self._source.name,
                format="ova",
                offset=at,
            )
        size = size if pending.size is None else pending.size
        name = pending.name or name
        self._require_inside(name, at, size)
        extensions = (*pending.extensions, *(("base-256 size",) if header.size[0] & 0x80 else ()))
        self._add(TarMember(self._flat(name, at), at, at + BLOCK, size, mtime, extensions))
        return _after(at, size), _Pending()

    def _name(self, header: Any, at: int) -> str:
        raw = header.name.split(b"\0", 1)[0]
        prefix = header.prefix.split(b"\0", 1)[0] if header.magic == b"ustar\0" else b""
        return self._text(prefix + b"/" + raw if prefix else raw, at)

    def _text(self, raw: bytes, at: int) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._fault("has a member whose name is not UTF-8", at, field="name", found=raw) from None

    def _require_inside(self, name: str, at: int, size: int) -> None:
        if at + BLOCK + size > self._source.size:
            raise self._fault(
                f"is cut off: its member {name!r} lies beyond its end",
                at,
                field="size",
                expected=f"{size} bytes from {at + BLOCK}",
                found=f"the end at {self._source.size}",
            )

    def _flat(self, name: str, at: int) -> str:
        plain = name.removeprefix("./")
        parts = plain.split("/")
        if not plain or plain.startswith("/") or any(part in {"", ".", ".."} for part in parts) or "\\" in plain:
            raise self._fault(f"has a member of the name {name!r}, which leaves the package", at, field="name")
        return plain

    def _add(self, member: TarMember) -> None:
        if member.name in self._found:
            raise self._fault(f"holds the name {member.name!r} twice", member.header, field="name")
        if len(self._found) >= self._limits.members:
            raise self._fault(f"holds more than {self._limits.members} members", member.header)
        self._found[member.name] = member

    def _extension(self, kind: bytes, at: int, size: int, pending: _Pending) -> _Pending:
        """Return what is pending after a PAX or GNU header, whose data follow it."""
        most = _LONGEST_NAME if kind == b"L" else _LARGEST_PAX
        if size > most:
            raise self._fault("has an extension header that is too long", at, expected=f"at most {most}", found=size)
        data = self._source.read(at + BLOCK, size)
        if kind == b"L":
            name = self._text(data.split(b"\0", 1)[0], at)
            return _Pending(name, pending.size, (*pending.extensions, "GNU long name"))
        records = self._pax(data, at)
        if any(key.startswith("GNU.sparse") for key in records):
            raise UnsupportedError(
                "holds a sparse member, which cannot be read in place",
                feature="sparse members",
                file=self._source.name,
                format="ova",
                offset=at,
            )
        words = (*pending.extensions, "PAX")
        if kind == b"g":
            if {"path", "size", "linkpath"} & records.keys():
                raise self._fault("has a global PAX header that renames or resizes members", at)
            return _Pending(pending.name, pending.size, words)
        return _Pending(records.get("path", pending.name), self._pax_size(records, pending.size, at), words)

    def _pax_size(self, records: dict[str, str], size: int | None, at: int) -> int | None:
        said = records.get("size")
        if said is None:
            return size
        found = whole_number(said, (1 << 63) - 1)
        if found is None:
            raise self._fault("has a PAX size that is no number", at, field="size", found=said[:40])
        return found

    def _pax(self, data: bytes, at: int) -> dict[str, str]:
        """Return PAX records: `LENGTH KEY=VALUE` and a newline each, the length counting itself (POSIX.1 pax)."""
        records, position = {}, 0
        while position < len(data):
            digits = data[position : position + 20].split(b" ", 1)[0]
            length = whole_number(digits, _LARGEST_PAX) or 0
            record = data[position + len(digits) + 1 : position + length]
            if length <= len(digits) + 1 or position + length > len(data) or record[-1:] != b"\n" or b"=" not in record:
                raise self._fault("has a damaged PAX header", at + BLOCK + position)
            key, _, value = record[:-1].partition(b"=")
            records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
            position += length
        return records


def _after(at: int, size: int) -> int:
    return at + BLOCK + size + -size % BLOCK
