"""From a tree to tables: inodes in the order of their numbers, names, pieces of content."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.errors import TargetError
from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.zeroes import PIECE
from diskmorph.formats.tree import Node, dir_node

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.tree import Tree

_FAR = 1 << 40  # seconds: far beyond what ext4 can say
LOST_FOUND = b"lost+found"


@dataclass
class Names:
    """The entries of all directories, directory after directory; `.` and `..` are the first two of each.

    `directories`: numbers of the directory objects; `counts`: entries of each; `names`, `objects`: of each entry.
    """

    directories: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)


class Collector:
    """Numbers the nodes of a tree, or of a tree that grows layer by layer: a node keeps its number.

    Object 0 is the root, object 1 lost+found, made if there is none (e2fsck wants it); object n > 0 is inode n + 10.
    Objects of nodes that are gone keep their numbers unused, so that what a lower layer has lies where it lay.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.alive: list[int] = []
        self._numbers: dict[int, int] = {}

    def take(self, tree: Tree) -> Names:
        """Give numbers to what is new in the tree; return all its names. Raises TargetError: ext4 cannot hold it."""
        if not self.nodes:
            self._begin(tree)
        elif tree.root is not self.nodes[0]:
            raise ValueError("the tree's root is another than before")
        self._require_lost_found(tree)
        lost_found = {} if LOST_FOUND in tree.root.children else {LOST_FOUND: self.nodes[1]}
        names = Names()
        alive = [0]
        stack = [(0, 0, tree.root)]
        numbers, nodes, limit = self._numbers, self.nodes, tree.limits.directory_entries
        while stack:
            number, parent, folder = stack.pop()
            children = folder.children if number else lost_found | folder.children
            names.directories.append(number)
            names.counts.append(len(children) + 2)
            names.names.extend((b".", b".."))
            names.objects.extend((number, parent))
            inner = []
            for node in children.values():
                found = numbers.get(id(node))
                if found is None:
                    found = numbers[id(node)] = len(nodes)
                    nodes.append(node)
                names.objects.append(found)
                alive.append(found)
                if node.mode & 0o170000 == stat.S_IFDIR:
                    inner.append((found, number, node))
            names.names.extend(children)
            inner.reverse()
            stack.extend(inner)
            if len(alive) > limit:
                raise TargetError(f"the tree has more than {limit} names", file=tree.name)
        self.alive = sorted(set(alive))
        self._require_names(names, tree)
        return names

    def _begin(self, tree: Tree) -> None:
        lost_found = tree.root.children.get(LOST_FOUND)
        if lost_found is None:
            lost_found = dir_node(0o700, mtime=tree.root.mtime)
        self.nodes = [tree.root, lost_found]
        self._numbers = {id(node): number for number, node in enumerate(self.nodes)}

    def _require_lost_found(self, tree: Tree) -> None:
        node = tree.root.children.get(LOST_FOUND)
        if node is not None and not node.is_dir:
            raise TargetError("ext4 keeps the name lost+found for a directory", file=tree.name)

    def _require_names(self, names: Names, tree: Tree) -> None:
        if names.names and max(map(len, names.names)) > 255:
            worst = max(names.names, key=len)
            raise TargetError(
                "a name is too long for ext4", file=tree.name, expected="255 bytes", found=f"{worst[:60]!r}..."
            )
        directories = names.directories
        if len(set(directories)) != len(directories):
            raise TargetError("a directory has two names", file=tree.name)

    def columns(self, tree: Tree) -> NDArray[np.int64]:
        """Return mode, uid, gid, size and mtime (seconds, nanoseconds) of the objects alive, a row each."""
        nodes = [self.nodes[number] for number in self.alive]
        try:
            times = np.array([n.mtime for n in nodes], np.int64)
        except OverflowError:  # beyond the year 2262 nanoseconds need more than 64 bits
            pairs = [divmod(n.mtime, 10**9) for n in nodes]
            seconds = np.array([min(max(second, -_FAR), _FAR) for second, _ in pairs], np.int64)
            nanoseconds = np.array([part for _, part in pairs], np.int64)
        else:
            seconds, nanoseconds = times // 10**9, times % 10**9
        try:
            table = np.array([(n.mode, n.uid, n.gid, n.size) for n in nodes], np.int64).reshape(-1, 4)
        except OverflowError:
            raise TargetError("an owner or a size is too large for ext4", file=tree.name) from None
        if len(table) and not (table[:, 1:3] >= 0).all() & (table[:, 1:3] <= 0xFFFFFFFF).all():
            raise TargetError("an owner's number has more than 32 bits", file=tree.name)
        return np.column_stack((table, seconds, nanoseconds))


def require_holdable(nodes: list[Node], links: NDArray[np.int64]) -> None:
    """Raise TargetError for new objects that no inode can describe; `links`: how many names each has."""
    for node, count in zip(nodes, links.tolist(), strict=True):
        kind = node.mode & 0o170000
        if kind == stat.S_IFDIR:
            continue
        if count > s.MOST_LINKS:
            raise TargetError("a file has too many names for ext4", expected=f"{s.MOST_LINKS} hard links", found=count)
        if kind in {stat.S_IFCHR, stat.S_IFBLK} and (node.rdev[0] >= 1 << 12 or node.rdev[1] >= 1 << 20):
            found = f"{node.rdev[0]}, {node.rdev[1]}"
            raise TargetError("a device's numbers are too large for ext4", expected="12 and 20 bits", found=found)
        if kind == stat.S_IFREG and node.size > s.MOST_SIZE:
            raise TargetError("a file is too large for ext4", expected=f"{s.MOST_SIZE} bytes", found=node.size)


def content(nodes: list[Node], first: int, sources: list[ByteSource], index: dict[int, int]) -> NDArray[np.void]:
    """Return the pieces of regular files; `first` is the first node's object number. New sources are appended."""
    rows: list[tuple[int, int, int, int, int]] = []
    for owner, node in enumerate(nodes, first):
        if node.mode & 0o170000 != stat.S_IFREG:
            continue
        for start, length, source, offset in node.pieces:
            number = index.get(id(source))
            if number is None:
                number = index[id(source)] = len(sources)
                sources.append(source)
            rows.append((owner, start, length, offset, number))
    table = np.array(rows, np.int64).reshape(-1, 5)
    out = np.zeros(len(table), PIECE)
    for column, name in enumerate(PIECE.names or ()):
        out[name] = table[:, column]
    return out[out["length"] > 0]


_FILE_TYPES = np.zeros(16, np.int64)
for _bits, _type in s.FILE_TYPES.items():
    _FILE_TYPES[_bits] = _type


def file_types(modes: NDArray[Any]) -> NDArray[np.int64]:
    """Return the file_type of directory entries for modes."""
    found: NDArray[np.int64] = _FILE_TYPES[modes >> 12 & 15]
    return found
