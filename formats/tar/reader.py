"""Reads tar archives: headers are walked one after the other, then parsed by the thousand.

Nothing is unpacked: a file's node points to its bytes in the archive.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.numbers import whole_number
from diskmorph.formats.tar import schema as s
from diskmorph.formats.tar.pax import LONGEST_TIME, Pax, parse_records
from diskmorph.formats.tar.sparse import sparse_of_header, sparse_of_pax
from diskmorph.formats.tree import Node, Piece, Tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.source import ByteSource

_WINDOW = 64 << 10  # bytes read at once to find headers in
_BATCH = 4096  # headers parsed at once
_NO_DATA = frozenset((s.HARD, s.SYMBOLIC, s.CHARACTER, s.BLOCK_DEVICE, s.DIRECTORY, s.FIFO))
_DATA = frozenset((s.REGULAR, s.OLD_REGULAR, s.CONTIGUOUS))
_EXTENDED = frozenset((s.PAX, s.PAX_SUN, s.PAX_GLOBAL, s.GNU_LONG_NAME, s.GNU_LONG_LINK))
_OTHER = frozenset((s.GNU_SPARSE_FILE, s.GNU_DUMPDIR, s.GNU_VOLUME))
_KINDS = {
    s.SYMBOLIC: stat.S_IFLNK,
    s.CHARACTER: stat.S_IFCHR,
    s.BLOCK_DEVICE: stat.S_IFBLK,
    s.DIRECTORY: stat.S_IFDIR,
    s.GNU_DUMPDIR: stat.S_IFDIR,
    s.FIFO: stat.S_IFIFO,
}
_END = bytes(s.BLOCK)
_MOST_ID = 0xFFFFFFFF


class Member(NamedTuple):
    """A member of an archive: its name as written, its node, or (a hard link) the name it links to."""

    name: bytes
    node: Node | None
    link: bytes


class _Raw(NamedTuple):
    """What the walk keeps of a member: the header, where it and the data lie, records that came before it."""

    header: bytes
    at: int
    data: int
    size: int
    pax: Pax | None


def read_tar(source: ByteSource, *, limits: Limits | None = None, name: str | None = None) -> Tree:
    """Return the tree of an archive; of a name that comes twice the last counts. The tree owns `source`.

    Raises FormatError (damaged, cut off, names out of the tree, links to nothing) and UnsupportedError.
    """
    tree = Tree(name=name or source.name, format="tar", limits=limits)
    tree.sources.append(source)
    put, link = tree.put, tree.link
    for member in members(source, limits=tree.limits, lost=tree.lost):
        if member.node is not None:
            put(member.name, member.node)
        else:
            link(member.name, member.link)
    return tree


def members(
    source: ByteSource,
    *,
    limits: Limits | None = None,
    layer: int = 0,
    lost: list[str] | None = None,
    complete: bool = True,
) -> Iterator[Member]:
    """Yield the members of an archive in their order.

    `layer` is noted in the nodes; what cannot be kept is told in `lost`. Unless `complete`, an archive may end without
    its end mark (two zero blocks): for callers that know by a digest that nothing is missing.
    """
    limits = limits or Limits()
    parser = _Parser(source, layer, lost if lost is not None else [], limits)
    batch: list[_Raw] = []
    for raw in _Walker(source, limits, complete=complete).walk():
        batch.append(raw)
        if len(batch) == _BATCH:
            yield from parser.parse(batch)
            batch = []
    if batch:
        yield from parser.parse(batch)


def _damaged(source: ByteSource, problem: str, at: int, **place: Any) -> FormatError:
    return FormatError(problem, file=source.name, format="tar", structure="header", offset=at, **place)


class _Walker:
    """Finds the headers: needs of each no more than type and size, and the records of extended headers."""

    def __init__(self, source: ByteSource, limits: Limits, *, complete: bool) -> None:
        self._source = source
        self._limits = limits
        self._complete = complete
        self._base = 0
        self._window = b""
        self._globals: Pax = {}

    def walk(self) -> Iterator[_Raw]:
        at, end = 0, self._source.size
        pending: Pax = {}
        count = 0
        while True:
            if at + s.BLOCK > end:
                self._require_end(at)
                return
            place = at - self._base
            if place < 0 or place + s.BLOCK > len(self._window):
                self._window, self._base, place = self._source.read_upto(at, _WINDOW), at, 0
            header = self._window[place : place + s.BLOCK]
            if not header[0] and header == _END:
                return
            flag = header[156]
            size = self._size(header, at)
            if flag in _EXTENDED:
                self._extend(flag, at, size, pending)
                at += s.BLOCK + size + -size % s.BLOCK
                continue
            if flag in _NO_DATA:
                size = 0
            elif flag not in _DATA and flag not in _OTHER:
                raise self._unknown(header, flag, at)
            if pending or self._globals:
                pax: Pax | None = {**self._globals, **pending}
                pending = {}
                if flag not in _NO_DATA:
                    size = self._pax_size(pax, size, at)
            else:
                pax = None
            data = at + s.BLOCK
            if flag == s.GNU_SPARSE_FILE:
                data += self._more_sparse(header, data)
            if data + size > end:
                raise _damaged(
                    self._source, "the archive is cut off", at, field="size", expected=f"{size} bytes", found=end - data
                )
            if flag != s.GNU_VOLUME:
                yield _Raw(header, at, data, size, pax)
                count += 1
                if count > self._limits.directory_entries:
                    raise _damaged(self._source, f"more than {count - 1} members", at)
            at = data + size + -size % s.BLOCK

    def _size(self, header: bytes, at: int) -> int:
        field = header[124:136]
        try:
            return int(field[:11], 8) if field[11] in b"\0 " and field[:11].isdigit() else self._odd_size(field, at)
        except ValueError:
            return self._odd_size(field, at)

    def _odd_size(self, field: bytes, at: int) -> int:
        size = s.number(field)
        if size is None or size < 0:
            raise _damaged(self._source, "a header is damaged", at, field="size", expected="a number", found=field)
        return size

    def _pax_size(self, pax: Pax | None, size: int, at: int) -> int:
        text = pax.get(b"size") if pax else None
        if not text:
            return size
        found = whole_number(text, (1 << 63) - 1)
        if found is None:
            raise _damaged(self._source, "an extended header is damaged", at, field="size", found=text[:40])
        return found

    def _extend(self, flag: int, at: int, size: int, pending: Pax) -> None:
        if size > self._limits.descriptor:
            raise _damaged(
                self._source, "an extended header is too large", at, expected=f"{self._limits.descriptor}", found=size
            )
        if at + s.BLOCK + size > self._source.size:
            raise _damaged(self._source, "the archive is cut off", at, expected=f"{size} bytes of records")
        body = self._source.read(at + s.BLOCK, size)
        if flag == s.GNU_LONG_NAME:
            pending.setdefault(b"path", body.split(b"\0", 1)[0])
        elif flag == s.GNU_LONG_LINK:
            pending.setdefault(b"linkpath", body.split(b"\0", 1)[0])
        else:
            records = parse_records(body, self._source.name, at + s.BLOCK)
            (self._globals if flag == s.PAX_GLOBAL else pending).update(records)

    def _more_sparse(self, header: bytes, data: int) -> int:
        """Return the bytes of the blocks that continue an old GNU sparse header."""
        more, count = header[482], 0
        while more:
            more = self._source.read(data + count, s.BLOCK)[504]
            count += s.BLOCK
            if count > self._limits.descriptor:
                raise _damaged(self._source, "a sparse map is too large", data)
        return count

    def _unknown(self, header: bytes, flag: int, at: int) -> FormatError | UnsupportedError:
        if not s.is_tar(header):
            return _damaged(self._source, "this is no tar header", at, field="chksum")
        return UnsupportedError(
            f"a member is of type {chr(flag)!r}",
            feature=f"tar type {chr(flag)}",
            file=self._source.name,
            format="tar",
            offset=at,
        )

    def _require_end(self, at: int) -> None:
        if self._complete or at != self._source.size:
            raise _damaged(self._source, "the archive is cut off: it has no end mark", at, expected="a zero block")


_MOST = 10**LONGEST_TIME
_NUMBERS = ("mode", "uid", "gid", "mtime", "devmajor", "devminor")


class _Parser:
    """Makes nodes of the headers that the walk found."""

    def __init__(self, source: ByteSource, layer: int, lost: list[str], limits: Limits) -> None:
        self._source = source
        self._layer = layer
        self._lost = lost
        self._limits = limits

    def parse(self, batch: list[_Raw]) -> Iterator[Member]:
        rows = np.frombuffer(b"".join([raw.header for raw in batch]), s.ROW)
        self._verify(rows, batch)
        columns = [self._column(rows[name], name, batch) for name in _NUMBERS]
        names = rows["name"].tolist()
        links = rows["linkname"].tolist()
        prefixes = np.where(rows["magic"] == b"ustar", rows["prefix"], b"").tolist()
        flags = rows["typeflag"].tolist()
        table = zip(batch, names, links, prefixes, flags, *columns, strict=True)
        for raw, name, link, prefix, flag, mode, uid, gid, mtime, major, minor in table:
            if prefix:
                name = self._joined(raw, name, prefix)  # noqa: PLW2901 - the same name, whole
            if b"\0" in name:
                name = name.split(b"\0", 1)[0]  # noqa: PLW2901
            if b"\0" in link:
                link = link.split(b"\0", 1)[0]  # noqa: PLW2901
            if raw.pax is None and flag in _DATA and name[-1:] != b"/":
                pieces = (Piece(0, raw.size, self._source, raw.data),) if raw.size else ()
                node = Node(stat.S_IFREG | mode & 0o7777, uid, gid, mtime * 10**9, size=raw.size, pieces=pieces)
                node.layer = self._layer
                yield Member(name, node, b"")
            else:
                yield self._member(raw, name, link, flag, Node(mode & 0o7777, uid, gid, mtime * 10**9), (major, minor))

    def _member(self, raw: _Raw, name: bytes, link: bytes, flag: int, node: Node, rdev: tuple[int, int]) -> Member:
        pax = raw.pax or {}
        name, link = pax.get(b"path") or name, pax.get(b"linkpath") or link
        if flag == s.HARD:
            return Member(name, None, link)
        if pax:
            self._apply(pax, node, name, raw.at)
        node.layer = self._layer
        kind = _KINDS.get(flag, stat.S_IFDIR if name[-1:] == b"/" else stat.S_IFREG)
        node.mode |= kind
        if kind == stat.S_IFDIR:
            fresh = Node(node.mode, node.uid, node.gid, node.mtime, xattrs=node.xattrs, layer=node.layer)
            return Member(name, fresh, b"")
        if kind == stat.S_IFLNK:
            if not link or b"\0" in link:
                raise _damaged(self._source, "a symbolic link has no target", raw.at, field="linkname")
            node.target, node.size = link, len(link)
        elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
            node.rdev = rdev
        elif kind == stat.S_IFREG:
            name = self._content(raw, pax, node, name, flag)
        return Member(name, node, b"")

    def _content(self, raw: _Raw, pax: Pax, node: Node, name: bytes, flag: int) -> bytes:
        """Fill in a regular file's size and pieces; return its name, which sparse formats keep elsewhere."""
        source, most = self._source, self._limits.directory_entries
        if flag == s.GNU_SPARSE_FILE:
            node.size, node.pieces = sparse_of_header(source, raw.header, raw.at, raw.data, raw.size, most)
        elif b"GNU.sparse.major" in pax or b"GNU.sparse.map" in pax or b"GNU.sparse.size" in pax:
            node.size, node.pieces = sparse_of_pax(source, pax, raw.at, raw.data, raw.size, most)
            name = pax.get(b"GNU.sparse.name") or name
        else:
            node.size = raw.size
            node.pieces = (Piece(0, raw.size, source, raw.data),) if raw.size else ()
        return name

    def _apply(self, pax: Pax, node: Node, name: bytes, at: int) -> None:
        from diskmorph.formats.tar.pax import apply  # noqa: PLC0415 - plain archives have no records

        apply(pax, node, name, self._source.name, at, self._lost)

    def _joined(self, raw: _Raw, name: bytes, prefix: bytes) -> bytes:
        if raw.header[508:512] == b"tar\0":  # star: atime and ctime follow a prefix of 131 bytes
            prefix = raw.header[345:476]
        prefix = prefix.split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name

    def _verify(self, rows: NDArray[np.void], batch: list[_Raw]) -> None:
        stored = np.array(self._column(rows["chksum"], "chksum", batch), np.int64)
        unsigned, signed = s.checksums(rows)
        bad = np.flatnonzero((stored != unsigned) & (stored != signed))
        if len(bad):
            first = int(bad[0])
            raise _damaged(
                self._source,
                "a header is damaged, or this is no tar archive",
                batch[first].at,
                field="chksum",
                expected=int(unsigned[first]),
                found=int(stored[first]),
            )

    def _column(self, field: NDArray[np.uint8], name: str, batch: list[_Raw]) -> list[int]:
        values, odd = s.octal(field)
        column: list[int] = values.tolist()
        for index in np.flatnonzero(odd).tolist():
            value = s.number(field[index].tobytes())
            most = _MOST_ID if name in {"uid", "gid"} else _MOST
            used = name not in {"devmajor", "devminor"} or batch[index].header[156] in b"34"
            if value is None or (value < 0 and name != "mtime") or abs(value) > most:
                if used:
                    found = field[index].tobytes()
                    raise _damaged(
                        self._source,
                        "a header is damaged",
                        batch[index].at,
                        field=name,
                        expected="a number",
                        found=found,
                    )
                value = 0
            column[index] = value
        return column
