"""Reads btrfs as trees: the default subvolume, others as directories in it, directory by directory."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diskmorph.formats.btrfs import schema as s
from diskmorph.formats.btrfs.content import Decoded, pieces_of
from diskmorph.formats.btrfs.volume import Item, Volume
from diskmorph.formats.errors import SourceError
from diskmorph.formats.tree import Node, Tree
from diskmorph.formats.views import DiskSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.errors import FormatError
    from diskmorph.formats.limits import Limits

_LONGEST_LINK = 4096
_MAJOR = 20  # bits of a device's minor number
_KINDS = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))


def read_btrfs(disk: Disk, *, subvolume: bytes | None = None, limits: Limits | None = None) -> Tree:
    """Return the tree of a file system: its default subvolume, or one by its path from the top.

    Subvolumes inside are directories, as a mount shows them. The tree owns the disk. Raises FormatError (damaged, cut
    off), UnsupportedError (several devices and other features by name), here or when a directory is first looked into;
    SourceError (no such subvolume).
    """
    source = DiskSource.of(disk)
    reader = _Reader(Volume(source))
    tree = Tree(reader.root(top=subvolume is not None), name=disk.name, format="btrfs", limits=limits)
    if subvolume is not None:
        found = tree.find(subvolume)
        if found is None or not found.is_dir:
            raise SourceError(f"has no subvolume {subvolume.decode(errors='backslashreplace')!r}", file=disk.name)
        tree = Tree(found, name=disk.name, format="btrfs", limits=limits)
    tree.sources.append(source)
    return tree


@dataclass(frozen=True)
class _Subvolume:
    """A tree of files: its number, where its root lies, its top directory's inode."""

    number: int
    block: int
    level: int
    directory: int


