"""Reads XFS as trees, directory by directory when first asked for ("Directories", "Symbolic Links")."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from diskmorph.formats.tree import Node, Piece, Tree
from diskmorph.formats.views import DiskSource
from diskmorph.formats.xfs import schema as s
from diskmorph.formats.xfs.attributes import attributes_of
from diskmorph.formats.xfs.log import require_clean
from diskmorph.formats.xfs.volume import Inode, Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.errors import FormatError
    from diskmorph.formats.limits import Limits

_LONGEST_LINK = 1024
_LARGEST_LINK_EXTENT = 128 << 10
_LARGEST_FILE = 1 << 63
_KINDS = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))
_DOTS = frozenset((b".", b".."))


def read_xfs(disk: Disk, *, limits: Limits | None = None) -> Tree:
    """Return the tree of a file system; one whose log needs replay is refused. The tree owns the disk.

    Raises FormatError (damaged, cut off) and UnsupportedError, here or when a directory is first looked into.
    """
    source = DiskSource.of(disk)
    volume = Volume(source)
    require_clean(volume)
    tree = Tree(_Reader(volume).root(), name=disk.name, format="xfs", limits=limits)
    tree.sources.append(source)
    return tree


class _Reader:
    """Makes nodes of inodes; names of one inode share its node."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._linked: dict[int, Node] = {}
        self._single: set[int] = set()
        self._directories = {volume.super.rootino}

    def root(self) -> Node:
        inode = self._volume.inode(self._volume.super.rootino)
        if inode.mode & 0o170000 != stat.S_IFDIR:
            raise self._damaged(inode, "the root, is not a directory")
        return self._node(inode)

    def _damaged(self, inode: Inode, problem: str) -> FormatError:
        return self._volume.error(f"inode {inode.number} {problem}", "inode", 0)

    def _lister(self, inode: Inode) -> Callable[[], dict[bytes, Node]]:
        return lambda: self._children(inode)

    def _children(self, folder: Inode) -> dict[bytes, Node]:
        found: dict[bytes, Node] = {}
        for number, name in self._entries(folder):
            if name in _DOTS:
                continue
            if not name or b"/" in name or b"\0" in name or name in found:
                raise self._volume.error(f"directory {folder.number} holds the name {name!r}", "directory entry", 0)
            inode = self._volume.inode(number)
            if inode.mode & 0o170000 == stat.S_IFDIR:
                if number in self._directories:
                    raise self._damaged(folder, f"leads to directory {number}, which has another name already")
                self._directories.add(number)
                found[name] = self._node(inode)
            elif inode.links > 1:
                if number not in self._linked:
                    self._linked[number] = self._node(inode)
                found[name] = self._linked[number]
            else:
                if number in self._single:
                    raise self._damaged(inode, "has more names than it says")
                self._single.add(number)
                found[name] = self._node(inode)
        return found

    def _node(self, inode: Inode) -> Node:
        kind = inode.mode & 0o170000
        if kind not in _KINDS or not inode.links or inode.size >= _LARGEST_FILE:
            raise self._damaged(inode, "has a name, but is unused or damaged")
        node = Node(
            inode.mode,
            inode.uid,
            inode.gid,
            inode.mtime,
            xattrs=attributes_of(self._volume, inode),
            children=self._lister(inode) if kind == stat.S_IFDIR else None,
        )
        if kind == stat.S_IFREG:
            node.size = inode.size
            node.pieces = self._pieces(inode)
        elif kind == stat.S_IFLNK:
            node.target = self._target(inode)
            node.size = len(node.target)
        elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
            number = int.from_bytes(inode.data[:4], "big")
            node.rdev = (number >> 18, number & 0x3FFFF)
        return node

    def _pieces(self, inode: Inode) -> tuple[Piece, ...]:
        size = self._volume.block_size
        pieces = []
        for block, count, at in self._volume.runs(inode):
            start = block * size
            length = min(count * size, inode.size - start)
            if length > 0:
                pieces.append(Piece(start, length, self._volume.source, at))
        return tuple(pieces)

    def _target(self, inode: Inode) -> bytes:
        if not 0 < inode.size <= _LONGEST_LINK:
            raise self._damaged(inode, "is a symbolic link of a wrong length")
        target = inode.data[: inode.size] if inode.format == s.LOCAL else self._remote_target(inode)
        if len(target) != inode.size or b"\0" in target:
            raise self._damaged(inode, "is a damaged symbolic link")
        return target

    def _remote_target(self, inode: Inode) -> bytes:
        volume = self._volume
        header = s.REMOTE_HEADER if volume.version == 5 else 0
        target = b""
        for _, count, at in volume.runs(inode):  # a header and a checksum for each extent, not for each block
            length = count * volume.block_size
            if length > _LARGEST_LINK_EXTENT:
                raise self._damaged(inode, "is a symbolic link of a wrong length")
            data = volume.read(at, length)
            if header:
                volume.verify(data, s.REMOTE_CRC, at, "symbolic link")
                if data[:4] != s.MAGIC_SYMLINK:
                    raise volume.error("a symbolic link is damaged", "symbolic link", at)
            target += data[header : header + inode.size - len(target)]
            if len(target) >= inode.size:
                break
        return target

    # --- directories

    def _entries(self, folder: Inode) -> Iterator[tuple[int, bytes]]:
        """Yield (inode number, name) of a directory's entries."""
        if folder.format == s.LOCAL:
            yield from self._short(folder)
            return
        volume = self._volume
        size = volume.block_size
        per = volume.dir_block // size
        parts: list[int] = []  # where the blocks of the directory block that is being put together lie
        for block, count, at in volume.runs(folder):
            if block * size >= s.DIR_LEAF_OFFSET:
                break
            for number in range(count):
                if (block + number) % per != len(parts):
                    raise self._damaged(folder, "is a directory with a hole")
                parts.append(at + number * size)
                if len(parts) == per:
                    yield from self._block(folder, parts)
                    parts = []
        if parts:
            raise self._damaged(folder, "is a directory with a hole")

    def _short(self, folder: Inode) -> Iterator[tuple[int, bytes]]:
        data = folder.data[: folder.size]
        if len(data) < 6:
            raise self._damaged(folder, "is a damaged directory")
        count, wide = data[0], 8 if data[1] else 4
        at = 2 + wide
        kind = 1 if self._volume.ftype else 0
        for _ in range(count):
            length = data[at] if at < len(data) else 0
            end = at + 3 + length + kind + wide
            if not length or end > len(data):
                raise self._damaged(folder, "is a damaged directory")
            yield int.from_bytes(data[end - wide : end], "big"), data[at + 3 : at + 3 + length]
            at = end

    def _block(self, folder: Inode, parts: list[int]) -> Iterator[tuple[int, bytes]]:
        """Yield the entries of a directory block that lies in blocks at these bytes."""
        volume, place = self._volume, parts[0]
        for part in parts:
            volume.claim(part, "directory block")
        data = b"".join(volume.read(part, volume.block_size) for part in parts)
        if volume.version == 5:
            volume.verify(data, s.DIR_CRC, place, "directory block")
            volume.require_owner(data, s.DIR_OWNER, folder.number, place, "directory block")
        at = s.DIR_DATA_V5 if volume.version == 5 else s.DIR_DATA_V4
        end = len(data)
        if data[:4] == s.MAGIC_DIR_BLOCK[volume.version]:
            count = int.from_bytes(data[-8:-4], "big")
            end -= 8 + count * 8
        elif data[:4] != s.MAGIC_DIR_DATA[volume.version]:
            raise volume.error("a directory block is damaged", "directory block", place, field="magic")
        kind = 1 if volume.ftype else 0
        if end < at:
            raise volume.error("a directory block is damaged", "directory block", place, field="count")
        while at < end:
            if data[at : at + 2] == b"\xff\xff":
                length = int.from_bytes(data[at + 2 : at + 4], "big")
                if length < 8 or length & 7:
                    raise volume.error("a directory block is damaged", "directory block", place + at)
                at += length
                continue
            names = data[at + 8]
            size = s.DIRENT_FIXED + names + kind + 2 + 7 & ~7
            if not names or at + size > end:
                raise volume.error(f"directory {folder.number} is damaged", "directory entry", place + at)
            yield int.from_bytes(data[at : at + 8], "big"), data[at + 9 : at + 9 + names]
            at += size
