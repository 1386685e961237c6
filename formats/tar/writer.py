"""Writes trees as tar archives: POSIX (PAX) headers, sorted by name, the same bytes for the same tree.

The archive is a `Disk` of header bytes and ranges of what the files lie in, so that nothing is copied to make it.
PAX records are written only where the plain header cannot say it.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import TargetError
from diskmorph.formats.extents import DATA, EXTENT, HOLE, coalesce
from diskmorph.formats.source import ByteSource, BytesSource
from diskmorph.formats.tar import acl
from diskmorph.formats.tar import schema as s
from diskmorph.formats.tar.pax import record, time_text, xattr_key
from diskmorph.formats.views import Mapped

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.tree import Entry, Node, Piece

_FLAGS = {
    stat.S_IFREG: s.REGULAR,
    stat.S_IFLNK: s.SYMBOLIC,
    stat.S_IFCHR: s.CHARACTER,
    stat.S_IFBLK: s.BLOCK_DEVICE,
    stat.S_IFDIR: s.DIRECTORY,
    stat.S_IFIFO: s.FIFO,
}
_MOST_ID, _MOST_SIZE, _MOST_TIME = 0o7777777, 0o77777777777, 0o77777777777
_PAX_NAME = b"././@PaxHeader"
_END = 2 * s.BLOCK
_ACL_TEXT = {xattr: key for key, xattr in acl.XATTRS.items()}


@dataclass(frozen=True, slots=True)
class TarOptions:
    """How an archive is written.

    - `root_name`: what the root directory is called; empty: it is left out.
    - `acl_text`: also as `SCHILY.acl.*`, which GNU tar restores; image layers have the xattr records alone.
    - `sparse`: files with at least so many bytes of holes are written sparse (PAX 1.0); None: never, as in layers.
    """

    root_name: bytes = b"./"
    acl_text: bool = True
    sparse: int | None = 1 << 20


def tar_disk(entries: Iterable[Entry], options: TarOptions = TarOptions(), lost: list[str] | None = None) -> Disk:
    """Return the archive of entries (parents first) as a disk; what tar cannot hold (sockets) is told in `lost`.

    Hard links are written as links to the first name of their node. Raises TargetError for link targets and devices
    that no header can hold.
    """
    plan = _Plan(options, lost if lost is not None else [])
    for path, node in entries:
        plan.add(path, node)
    return plan.disk()


class _Plan:
    """Collects the members column by column, then builds all headers at once."""

    def __init__(self, options: TarOptions, lost: list[str]) -> None:
        self._options = options
        self._lost = lost
        self._first: dict[int, bytes] = {}  # id of a node that may come again -> its first name
        self._nodes: list[Node] = []  # keeps the nodes, so that their ids stay theirs
        self._names: list[bytes] = []
        self._links: list[bytes] = []
        self._columns: list[tuple[int, int, int, int, int, int, int, int]] = []
        self._pax: dict[int, bytes] = {}  # member number -> records
        self._maps: dict[int, bytes] = {}  # member number -> sparse map before the data
        self._content: list[tuple[Piece, ...] | None] = []

    def add(self, path: bytes, node: Node) -> None:
        kind = node.mode & 0o170000
        flag = _FLAGS.get(kind)
        if flag is None:
            self._lost.append(f"{path.decode(errors='backslashreplace')}: a socket")
            return
        name = self._name(path, kind)
        if not name:
            return
        link, size, pieces = b"", 0, None
        if kind != stat.S_IFDIR:
            link = self._first.setdefault(id(node), name)
            if link is not name:
                flag = s.HARD
            else:
                link = node.target
                self._nodes.append(node)
                if kind == stat.S_IFREG:
                    size, pieces = node.size, tuple(node.pieces)
        sparse = b""
        if pieces is not None and self._is_sparse(size, pieces):
            size, sparse = self._sparse(name, size, pieces)
        records = self._records(name, link, node if flag != s.HARD else None, size) + sparse
        if records:
            self._pax[len(self._names)] = records
        major, minor = node.rdev if kind in {stat.S_IFCHR, stat.S_IFBLK} else (0, 0)
        if max(major, minor) > _MOST_ID:
            raise TargetError("tar cannot hold a device with such numbers", found=f"{major}, {minor}", file=str(name))
        seconds = node.mtime // 10**9
        self._names.append(name)
        self._links.append(link)
        self._columns.append((node.mode & 0o7777, node.uid, node.gid, size, seconds, flag, major, minor))
        self._content.append(pieces)

    def _name(self, path: bytes, kind: int) -> bytes:
        if not path:
            return self._options.root_name
        return path + b"/" if kind == stat.S_IFDIR else path

    def _records(self, name: bytes, link: bytes, node: Node | None, size: int) -> bytes:
        records = []
        if len(name) > 100:
            records.append(record(b"path", name))
        if len(link) > 100:
            records.append(record(b"linkpath", link))
        if node is not None:
            if size > _MOST_SIZE:
                records.append(record(b"size", b"%d" % size))
            if node.uid > _MOST_ID:
                records.append(record(b"uid", b"%d" % node.uid))
            if node.gid > _MOST_ID:
                records.append(record(b"gid", b"%d" % node.gid))
            if node.mtime % 10**9 or not 0 <= node.mtime // 10**9 <= _MOST_TIME:
                records.append(record(b"mtime", time_text(node.mtime)))
            if node.xattrs:
                records.extend(self._xattrs(node))
        return b"".join(records)

    def _xattrs(self, node: Node) -> list[bytes]:
        records = []
        for key, value in sorted(node.xattrs.items()):
            if self._options.acl_text and key in _ACL_TEXT and (text := acl.to_text(value)) is not None:
                records.append(record(_ACL_TEXT[key], text))
            records.append(record(xattr_key(key), value))
        return records

    def _is_sparse(self, size: int, pieces: tuple[Piece, ...]) -> bool:
        least = self._options.sparse
        return least is not None and size >= least and size - sum(piece.length for piece in pieces) >= least

    def _sparse(self, name: bytes, size: int, pieces: tuple[Piece, ...]) -> tuple[int, bytes]:
        """Note the sparse map (format 1.0); return the stored size and the records."""
        ranges = [(piece.start, piece.length) for piece in pieces]
        if not ranges or sum(ranges[-1]) < size:
            ranges.append((size, 0))
        text = b"%d\n" % len(ranges) + b"".join(b"%d\n%d\n" % pair for pair in ranges)
        self._maps[len(self._names)] = text + bytes(-len(text) % s.BLOCK)
        stored = len(self._maps[len(self._names)]) + sum(piece.length for piece in pieces)
        words = ((b"major", b"1"), (b"minor", b"0"), (b"name", name), (b"realsize", b"%d" % size))
        return stored, b"".join(record(b"GNU.sparse." + key, value) for key, value in words)

    def disk(self) -> Disk:
        """Return the archive."""
        count = len(self._names)
        table = np.array(self._columns, np.int64).reshape(count, 8)
        lengths = np.zeros(count, np.int64)
        for number, records in self._pax.items():
            lengths[number] = 2 * s.BLOCK - 1 + len(records)
        lengths -= lengths % s.BLOCK
        for number, text in self._maps.items():
            lengths[number] += len(text)  # a map stands behind the header, with the metadata
        meta_ends = np.cumsum(lengths + s.BLOCK)
        blob = np.zeros(int(meta_ends[-1]) + _END if count else _END, np.uint8)
        maps = np.array([len(self._maps.get(n, b"")) for n in range(count)], np.int64)
        self._fill(blob, meta_ends - maps - s.BLOCK, _headers(self._names, self._links, table))
        if self._pax:
            self._fill_pax(blob, meta_ends - lengths - s.BLOCK)
        for number, text in self._maps.items():
            blob[int(meta_ends[number]) - len(text) : int(meta_ends[number])] = np.frombuffer(text, np.uint8)
        return self._mapped(blob, meta_ends, table[:, 3] - maps)

    def _fill(self, blob: NDArray[np.uint8], places: NDArray[np.int64], headers: NDArray[np.void]) -> None:
        if len(headers):
            blob.reshape(-1, s.BLOCK)[places // s.BLOCK] = headers.view(np.uint8).reshape(-1, s.BLOCK)

    def _fill_pax(self, blob: NDArray[np.uint8], places: NDArray[np.int64]) -> None:
        numbers = sorted(self._pax)
        table = np.zeros((len(numbers), 8), np.int64)
        table[:, 0] = 0o644
        table[:, 3] = [len(self._pax[n]) for n in numbers]
        table[:, 5] = s.PAX
        headers = _headers([_PAX_NAME] * len(numbers), [b""] * len(numbers), table)
        starts = places[numbers]
        self._fill(blob, starts, headers)
        for start, number in zip((starts + s.BLOCK).tolist(), numbers, strict=True):
            body = self._pax[number]
            blob[start : start + len(body)] = np.frombuffer(body, np.uint8)

    def _mapped(self, blob: NDArray[np.uint8], meta_ends: NDArray[np.int64], stored: NDArray[np.int64]) -> Disk:
        """Lay metadata, content and padding one after the other."""
        sources: list[ByteSource] = [BytesSource(blob.data, "tar headers")]
        index: dict[int, int] = {}
        rows: list[tuple[int, int, int, int, int]] = []  # start, length, offset, file, kind
        at = begun = 0
        for meta_end, size, pieces in zip(meta_ends.tolist(), stored.tolist(), self._content, strict=True):
            rows.append((at, meta_end - begun, begun, 0, DATA))
            at, begun = at + meta_end - begun, meta_end
            if not size:
                continue
            end = at + size
            reach = 0  # of the file, to see its holes
            packed = sum(piece.length for piece in pieces or ()) == size
            for piece in pieces or ():
                if not packed and piece.start > reach:
                    rows.append((at, piece.start - reach, 0, 0, HOLE))
                    at += piece.start - reach
                file = index.setdefault(id(piece.source), len(sources))
                if file == len(sources):
                    sources.append(piece.source)
                rows.append((at, piece.length, piece.offset, file, DATA))
                at, reach = at + piece.length, piece.start + piece.length
            padded = end + -size % s.BLOCK
            if padded > at:
                rows.append((at, padded - at, 0, 0, HOLE))
            at = padded
        rows.append((at, _END, begun, 0, DATA))
        return Mapped(coalesce(_extent_rows(rows)), sources)


def _extent_rows(rows: list[tuple[int, int, int, int, int]]) -> NDArray[np.void]:
    table = np.array(rows, np.uint64)
    out = np.zeros(len(rows), EXTENT)
    for number, name in enumerate(("start", "length", "offset", "file", "kind")):
        out[name] = table[:, number]
    return out


def _headers(names: list[bytes], links: list[bytes], table: NDArray[np.int64]) -> NDArray[np.void]:
    """Return headers; columns of `table`: mode, uid, gid, size, mtime, typeflag, major, minor. Too large becomes 0."""
    rows = np.zeros(len(names), s.ROW)
    rows["name"] = [name[:100] for name in names]
    rows["linkname"] = [link[:100] for link in links]
    rows["magic"], rows["version"] = b"ustar", b"00"
    limits = (("mode", 7), ("uid", 7), ("gid", 7), ("size", 11), ("mtime", 11))
    for number, (name, digits) in enumerate(limits):
        column = table[:, number]
        fits = (column >= 0) & (column < 1 << (3 * digits))
        rows[name] = s.to_octal(np.where(fits, column, 0), digits + 1)
    rows["typeflag"] = table[:, 5]
    device = np.isin(table[:, 5], (s.CHARACTER, s.BLOCK_DEVICE))
    rows["devmajor"] = np.where(device[:, None], s.to_octal(table[:, 6], 8), 0)
    rows["devminor"] = np.where(device[:, None], s.to_octal(table[:, 7], 8), 0)
    sums, _ = s.checksums(rows)
    rows["chksum"][:, :7] = s.to_octal(sums, 7)
    rows["chksum"][:, 7] = 32
    return rows


def header_bytes(name: bytes, size: int, mtime: int = 0) -> bytes:
    """Return the header of one regular file with a short name, 512 bytes; sizes above 8 GiB in base-256 (GNU)."""
    table = np.array([[0o644, 0, 0, size if size <= _MOST_SIZE else 0, mtime, s.REGULAR, 0, 0]], np.int64)
    rows = _headers([name], [b""], table)
    if size > _MOST_SIZE:
        field = b"\x80" + size.to_bytes(11, "big")
        rows["size"][0] = np.frombuffer(field, np.uint8)
        rows["chksum"][0] = np.frombuffer(b" " * 8, np.uint8)
        rows["chksum"][0, :7] = s.to_octal(s.checksums(rows)[0], 7)[0]
    return rows.tobytes()
