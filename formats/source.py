"""Bytes at offsets: local files, byte strings and windows of other sources.

A `ByteSource` is what readers read from. It never returns fewer bytes than were asked for: beyond its end lies an
error that names the offset, not zeroes.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diskmorph.formats.errors import FormatError, IntegrityError, PolicyError, SourceError
from diskmorph.formats.limits import Limits
from diskmorph.formats.locking import locked_by_writer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Buffer = bytes | bytearray | memoryview

_ASKED = 64
"""Parts of a file that are asked for while its descriptor is borrowed."""


class ByteSource(ABC):
    """A sequence of `size` bytes that can be read at any offset, from several threads at once.

    `name` is what messages call it.
    """

    name: str
    size: int

    @abstractmethod
    def pread(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`; return the bytes read, fewer only at the end. Raises SourceError."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` from `offset`, or raise FormatError naming the offset where the source ends."""
        done = 0
        while done < len(buffer):
            count = self.pread(offset + done, buffer[done:])
            if count == 0:
                raise FormatError(
                    "the file is truncated",
                    file=self.name,
                    structure="file",
                    offset=offset + done,
                    expected=f"{len(buffer)} bytes from {offset}",
                    found=f"the end at {min(self.size, offset + done)}",
                )
            done += count

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`, or raise FormatError; check `length` against limits first."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                "the file is truncated or points beyond itself",
                file=self.name,
                structure="file",
                offset=max(offset, 0),
                expected=f"{length} bytes",
                found=f"the end at {self.size}",
            )
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_upto(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, or fewer (even none) where the source ends before; for probing."""
        offset = min(max(offset, 0), self.size)
        return self.read(offset, max(0, min(length, self.size - offset)))

    def view(self, offset: int, length: int) -> Buffer:
        """Return what `read_upto` does, without a copy where the bytes are in memory already."""
        return self.read_upto(offset, length)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, length, allocated) over start..stop, gapless; what is not allocated reads as zeroes."""
        if stop > start:
            yield start, stop - start, True

    def descriptor(self) -> AbstractContextManager[tuple[int, int] | None]:
        """Lend (file descriptor, offset of this source's byte 0 in it) for copy_file_range; None if not a file."""
        return nullcontext(None)

    @property
    def path(self) -> Path | None:
        """The local file that this is the whole of, if it is."""
        return None

    def verify_unchanged(self) -> None:  # noqa: B027 - immutable sources need nothing
        """Raise IntegrityError if the bytes may have changed since the source was opened."""

    @property
    def version(self) -> str | None:
        """Return what changes when the content does, as far as known without reading: time of change, ETag."""
        return None

    def origins(self) -> Mapping[tuple[int, int], str]:
        """Return which local files this is read from, and what was opened with it: names by (device, inode)."""
        return {}

    def window(self, offset: int, length: int, name: str | None = None) -> ByteSource:
        """Return the part of this source from `offset`, as a source that ends after `length` bytes."""
        return WindowSource(self, offset, length, name)

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Give back what the source holds; reading afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BytesSource(ByteSource):
    """A byte string."""

    def __init__(self, data: Buffer, name: str = "memory") -> None:
        self.name = name
        self._data = memoryview(data).cast("B")
        self.size = len(self._data)

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        piece = self._data[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


class HeldSource(ByteSource):
    """A source of which `data`, from `offset` on, has been read already."""

    def __init__(self, source: ByteSource, offset: int, data: memoryview) -> None:
        self.name, self.size = source.name, source.size
        self._source, self._offset, self._data = source, offset, data

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        held = self._within(offset, len(buffer))
        if held is None:
            return self._source.pread(offset, buffer)
        buffer[:] = held
        return len(buffer)

    def view(self, offset: int, length: int) -> Buffer:
        """See ByteSource."""
        held = self._within(offset, min(length, self.size - offset))
        return self._source.read_upto(offset, length) if held is None else held

    def origins(self) -> Mapping[tuple[int, int], str]:
        """See ByteSource."""
        return self._source.origins()

    def _within(self, offset: int, length: int) -> memoryview | None:
        at = offset - self._offset
        return self._data[at : at + length] if at >= 0 and 0 <= length <= len(self._data) - at else None


class WindowSource(ByteSource):
    """`length` bytes of another source from `offset`: a tar member, a LUKS payload, an extent of a flat file."""

    def __init__(self, source: ByteSource, offset: int, length: int, name: str | None = None) -> None:
        if offset < 0 or length < 0 or offset + length > source.size:
            raise FormatError(
                "a part lies beyond the end of the file that holds it",
                file=source.name,
                offset=offset,
                expected=f"{length} bytes",
                found=f"the end at {source.size}",
            )
        self.name = name or source.name
        self.size = length
        self._source = source
        self._offset = offset

    @property
    def version(self) -> str | None:
        """See ByteSource."""
        return self._source.version

    def origins(self) -> Mapping[tuple[int, int], str]:
        """See ByteSource."""
        return self._source.origins()

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        room = max(0, self.size - offset)
        return self._source.pread(self._offset + offset, buffer[:room]) if room else 0

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """See ByteSource."""
        for at, length, allocated in self._source.runs(self._offset + start, self._offset + stop):
            yield at - self._offset, length, allocated

    @contextmanager
    def _lend(self) -> Iterator[tuple[int, int] | None]:
        with self._source.descriptor() as lent:
            yield None if lent is None else (lent[0], lent[1] + self._offset)

    def descriptor(self) -> AbstractContextManager[tuple[int, int] | None]:
        """See ByteSource."""
        return self._lend()

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self._source.verify_unchanged()


class FilePool:
    """Bounds how many files are open at once: the least recently used idle one is closed to make room.

    `origins` are all files that ever were in it: names by (device, inode).
    """

    def __init__(self, limit: int = Limits().open_files) -> None:
        self.origins: dict[tuple[int, int], str] = {}
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[FileSource, tuple[int, int]] = OrderedDict()  # source -> (descriptor, users)
        self._dropped: dict[int, int] = {}  # descriptors that are lent, though their source is closed -> users

    @contextmanager
    def borrow(self, source: FileSource) -> Iterator[int]:
        """Lend the open descriptor of `source`, reopening the file when it had to be closed."""
        with self._lock:
            fd, users = self._open.pop(source, (-1, 0))
            if fd < 0:
                self._make_room()
                fd = source.open_again()
            self._open[source] = (fd, users + 1)
        try:
            yield fd
        finally:
            with self._lock:
                self._give_back(source, fd)

    def _give_back(self, source: FileSource, fd: int) -> None:
        if fd not in self._dropped:
            _, users = self._open[source]
            self._open[source] = (fd, users - 1)
            return
        self._dropped[fd] -= 1
        if not self._dropped[fd]:
            del self._dropped[fd]
            os.close(fd)

    def adopt(self, source: FileSource, fd: int) -> None:
        """Take over a descriptor that was just opened."""
        with self._lock:
            self._make_room()
            self._open[source] = (fd, 0)
            self.origins[source.identity[:2]] = source.name

    def drop(self, source: FileSource) -> None:
        """Close the source's descriptor, if it is open; while it is lent, that is left to the last user."""
        with self._lock:
            fd, users = self._open.pop(source, (-1, 0))
            if users:
                self._dropped[fd] = users
            elif fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        """Close what its users forgot to close."""
        for fd in (*(fd for fd, _ in self.__dict__.get("_open", {}).values()), *self.__dict__.get("_dropped", ())):
            os.close(fd)

    def _make_room(self) -> None:
        while len(self._open) >= self._limit:
            idle = next((source for source, (_, users) in self._open.items() if not users), None)
            if idle is None:
                return
            fd, _ = self._open.pop(idle)
            os.close(fd)


_SPECIAL = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
)


def refuse_special(mode: int, name: str, *, devices: bool) -> None:
    """Raise SourceError unless `mode` is that of a regular file, or of a block device where `devices` allows it."""
    if stat.S_ISREG(mode) or (devices and stat.S_ISBLK(mode)):
        return
    word = next((word for test, word in _SPECIAL if test(mode)), "a block device")
    raise SourceError(f"is {word}, not a disk image", file=name)


class FileSource(ByteSource):
    """A regular file, or a block device that the user named.

    Opened at once, perhaps closed by its pool and reopened later: then its device, inode, size and mtime must be the
    same. `devices` allows block devices; `shared` reads although a running QEMU writes to it.

    Raises SourceError (missing, special file, no permission) and PolicyError (locked).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        pool: FilePool | None = None,
        devices: bool = True,
        shared: bool = False,
        dir_fd: int | None = None,
        follow: bool = True,
    ) -> None:
        if not os.fspath(path):
            raise SourceError("the name of a file is empty")
        self._path = Path(path)
        self.name = str(path)
        self._pool = pool or FilePool(4)
        self._flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
        fd = self._open(dir_fd)
        try:
            status = os.fstat(fd)
            refuse_special(status.st_mode, self.name, devices=devices)
            if not shared and locked_by_writer(fd):
                raise PolicyError(
                    "is in use by a running process that may write to it",
                    option="-U",
                    file=self.name,
                    hint="stop it, or read all the same with -U",
                )
            self.size = os.lseek(fd, 0, os.SEEK_END)
        except BaseException:
            os.close(fd)
            raise
        self._block = stat.S_ISBLK(status.st_mode)
        self._identity = _identity(status)
        self._reopen = self._path if dir_fd is None else None
        self._seekable_holes = not self._block
        self._pool.adopt(self, fd)

    def _open(self, dir_fd: int | None = None) -> int:
        try:
            refuse_special(os.stat(self._path, dir_fd=dir_fd).st_mode, self.name, devices=True)
            return os.open(self._path, self._flags, dir_fd=dir_fd)
        except OSError as error:
            words = {errno.ENOENT: "no such file", errno.ELOOP: "is a symbolic link"}
            problem = words.get(error.errno or 0, f"cannot be opened: {os.strerror(error.errno or 0)}")
            raise SourceError(problem, file=self.name) from error
        except ValueError as error:  # a NUL, or half of a surrogate pair
            raise SourceError("cannot be opened: no file has such a name", file=self.name) from error

    def open_again(self) -> int:
        """Open the file anew for the pool; raise IntegrityError if another file stands in its place."""
        if self._reopen is None:
            raise SourceError("was closed", file=self.name)
        fd = self._open()
        if _identity(os.fstat(fd)) != self._identity:
            os.close(fd)
            raise IntegrityError("changed while it was read", file=self.name)
        return fd

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        try:
            with self._pool.borrow(self) as fd:
                return os.preadv(fd, [buffer], offset)
        except OSError as error:
            raise SourceError(
                f"cannot be read: {os.strerror(error.errno or 0)}", file=self.name, offset=offset
            ) from error

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """See ByteSource: what SEEK_DATA and SEEK_HOLE tell; all is data where the file system cannot tell."""
        at = start
        while at < stop and self._seekable_holes:
            with self._pool.borrow(self) as fd:
                parts = list(islice(_allocated(fd, at, stop), _ASKED))
            if not parts:
                break
            for begin, end in parts:
                if begin > at:
                    yield at, begin - at, False
                if end > begin:
                    yield begin, end - begin, True
                at = end
        if at < stop:
            yield at, stop - at, True

    @contextmanager
    def _lend(self) -> Iterator[tuple[int, int] | None]:
        with self._pool.borrow(self) as fd:
            yield fd, 0

    def descriptor(self) -> AbstractContextManager[tuple[int, int] | None]:
        """See ByteSource."""
        return self._lend()

    @property
    def path(self) -> Path | None:
        """See ByteSource."""
        return self._path

    @property
    def version(self) -> str | None:
        """See ByteSource; a device's time tells nothing."""
        return None if self._block else str(self._identity[3])

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """Device, inode, size in bytes and mtime in nanoseconds, as they were when the file was opened."""
        return self._identity

    def origins(self) -> Mapping[tuple[int, int], str]:
        """See ByteSource."""
        return self._pool.origins

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        if self._block:
            return
        with self._pool.borrow(self) as fd:
            now = _identity(os.fstat(fd))
        if now != self._identity:
            raise IntegrityError(
                "changed while it was read", file=self.name, hint="stop what writes to it and try again"
            )

    def close(self) -> None:
        """See ByteSource."""
        self._reopen = None
        self._pool.drop(self)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _allocated(fd: int, at: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of the allocated parts of at..stop, an empty one for a hole at the end.

    Ends before `stop` where the file system cannot tell.
    """
    while at < stop:
        found = _next_data(fd, at, stop)
        if found is None:
            return
        yield found
        at = found[1]


def _next_data(fd: int, at: int, stop: int) -> tuple[int, int] | None:
    """Return the next (begin, end) of allocated bytes within at..stop; None where the file system cannot tell."""
    try:
        begin = os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        return (stop, stop) if error.errno == errno.ENXIO else None  # ENXIO: only a hole follows
    if begin >= stop:
        return stop, stop
    try:
        end = os.lseek(fd, begin, os.SEEK_HOLE)
    except OSError:
        return None
    return begin, min(end, stop)


def as_source(what: str | os.PathLike[str] | Buffer | ByteSource, **options: Any) -> ByteSource:
    """Return `what` as a ByteSource: one as it is, bytes in memory, anything else a path."""
    if isinstance(what, ByteSource):
        return what
    if isinstance(what, bytes | bytearray | memoryview):
        return BytesSource(what)
    return FileSource(what, **options)
