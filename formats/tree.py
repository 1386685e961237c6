"""`Tree`: files with owners, modes, times, xattrs, hard links, devices and holes, whatever they lie in.

A tree is held in memory as nodes; what the files contain is not: a node says where its bytes lie (`Piece`), so that
nothing is copied before it must be. A `Node` is what an inode is: hard links are several names of the same node object.
Names, link targets and xattr names are bytes, as kernels have them.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from diskmorph.formats.errors import FormatError
from diskmorph.formats.limits import Limits
from diskmorph.formats.source import ByteSource, BytesSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diskmorph.formats.source import Buffer

_MAX_LINKS = 40  # symbolic links followed in one path, as Linux has it
_NO_XATTRS: Mapping[bytes, bytes] = {}
_CHUNK = 1 << 20


class Piece(NamedTuple):
    """`length` bytes of a file from byte `start`: those of `source` from `offset`."""

    start: int
    length: int
    source: ByteSource
    offset: int


class Node:
    """An inode: everything about a file but its names.

    - `mode`: type and permission bits, as `st_mode`; `uid`, `gid`: numbers; `mtime`: nanoseconds since 1970.
    - regular files: `size` in bytes and `pieces`, sorted, without overlap; what no piece covers is a hole.
    - symbolic links: `target`; character and block devices: `rdev`, (major, minor).
    - directories: `children`, name -> node, in the order of their source; perhaps read when first asked for.
    - `xattrs`: full names ("user.note", "security.capability"); POSIX ACLs as `getxattr` returns them (version 2).
    - `layer`: number of the image layer that brought the node; 0 where there are no layers.
    """

    __slots__ = ("_children", "gid", "layer", "mode", "mtime", "pieces", "rdev", "size", "target", "uid", "xattrs")

    def __init__(
        self,
        mode: int,
        uid: int = 0,
        gid: int = 0,
        mtime: int = 0,
        *,
        size: int = 0,
        pieces: Sequence[Piece] = (),
        target: bytes = b"",
        rdev: tuple[int, int] = (0, 0),
        xattrs: Mapping[bytes, bytes] = _NO_XATTRS,
        layer: int = 0,
        children: Callable[[], dict[bytes, Node]] | None = None,
    ) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.size = size
        self.pieces = pieces
        self.target = target
        self.rdev = rdev
        self.xattrs = xattrs
        self.layer = layer
        self._children: dict[bytes, Node] | Callable[[], dict[bytes, Node]] | None = children
        if children is None and mode & 0o170000 == stat.S_IFDIR:
            self._children = {}

    @property
    def kind(self) -> int:
        """The type bits of the mode: stat.S_IFREG, S_IFDIR, ..."""
        return self.mode & 0o170000

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return self.mode & 0o170000 == stat.S_IFDIR

    @property
    def children(self) -> dict[bytes, Node]:
        """A directory's names; empty for everything else. Raises what its reader raises when first asked."""
        found = self._children
        if type(found) is dict:
            return found
        if found is None:
            return {}
        self._children = loaded = found()  # type: ignore[operator]  # the other member of the union
        return loaded

    def clear(self) -> None:
        """Empty a directory, perhaps before it was ever read."""
        self._children = {}

    def source(self, name: str = "file") -> ByteSource:
        """Return a regular file's bytes, holes as zeroes."""
        if len(self.pieces) == 1 and self.pieces[0].start == 0 and self.pieces[0].length == self.size:
            piece = self.pieces[0]
            return piece.source.window(piece.offset, piece.length, name)
        return _PiecesSource(self, name)

    def read(self) -> bytes:
        """Return the whole content; for small files (the caller checks `size`)."""
        return self.source().read(0, self.size)


def file_node(data: Buffer, mode: int = 0o644, uid: int = 0, gid: int = 0, mtime: int = 0) -> Node:
    """Return a regular file of these bytes; `mode` holds permission bits."""
    size = len(data)
    pieces = (Piece(0, size, BytesSource(data), 0),) if size else ()
    return Node(stat.S_IFREG | mode, uid, gid, mtime, size=size, pieces=pieces)


def link_node(target: bytes, uid: int = 0, gid: int = 0, mtime: int = 0) -> Node:
    """Return a symbolic link."""
    return Node(stat.S_IFLNK | 0o777, uid, gid, mtime, target=target, size=len(target))