class _Reader:
    """Makes nodes of inodes; names of one inode share its node."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._decoded = Decoded(volume)
        self._linked: dict[tuple[int, int], Node] = {}
        self._single: set[tuple[int, int]] = set()
        self._directories: set[tuple[int, int]] = set()

    def root(self, *, top: bool) -> Node:
        number = s.FS_TREE if top else self._default()
        subvolume = self._subvolume(number)
        if subvolume is None:
            raise self._volume.error(f"subvolume {number} does not exist", "root tree", 0)
        return self._node(subvolume, subvolume.directory)

    def _default(self) -> int:
        """Return the number of the subvolume that is mounted unless another is asked for."""
        for item in self._of_root(s.ROOT_TREE_DIR, s.DIR_ITEM):
            for number, _, name, _ in self._names(item):
                if name == b"default":
                    return number
        return s.FS_TREE

    def _of_root(self, number: int, kind: int, key: int | None = None) -> list[Item]:
        """Return the items of one type that the tree of trees holds of an object, or the one with that key."""
        found = self._volume.super
        low, high = ((number, kind, 0), (number, kind + 1, 0))
        if key is not None:
            low, high = (number, kind, key), (number, kind, key + 1)
        return self._volume.items(found.root, found.root_level, low, high)

    def _subvolume(self, number: int) -> _Subvolume | None:
        items = self._of_root(number, s.ROOT_ITEM)
        if not items:
            return None
        root = items[-1].data
        if len(root) < s.ROOT.sizeof():
            raise self._volume.error(f"the root of subvolume {number} is damaged", "root item", 0)
        parsed = s.ROOT.parse(root)
        return _Subvolume(number, parsed.bytenr, parsed.level, parsed.root_dirid)

    def _names(self, item: Item) -> list[tuple[int, int, bytes, bytes]]:
        """Return (objectid, type of its key, name, data) of the entries in a dir item or xattr item."""
        found = []
        at = 0
        while at < len(item.data):
            if at + s.DIRENT.size > len(item.data):
                raise self._volume.error("a directory item is damaged", "dir item", 0)
            objectid, kind, _, _, data, names, _ = s.DIRENT.unpack_from(item.data, at)
            at += s.DIRENT.size
            name, value = item.data[at : at + names], item.data[at + names : at + names + data]
            if len(name) != names or len(value) != data:
                raise self._volume.error("a directory item is damaged", "dir item", 0)
            found.append((objectid, kind, name, value))
            at += names + data
        return found

    def _damaged(self, number: int, problem: str) -> FormatError:
        return self._volume.error(f"inode {number} {problem}", "inode item", 0)

    def _lister(self, subvolume: _Subvolume, number: int) -> Callable[[], dict[bytes, Node]]:
        return lambda: self._children(subvolume, number)

    def _children(self, subvolume: _Subvolume, number: int) -> dict[bytes, Node]:
        found: dict[bytes, Node] = {}
        low, high = (number, s.DIR_INDEX, 0), (number, s.DIR_INDEX + 1, 0)
        for item in self._volume.items(subvolume.block, subvolume.level, low, high):
            for objectid, kind, name, _ in self._names(item):
                if not name or name in (b".", b"..") or b"/" in name or b"\0" in name or name in found:
                    raise self._volume.error(f"directory {number} holds the name {name!r}", "dir item", 0)
                found[name] = self._child(subvolume, number, objectid, kind, name)
        return found

    def _child(self, subvolume: _Subvolume, folder: int, objectid: int, kind: int, name: bytes) -> Node:
        if kind == s.ROOT_ITEM:
            inner = self._subvolume(objectid) if self._refers(subvolume, folder, objectid, name) else None
            if inner is None:  # a snapshot of what held a subvolume has an empty directory in its place
                return Node(stat.S_IFDIR | 0o755)
            return self._node(inner, inner.directory)
        linked = self._linked.get((subvolume.number, objectid))
        return linked if linked is not None else self._node(subvolume, objectid)

    def _refers(self, subvolume: _Subvolume, folder: int, objectid: int, name: bytes) -> bool:
        """Return whether the tree of trees says that a subvolume lies under this name: of snapshots it does not."""
        for item in self._of_root(subvolume.number, s.ROOT_REF, objectid):
            if len(item.data) > s.ROOT_REFERENCE.size:
                directory, _, length = s.ROOT_REFERENCE.unpack_from(item.data)
                return (directory, item.data[s.ROOT_REFERENCE.size :]) == (folder, name) and length == len(name)
        return False

    def _node(self, subvolume: _Subvolume, number: int) -> Node:
        items = self._items(subvolume, number, s.INODE_ITEM, s.XATTR_ITEM)
        raw = items[0].data if items and items[0].type == s.INODE_ITEM else b""
        if len(raw) < s.INODE_FAST.size:
            raise self._damaged(number, "has a name, but does not exist")
        size, links, uid, gid, mode, rdev, seconds, nanoseconds = s.INODE_FAST.unpack_from(raw)
        kind = mode & 0o170000
        if kind not in _KINDS or not links or size >= 1 << 63 or nanoseconds >= 10**9:
            raise self._damaged(number, "is damaged")
        node = Node(mode, uid, gid, seconds * 10**9 + nanoseconds, xattrs=self._xattrs(items))
        if kind == stat.S_IFDIR:
            self._require_new(subvolume, number)
            node = Node(mode, uid, gid, node.mtime, xattrs=node.xattrs, children=self._lister(subvolume, number))
        elif kind == stat.S_IFREG:
            node.size = size
            extents = self._items(subvolume, number, s.EXTENT_DATA, s.EXTENT_DATA)
            node.pieces = pieces_of(self._decoded, extents, size, number)
        elif kind == stat.S_IFLNK:
            node.target = self._target(self._items(subvolume, number, s.EXTENT_DATA, s.EXTENT_DATA), size, number)
            node.size = len(node.target)
        elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
            node.rdev = (rdev >> _MAJOR, rdev & (1 << _MAJOR) - 1)
        if kind != stat.S_IFDIR:
            self._note(subvolume, number, node, links)
        return node

    def _items(self, subvolume: _Subvolume, number: int, first: int, last: int) -> list[Item]:
        """Return an inode's items of the types from `first` to `last`."""
        low, high = (number, first, 0), (number, last + 1, 0)
        return self._volume.items(subvolume.block, subvolume.level, low, high)

    def _note(self, subvolume: _Subvolume, number: int, node: Node, links: int) -> None:
        key = (subvolume.number, number)
        if links > 1:
            self._linked[key] = node
            return
        if key in self._single:
            raise self._damaged(number, "has more names than it says")
        self._single.add(key)

    def _require_new(self, subvolume: _Subvolume, number: int) -> None:
        key = (subvolume.number, number)
        if key in self._directories:
            raise self._damaged(number, "is a directory with two names")
        self._directories.add(key)

    def _xattrs(self, items: list[Item]) -> dict[bytes, bytes]:
        return {name: value for item in items if item.type == s.XATTR_ITEM for _, _, name, value in self._names(item)}

    def _target(self, items: list[Item], size: int, number: int) -> bytes:
        if not 0 < size <= _LONGEST_LINK:
            raise self._damaged(number, "is a symbolic link of a wrong length")
        pieces = pieces_of(self._decoded, items, size, number)
        target = b"".join(piece.source.read(piece.offset, piece.length) for piece in pieces)
        if len(target) != size or b"\0" in target:
            raise self._damaged(number, "is a damaged symbolic link")
        return target
