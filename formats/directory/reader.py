"""Reads a directory of the machine as a tree: relative to descriptors, never through a symbolic link."""

from __future__ import annotations

import errno
import os
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING

from diskmorph.formats.errors import IntegrityError, SourceError
from diskmorph.formats.source import ByteSource
from diskmorph.formats.tree import Node, Piece, Tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.limits import Limits

_OPEN_FILES = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_ALIGN = 4096
_NO_XATTRS = frozenset((errno.ENOTSUP, errno.ENOENT, errno.EPERM, errno.ENODATA, errno.ELOOP))


def read_directory(path: str | os.PathLike[str], *, limits: Limits | None = None) -> Tree:
    """Return the tree of a directory, read directory by directory when first asked for.

    The path itself may be a link. Other file systems mounted inside are read as well. Raises SourceError.
    """
    name = os.fspath(path)
    try:
        root = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"cannot be opened: {os.strerror(error.errno or 0)}", file=name) from error
    source = DirectorySource(name, root)
    tree = Tree(_Scanner(source).root(), name=name, format="directory", limits=limits)
    tree.sources.append(source)
    return tree


class DirectorySource(ByteSource):
    """All regular files of a directory tree, one after the other at made-up offsets.

    One source stands for any number of files. A file is opened when it is read, component by component without
    following links, and must still be the file that was seen (device, inode, size, mtime).
    """

    def __init__(self, name: str, root: int) -> None:
        self.name = name
        self.size = 0
        self.root = root
        self._starts: list[int] = []
        self._files: list[tuple[bytes, tuple[int, int, int, int]]] = []  # path, identity
        self._open: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, path: bytes, status: os.stat_result) -> int:
        """Give a file its place; return the offset of its first byte."""
        start = self.size
        self._starts.append(start)
        self._files.append((path, _identity(status)))
        self.size = start + max(status.st_size + -status.st_size % _ALIGN, _ALIGN)
        return start

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource; what lies between files reads as zeroes."""
        number = bisect_right(self._starts, offset) - 1
        if number < 0 or offset >= self.size:
            return 0
        path, identity = self._files[number]
        within = offset - self._starts[number]
        if within >= identity[2]:
            end = self._starts[number + 1] if number + 1 < len(self._starts) else self.size
            count = min(len(buffer), end - offset)
            buffer[:count] = bytes(count)
            return count
        wanted = min(len(buffer), identity[2] - within)
        try:
            with self._lock:
                count = os.preadv(self._descriptor(number), [buffer[:wanted]], within)
        except OSError as error:
            raise SourceError(f"cannot be read: {os.strerror(error.errno or 0)}", file=self._shown(path)) from error
        if count == 0:
            raise IntegrityError("became shorter while it was read", file=self._shown(path), offset=within)
        return count

    def _descriptor(self, number: int) -> int:
        fd = self._open.get(number)
        if fd is not None:
            self._open.move_to_end(number)
            return fd
        path, identity = self._files[number]
        fd = open_beneath(self.root, path, _FILE)
        if _identity(os.fstat(fd)) != identity:
            os.close(fd)
            raise IntegrityError("changed while it was read", file=self._shown(path))
        self._open[number] = fd
        if len(self._open) > _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _shown(self, path: bytes) -> str:
        return os.path.join(self.name, os.fsdecode(path))  # noqa: PTH118 - a name for messages

    def verify_unchanged(self) -> None:
        """See ByteSource: the files that are open; the others were checked when they were opened."""
        with self._lock:
            for number, fd in self._open.items():
                if _identity(os.fstat(fd)) != self._files[number][1]:
                    raise IntegrityError("changed while it was read", file=self._shown(self._files[number][0]))

    def close(self) -> None:
        """See ByteSource."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])
            if self.root >= 0:
                os.close(self.root)
                self.root = -1


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_beneath(root: int, path: bytes, flags: int) -> int:
    """Open a path relative to the directory `root`, no component of it being a symbolic link. Raises OSError."""
    head, _, name = path.rpartition(b"/")
    if not head:
        return os.open(name or b".", flags, dir_fd=root)
    folder = os.dup(root)
    try:
        for word in head.split(b"/"):
            inner = os.open(word, _DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name, flags, dir_fd=folder)
    finally:
        os.close(folder)


