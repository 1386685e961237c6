"""Writes a tree as a directory: beside its name first, relative to descriptors, never through a symbolic link.

Nothing of a tree can lie outside the target: every name is created with its own directory's descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Self

from diskmorph.formats.directory.reader import open_beneath
from diskmorph.formats.errors import FormatError, TargetError
from diskmorph.formats.marks import attach
from diskmorph.formats.syncing import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.tree import Node, Piece, Tree

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_STEP = 1 << 20
_SPARSE = 64 << 10  # bytes from which on holes are looked for
_NO_OWNER = 0xFFFFFFFF  # to chown it says: leave it
_OLD, _FAR = -(1 << 31) * 10**9, (1 << 31) * 10**9  # nanoseconds that every file system holds
_TOO_LARGE = frozenset((errno.E2BIG, errno.ERANGE))  # attributes that another file system could hold
_REFUSED = frozenset((errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS))


class DirectoryTarget:
    """A directory that appears whole or not at all; use it in `with`, `write` a tree, then `commit`.

    An existing directory is replaced only if it is empty. Raises TargetError.
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow a link in the target's place
        self._sync = sync
        self._refuse_existing()
        self._part = self.path.with_name(f".{self.path.name[:200]}.{secrets.token_hex(4)}.part")
        try:
            self._part.mkdir(0o700)
            self._fd = os.open(self._part, _DIRECTORY)
        except OSError as error:
            raise self._failed(error, "created") from error

    def _refuse_existing(self) -> None:
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed(error, "created") from error
        if not stat.S_ISDIR(status.st_mode):
            raise TargetError("exists and is not a directory", file=str(self.path))
        if any(self.path.iterdir()):
            raise TargetError(
                "exists and is not empty", file=str(self.path), hint="name a new directory; --force replaces no tree"
            )

    def _failed(self, error: OSError, doing: str = "written", what: str = "") -> TargetError:
        return TargetError(f"cannot be {doing}: {os.strerror(error.errno or 0)}{what}", file=str(self.path))

    def write(self, tree: Tree, lost: list[str] | None = None, moved: Callable[[int], None] | None = None) -> None:
        """Write a tree into the directory; what the machine refuses (owners, devices) is told in `lost`.

        `moved` is called with the bytes of each file written.
        """
        try:
            writer = _Writer(self._fd, moved)
            writer.write(tree)
        except OSError as error:
            name = error.filename if isinstance(error.filename, bytes) else b""
            what = f" ({name[:80].decode(errors='backslashreplace')!r})" if name.strip(b".") else ""
            raise self._failed(error, what=what) from error
        if lost is not None:
            lost.extend(f"{what} of {count} files" for what, count in sorted(writer.refused.items()))

    @property
    def part(self) -> Path:
        """Where the directory is being built: for those who write something else than a tree into it."""
        return self._part

    def commit(self) -> None:
        """Give the directory its name."""
        try:
            if self._sync:
                ctypes.CDLL(None, use_errno=True).syncfs(self._fd)
            attach(self._fd, self.path)
            self._part.rename(self.path)
            if self._sync:
                sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error, "named") from error

    def close(self) -> None:
        """Remove what was not committed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        shutil.rmtree(self._part, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Writer:
    """Creates the files of one tree below one descriptor."""

    def __init__(self, root: int, moved: Callable[[int], None] | None) -> None:
        self._root = root
        self._moved = moved
        self._privileged = os.geteuid() == 0
        self._first: dict[int, bytes] = {}
        self.refused: Counter[str] = Counter()

    def write(self, tree: Tree) -> None:
        """Create everything; directories get their modes and times when nothing more comes into them."""
        folders: list[tuple[bytes, Node]] = []
        stack = [(b"", tree.root)]
        while stack:
            path, node = stack.pop()
            folders.append((path, node))
            fd = open_beneath(self._root, path, _DIRECTORY) if path else os.dup(self._root)
            try:
                for name, child in node.children.items():
                    whole = path + b"/" + name if path else name
                    self._create(fd, name, whole, child)
                    if child.is_dir:
                        stack.append((whole, child))
            finally:
                os.close(fd)
            if len(folders) > tree.limits.directory_entries:
                raise FormatError("the tree has too many directories", file=tree.name, format=tree.format)
        for path, node in reversed(folders):
            fd = open_beneath(self._root, path, _DIRECTORY) if path else os.dup(self._root)
            try:
                self._attributes(fd, b".", node)
            finally:
                os.close(fd)

    def _create(self, folder: int, name: bytes, path: bytes, node: Node) -> None:
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise FormatError(f"a directory of the tree holds the name {name!r}")
        if node.is_dir:
            os.mkdir(name, 0o700, dir_fd=folder)
            return
        first = self._first.get(id(node))
        if first is not None:
            self._link(first, folder, name)
            return
        self._first[id(node)] = path
        if node.kind == stat.S_IFREG:
            self._regular(folder, name, node)
        elif node.kind == stat.S_IFLNK:
            os.symlink(node.target, name, dir_fd=folder)
        elif not self._special(folder, name, node):
            return
        self._attributes(folder, name, node)

    def _link(self, first: bytes, folder: int, name: bytes) -> None:
        head, _, last = first.rpartition(b"/")
        source = open_beneath(self._root, head, _DIRECTORY) if head else os.dup(self._root)
        try:
            os.link(last, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            self.refused["devices"] += 1  # its first name could not be made either
        finally:
            os.close(source)

    def _special(self, folder: int, name: bytes, node: Node) -> bool:
        """Create a device, FIFO or socket; return False, and count it, where that is not allowed."""
        device = node.kind in {stat.S_IFCHR, stat.S_IFBLK}
        if device and not self._privileged:
            self.refused["devices"] += 1
            return False
        try:
            os.mknod(name, node.kind | 0o600, os.makedev(*node.rdev) if device else 0, dir_fd=folder)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self.refused["devices"] += 1
            return False
        return True

    def _regular(self, folder: int, name: bytes, node: Node) -> None:
        fd = os.open(name, _NEW, 0o600, dir_fd=folder)
        try:
            for piece in node.pieces:
                _copy(piece, fd)
            os.ftruncate(fd, node.size)
        finally:
            os.close(fd)
        if self._moved is not None:
            self._moved(node.size)

    def _attributes(self, folder: int, name: bytes, node: Node) -> None:
        """Set owner, mode, xattrs and time, in the order in which none undoes another."""
        if self._privileged:
            try:
                os.chown(name, node.uid, node.gid, dir_fd=folder, follow_symlinks=False)
                if _NO_OWNER in (node.uid, node.gid):
                    self.refused["owners"] += 1
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self.refused["owners"] += 1
        elif (node.uid, node.gid) != (os.geteuid(), os.getegid()):
            self.refused["owners"] += 1
        if node.kind != stat.S_IFLNK:
            os.chmod(name, node.mode & 0o7777, dir_fd=folder)
        self._xattrs(folder, name, node)
        os.utime(name, ns=(node.mtime, node.mtime), dir_fd=folder, follow_symlinks=False)
        if not _OLD <= node.mtime < _FAR and not _has_time(folder, name, node.mtime):
            self.refused["times"] += 1

    def _xattrs(self, folder: int, name: bytes, node: Node) -> None:
        path = b"/proc/self/fd/%d/%s" % (folder, name)
        for key, value in node.xattrs.items():
            try:
                os.setxattr(path, key, value, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _REFUSED | _TOO_LARGE and not self._has_no_room_for(value, error):
                    raise
                self.refused["extended attributes"] += 1

    def _has_no_room_for(self, value: bytes, error: OSError) -> bool:
        """Return whether the inode is full rather than the file system: ext4 says ENOSPC for both."""
        if error.errno != errno.ENOSPC:
            return False
        room = os.fstatvfs(self._root)
        return room.f_bavail * room.f_frsize > _STEP + len(value)


def _has_time(folder: int, name: bytes, mtime: int) -> bool:
    return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns == mtime


def _copy(piece: Piece, fd: int) -> None:
    """Copy a piece to its place in the open, empty file `fd`; holes in what holds it stay holes."""
    if piece.length < _SPARSE or piece.offset + piece.length > piece.source.size:  # the latter is refused when read
        _copy_range(piece.source, piece.offset, fd, piece.start, piece.length)
        return
    for at, length, allocated in piece.source.runs(piece.offset, piece.offset + piece.length):
        if allocated:
            _copy_range(piece.source, at, fd, piece.start + at - piece.offset, length)


def _copy_range(source: ByteSource, offset: int, fd: int, to: int, length: int) -> None:
    done = 0
    with source.descriptor() as lent:
        if lent is not None and length >= _STEP:
            with contextlib.suppress(OSError):
                while done < length:
                    count = os.copy_file_range(lent[0], fd, length - done, lent[1] + offset + done, to + done)
                    if not count:
                        break
                    done += count
    while done < length:
        data = source.read(offset + done, min(_STEP, length - done))
        view = memoryview(data)
        at = to + done
        while view:
            count = os.pwrite(fd, view, at)
            at, view = at + count, view[count:]
        done += len(data)