def dir_node(mode: int = 0o755, uid: int = 0, gid: int = 0, mtime: int = 0) -> Node:
    """Return an empty directory; `mode` holds permission bits."""
    return Node(stat.S_IFDIR | mode, uid, gid, mtime)


class Entry(NamedTuple):
    """A name in a tree: its path from the root (no slash at either end; the root's is empty) and its node."""

    path: bytes
    node: Node


class Tree:
    """A root directory and what it took to read it.

    `name` and `format` stand in messages; `sources` are closed with the tree; `config` is the OCI image configuration
    of a container image, else empty; `lost` names what the source had and the tree has not. Paths given to methods may
    begin with `/` or `./`; `..` is refused. Symbolic links on the way are followed within the tree, as in a chroot.
    """

    def __init__(
        self, root: Node | None = None, *, name: str = "tree", format: str = "tree", limits: Limits | None = None
    ) -> None:
        self.root = root or dir_node()
        self.name = name
        self.format = format
        self.sources: list[ByteSource] = []
        self.config: Mapping[str, Any] = {}
        self.lost: list[str] = []
        self.limits = limits or Limits()
        self._folders: dict[bytes, Node] = {}  # paths as they were asked for -> directories
        self._put = 0

    def walk(self, *, ordered: bool = False) -> Iterator[Entry]:
        """Yield every name, the root first, parents before children; with `ordered` sorted by name in each directory.

        Raises FormatError beyond `limits.directory_entries` names.
        """
        count = 0
        stack = [Entry(b"", self.root)]
        while stack:
            entry = stack.pop()
            yield entry
            children = entry.node.children
            if not children:
                continue
            count += len(children)
            if count > self.limits.directory_entries:
                raise self._too_many()
            prefix = entry.path + b"/" if entry.path else b""
            names = sorted(children, reverse=True) if ordered else reversed(children)
            stack.extend([Entry(prefix + name, children[name]) for name in names])

    def find(self, path: bytes | str, *, follow: bool = True) -> Node | None:
        """Return the node at `path`, or None; `follow` resolves a symbolic link at its end, too."""
        words = _split(_bytes(path))
        found = self._walk_to(words, follow=follow, create=None)
        return found[-1] if found else None

    def put(self, path: bytes | str, node: Node) -> None:
        """Give `node` a name; missing parents are made. What had the name is replaced, as tar does.

        A directory put over a directory changes its attributes and keeps its children and its node. Raises FormatError
        for names that leave the tree or lead through a file, and beyond `limits.directory_entries`.
        """
        path = _bytes(path).rstrip(b"/")
        head, _, name = path.rpartition(b"/")
        if name in _DOTS or b"\0" in name:
            head, name = self._plain_name(path)
            if not name:
                self._update(self.root, node)
                return
        folder = self._folders.get(head)
        if folder is None:
            folder = self._folder(head, node)
        children = folder.children
        old = children.get(name)
        if old is None:
            self._put += 1
            if self._put > self.limits.directory_entries:
                raise self._too_many()
        elif old is not node:
            if old.is_dir and node.is_dir:
                self._update(old, node)
                return
            if old.is_dir or old.kind == stat.S_IFLNK:
                self._folders.clear()
            del children[name]  # a replaced name comes last
        children[name] = node

    def link(self, path: bytes | str, target: bytes | str) -> None:
        """Give the file at `target` another name: a hard link. Raises FormatError if it is missing or a directory."""
        node = self.find(target, follow=False)
        if node is None or node.is_dir:
            what = "a directory" if node is not None else "not in the tree"
            raise FormatError(
                f"the hard link {_shown(path)} leads to {_shown(target)}, which is {what}",
                file=self.name,
                format=self.format,
            )
        self.put(path, node)

    def remove(self, path: bytes | str) -> Node | None:
        """Take a name and all below it away; return its node, or None if there is no such name."""
        words = _split(_bytes(path))
        if not words:
            return None
        found = self._walk_to(words[:-1], follow=True, create=None)
        node = found[-1].children.pop(words[-1], None) if found else None
        if node is not None and node.kind in _LEADING:
            self._folders.clear()
        return node

    def verify_unchanged(self) -> None:
        """Raise IntegrityError if what the files' bytes come from changed since it was opened."""
        for source in self.sources:
            source.verify_unchanged()

    def close(self) -> None:
        """Close what the files' bytes come from."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plain_name(self, path: bytes) -> tuple[bytes, bytes]:
        words = _split(path)
        return (b"/".join(words[:-1]), words[-1]) if words else (b"", b"")

    def _update(self, old: Node, new: Node) -> None:
        if not new.is_dir:
            raise FormatError("the root is not a directory", file=self.name, format=self.format)
        old.mode, old.uid, old.gid, old.mtime, old.xattrs = new.mode, new.uid, new.gid, new.mtime, new.xattrs

    def _folder(self, head: bytes, child: Node) -> Node:
        found = self._walk_to(_split(head), follow=True, create=child)
        if not found:
            raise FormatError(
                f"the name {_shown(head)} leads through something that is not a directory",
                file=self.name,
                format=self.format,
            )
        self._folders[head] = found[-1]
        return found[-1]

    def _walk_to(self, words: Sequence[bytes], *, follow: bool, create: Node | None) -> list[Node]:
        """Return the nodes from the root to `words`; none where the way ends. `create`: make missing directories."""
        way = [self.root]
        left = list(reversed(words))
        hops = 0
        while left:
            word = left.pop()
            if word == b"..":  # from a link's target only
                way = way[:-1] if len(way) > 1 else way
                continue
            if not way[-1].is_dir:
                return []
            node = way[-1].children.get(word)
            if node is None:
                if create is None:
                    return []
                node = way[-1].children[word] = dir_node(mtime=create.mtime)
                node.layer = create.layer
                self._put += 1
            if node.kind == stat.S_IFLNK and (left or follow):
                hops += 1
                if hops > _MAX_LINKS:
                    return []
                way = [self.root] if node.target.startswith(b"/") else way
                left.extend(w for w in reversed(node.target.split(b"/")) if w not in (b"", b"."))
                continue
            way.append(node)
        if create is not None and not way[-1].is_dir:
            return []
        return way

    def _too_many(self) -> FormatError:
        return FormatError(
            f"the tree has more than {self.limits.directory_entries} names", file=self.name, format=self.format
        )


_DOTS = frozenset((b"", b".", b".."))
_LEADING = frozenset((stat.S_IFDIR, stat.S_IFLNK))


def _bytes(path: bytes | str) -> bytes:
    return path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")


def _shown(path: bytes | str) -> str:
    return repr(_bytes(path).decode("utf-8", "backslashreplace"))


def _split(path: bytes) -> list[bytes]:
    """Return the components of a path. Raises FormatError for `..` and NUL: names that leave the tree."""
    words = [word for word in path.split(b"/") if word not in (b"", b".")]
    if b".." in words or b"\0" in path:
        raise FormatError(f"the name {_shown(path)} is not allowed: it leads out of the tree")
    return words


class _PiecesSource(ByteSource):
    """A file's bytes from its pieces; between them zeroes."""

    def __init__(self, node: Node, name: str) -> None:
        self.name = name
        self.size = node.size
        self._pieces = node.pieces
        self._starts = [piece.start for piece in node.pieces]

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        from bisect import bisect_right  # noqa: PLC0415 - few files have more than one piece

        count = max(0, min(len(buffer), self.size - offset))
        done = 0
        index = max(bisect_right(self._starts, offset) - 1, 0)
        while done < count:
            at = offset + done
            while index < len(self._pieces) and self._pieces[index].start + self._pieces[index].length <= at:
                index += 1
            piece = self._pieces[index] if index < len(self._pieces) else None
            if piece is not None and piece.start <= at:
                part = min(count - done, piece.start + piece.length - at)
                piece.source.read_into(piece.offset + at - piece.start, buffer[done : done + part])
            else:
                part = min(count - done, (piece.start if piece else self.size) - at)
                buffer[done : done + part] = bytes(part)
            done += part
        return count

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """See ByteSource."""
        at = start
        for piece in self._pieces:
            low, high = max(piece.start, at), min(piece.start + piece.length, stop)
            if low >= high:
                continue
            if low > at:
                yield at, low - at, False
            yield low, high - low, True
            at = high
        if at < stop:
            yield at, stop - at, False


def chunks(node: Node, step: int = _CHUNK) -> Iterator[bytes]:
    """Yield a regular file's content in byte strings of at most `step` bytes."""
    source = node.source()
    for at in range(0, node.size, step):
        yield source.read(at, min(step, node.size - at))


__all__ = ["Entry", "Node", "Piece", "Tree", "chunks", "dir_node", "file_node", "link_node"]