class _Scanner:
    """Makes nodes of directory entries; names of one inode share its node."""

    def __init__(self, source: DirectorySource) -> None:
        self._source = source
        self._linked: dict[tuple[int, int], Node] = {}

    def root(self) -> Node:
        node = self._node(os.fstat(self._source.root), b"", self._source.root, b".")
        node.xattrs = self._xattrs(self._source.root, b".")
        return node

    def _lister(self, path: bytes) -> Callable[[], dict[bytes, Node]]:
        def read() -> dict[bytes, Node]:
            try:
                return self._list(path)
            except OSError as error:
                name = os.path.join(self._source.name, os.fsdecode(path))  # noqa: PTH118 - a name for messages
                hint = "read it as a user who may" if error.errno == errno.EACCES else None
                raise SourceError(f"cannot be read: {os.strerror(error.errno or 0)}", file=name, hint=hint) from error

        return read

    def _list(self, path: bytes) -> dict[bytes, Node]:
        fd = open_beneath(self._source.root, path, _DIRECTORY)
        try:
            prefix = path + b"/" if path else b""
            names = [os.fsencode(name) for name in os.listdir(fd)]  # noqa: PTH208 - a descriptor
            names.sort()
            return {name: self._entry(fd, prefix, name) for name in names}
        finally:
            os.close(fd)

    def _entry(self, folder: int, prefix: bytes, name: bytes) -> Node:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        key = (status.st_dev, status.st_ino)
        many = status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)
        if many and key in self._linked:
            return self._linked[key]
        node = self._node(status, prefix + name, folder, name)
        node.xattrs = self._xattrs(folder, name)
        if many:
            self._linked[key] = node
        return node

    def _node(self, status: os.stat_result, path: bytes, folder: int, name: bytes) -> Node:
        node = Node(
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            children=self._lister(path) if stat.S_ISDIR(status.st_mode) else None,
        )
        if stat.S_ISREG(status.st_mode):
            node.size = status.st_size
            node.pieces = self._pieces(status, path, folder, name)
        elif stat.S_ISLNK(status.st_mode):
            node.target = os.readlink(name, dir_fd=folder)
            node.size = len(node.target)
        elif stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
            node.rdev = (os.major(status.st_rdev), os.minor(status.st_rdev))
        return node

    def _pieces(self, status: os.stat_result, path: bytes, folder: int, name: bytes) -> tuple[Piece, ...]:
        if not status.st_size:
            return ()
        start = self._source.add(path, status)
        if status.st_blocks * 512 >= status.st_size:
            return (Piece(0, status.st_size, self._source, start),)
        fd = os.open(name, _FILE, dir_fd=folder)
        try:
            return tuple(Piece(at, length, self._source, start + at) for at, length in _data_ranges(fd, status.st_size))
        finally:
            os.close(fd)

    def _xattrs(self, folder: int, name: bytes) -> dict[bytes, bytes]:
        path = b"/proc/self/fd/%d/%s" % (folder, name)
        try:
            keys = os.listxattr(path, follow_symlinks=False)
            return {os.fsencode(key): os.getxattr(path, key, follow_symlinks=False) for key in keys}
        except OSError as error:
            if error.errno in _NO_XATTRS:
                return {}
            raise


def _data_ranges(fd: int, size: int) -> list[tuple[int, int]]:
    """Return the (offset, length) of allocated data; all of it where the file system cannot tell."""
    found = []
    at = 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            end = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            return [(0, size)]
        if begin >= size:
            break
        found.append((begin, end - begin))
        at = end
    return found
