"""Targets that appear whole or not at all: files, standard output. What is written in place: output_in_place.py.

A `Target` holds one `Member` for each file of the image. Members are written under no name (or a temporary one) and
take their names in `commit`; leaving the context without `commit` leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, Self

from diskmorph.formats.errors import IntegrityError, TargetError
from diskmorph.formats.locking import refuse_in_use
from diskmorph.formats.marks import attach
from diskmorph.formats.reserving import LEAST, gains

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.source import Buffer, ByteSource

_ZEROES = bytes(1 << 20)


def failed(error: OSError, name: str, doing: str = "written") -> TargetError:
    """Return what tells that a target's file `name` cannot be written, or whatever was being done."""
    hint = "make room, or choose another place" if error.errno in {errno.ENOSPC, errno.EDQUOT} else None
    return TargetError(f"cannot be {doing}: {os.strerror(error.errno or 0)}", file=name, hint=hint)


class Member(ABC):
    """One file of a target. `fresh`: what was never written reads as zeroes. `write` may be called from any thread."""

    name: str
    fresh: bool

    @abstractmethod
    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`. Raises TargetError."""

    def fileno(self) -> int | None:
        """Return a descriptor for copy_file_range, where there is one."""
        return None

    @property
    def ordered(self) -> bool:
        """Return whether bytes must come from front to back: so of whatever has no descriptor, unless it says else."""
        return self.fileno() is None

    def reread(self) -> ByteSource | None:
        """Return what was written as a source, where that is neither a file nor gone; the caller closes it."""
        return None

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""
        if self.fresh:
            return
        while length:
            count = min(length, len(_ZEROES))
            self.write(offset, _ZEROES[:count])
            offset, length = offset + count, length - count


class Keeper(Protocol):
    """What decides that unfinished files stay, for another try: see convert/resume.py."""

    suffix: str

    @property
    def fresh(self) -> bool:
        """Whether nothing in unfinished files is worth keeping."""

    def kept(self) -> bool:
        """Return whether unfinished files shall stay now."""

    def forget(self) -> None:
        """Take notice: an unfinished file is gone, and so is all that was done."""

    def published(self) -> None:
        """Take notice: all is on stable storage and has its name."""


class FileMember(Member):
    """A file that is being written under no name or a temporary one.

    With a `keeper` the temporary name is always the same, and what another try left there is gone on with.
    """

    fresh = True

    def __init__(self, directory: int, path: Path, keeper: Keeper | None = None) -> None:
        self.path = path
        self._keeper = keeper
        self.name = str(path)
        self._directory = directory
        self._temporary: str | None = None
        # A file system lets one writer at a time into a file. Those who wait in the kernel spin, which takes a
        # processor from those who could read meanwhile; those who wait for this sleep.
        self._turn = threading.Lock()
        self._fd = self._create() if keeper is None else self._resume(keeper)
        self._reserving = gains(self._fd)

    def _resume(self, keeper: Keeper) -> int:
        name = self._part(keeper)
        try:
            fd = self._open_part(name, keeper)
            try:
                self._require_own(fd, name)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise failed(error, str(self.path.with_name(name)), "opened") from error
        self._temporary = name
        return fd

    def _part(self, keeper: Keeper) -> str:
        return f".{self.path.name[:200]}.{keeper.suffix}.part"

    def _open_part(self, name: str, keeper: Keeper) -> int:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        if not keeper.fresh:
            try:
                return os.open(name, flags, dir_fd=self._directory)
            except FileNotFoundError:
                keeper.forget()
        return os.open(name, flags | os.O_CREAT, 0o666, dir_fd=self._directory)

    def _require_own(self, fd: int, name: str) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
            raise TargetError("is not an unfinished file of yours", file=str(self.path.with_name(name)))

    def _create(self) -> int:
        try:
            flags = os.O_RDWR | os.O_CLOEXEC
            with contextlib.suppress(OSError, AttributeError):
                return os.open(self.path.parent, flags | os.O_TMPFILE, 0o666)
            self._temporary = f".{self.path.name[:200]}.{os.urandom(4).hex()}.part"
            return os.open(self._temporary, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=self._directory)
        except OSError as error:
            raise failed(error, self.name, "created") from error

    def write(self, offset: int, data: Buffer) -> None:
        """See Member."""
        view = memoryview(data).cast("B")
        try:
            with self._turn:
                if self._reserving and len(view) >= LEAST:
                    self._make_room(offset, len(view))
                while view:
                    count = os.pwrite(self._fd, view, offset)
                    offset, view = offset + count, view[count:]
        except OSError as error:
            raise failed(error, self.name) from error

    def _make_room(self, offset: int, length: int) -> None:
        """Reserve a range that is written next. Where that fails, the write finds out why, or does without."""
        try:
            os.posix_fallocate(self._fd, offset, length)
        except OSError:
            self._reserving = False

    def fileno(self) -> int | None:
        """See Member."""
        return self._fd

    def resize(self, size: int) -> None:
        """Give the file its final size."""
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise failed(error, self.name) from error

    def reserve(self, offset: int, length: int) -> None:
        """Reserve room for a range on the file system."""
        try:
            os.posix_fallocate(self._fd, offset, length)
        except OSError as error:
            raise failed(error, self.name) from error

    def sync(self) -> None:
        """Wait until the file's bytes are on stable storage."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise failed(error, self.name, "synced") from error

    def keep_ownership_of(self, old: os.stat_result) -> None:
        """Take over the mode of the file that is replaced, and its owner as far as allowed. Raises TargetError."""
        try:
            os.fchmod(self._fd, stat.S_IMODE(old.st_mode))
        except OSError as error:  # the new file might be open to more users than the old one
            raise failed(error, self.name, "given the mode of the old file") from error
        with contextlib.suppress(OSError):
            os.fchown(self._fd, old.st_uid, old.st_gid)

    def publish(self, *, replace: bool) -> None:
        """Give the file its name, atomically; without `replace` fail if the name is taken."""
        try:
            attach(self._fd, self.path)
            if not replace:
                self._link(self.path.name)
                self.discard()
                return
            if self._temporary is None:
                name = f".{self.path.name[:200]}.{os.urandom(4).hex()}.part"
                self._link(name)
                self._temporary = name
            os.rename(self._temporary, self.path.name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._temporary = None
        except FileExistsError as error:
            raise TargetError("exists already", file=self.name, hint="replace it with --force") from error
        except OSError as error:
            raise failed(error, self.name, "named") from error

    def retract(self) -> None:
        """Take the name away again, if the file has it; a keeper's file is unfinished once more."""
        with contextlib.suppress(OSError):
            if self._keeper is None:
                os.unlink(self.path.name, dir_fd=self._directory)
                return
            part = self._part(self._keeper)
            os.rename(self.path.name, part, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._temporary = part

    def _link(self, name: str) -> None:
        source = f"/proc/self/fd/{self._fd}" if self._temporary is None else self._temporary
        os.link(source, name, src_dir_fd=self._directory, dst_dir_fd=self._directory, follow_symlinks=True)

    def discard(self) -> None:
        """Remove the temporary name, if there is one."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._directory)
            self._temporary = None

    def close(self) -> None:
        """Close the file; without `publish` nothing of it remains, unless its keeper wants it."""
        if self._keeper is None or not self._keeper.kept():
            self.discard()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Target(ABC):
    """What a conversion writes to: a context manager; `commit` makes it real.

    `members` stand in the order of `Allocator.members`.
    """

    members: Sequence[Member]

    @abstractmethod
    def commit(self, sizes: Sequence[int]) -> None:
        """Give every member its size and make the target appear. Raises TargetError."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind that was not committed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileTarget(Target):
    """Files in one directory, named by `names`, the first being the one that describes the others.

    Members are synced and named last to first. With `force` existing files are replaced, their mode and owner kept; of
    several members the old ones are moved away before, the first first, and restored on failure, so that an old
    descriptor never meets new members.
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        *,
        force: bool = False,
        sync: bool = True,
        keeper: Keeper | None = None,
    ) -> None:
        self._force, self._sync, self._keeper = force, sync, keeper
        self._opened: list[FileMember] = []
        try:
            self._directory = os.open(directory or Path(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise TargetError(
                f"the target's folder cannot be opened: {os.strerror(error.errno or 0)}", file=str(directory)
            ) from error
        try:
            for name in names:
                self._refuse_existing(directory / name)
            for name in names:
                self._opened.append(FileMember(self._directory, directory / name, keeper))
            for member in self._opened if keeper is not None and keeper.fresh else ():
                member.resize(0)
        except BaseException:
            self.close()
            raise
        self.members = self._opened

    def _refuse_existing(self, path: Path) -> None:
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise failed(error, str(path), "created") from error
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            hint = "a block device is written with --device" if stat.S_ISBLK(status.st_mode) else None
            raise TargetError("exists and is not a regular file", file=str(path), hint=hint)
        if not self._force:
            raise TargetError("exists already", file=str(path), hint="replace it with --force")
        if stat.S_ISREG(status.st_mode):
            refuse_in_use(path)

    def commit(self, sizes: Sequence[int]) -> None:
        """See Target."""
        for member, size in zip(self._opened, sizes, strict=True):
            member.resize(size)
        for member in reversed(self._opened):
            old = _status(member.path)
            if old is not None and stat.S_ISREG(old.st_mode):
                member.keep_ownership_of(old)
            if self._sync:
                member.sync()
        aside = self._move_aside() if self._force and len(self._opened) > 1 else []
        named: list[FileMember] = []
        try:
            for member in reversed(self._opened):
                member.publish(replace=self._force)
                named.append(member)
        except BaseException:
            self._take_back(named, aside)
            raise
        for _, moved in aside:
            with contextlib.suppress(OSError):
                os.unlink(moved, dir_fd=self._directory)
        try:
            self._sync_directory()
        finally:
            if self._keeper is not None:
                self._keeper.published()

    def _move_aside(self) -> list[tuple[str, str]]:
        """Rename the old files, the describing one first; return (name, temporary name) of each."""
        moved: list[tuple[str, str]] = []
        for member in self._opened:
            name = member.path.name
            old = f".{name[:200]}.{os.urandom(4).hex()}.old"
            try:
                os.rename(name, old, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._take_back([], moved)
                raise failed(error, member.name, "replaced") from error
            moved.append((name, old))
        return moved

    def _take_back(self, named: Sequence[FileMember], aside: Sequence[tuple[str, str]]) -> None:
        """Remove members that have their names already and restore the old files, the describing one last."""
        for member in named:  # they replaced nothing: the old files, if any, were moved away before
            member.retract()
        for name, old in reversed(aside):
            with contextlib.suppress(OSError):
                os.rename(old, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def _sync_directory(self) -> None:
        if not self._sync:
            return
        try:
            os.fsync(self._directory)
        except OSError as error:
            raise failed(error, self._opened[0].name, "synced, though it is complete") from error

    def close(self) -> None:
        """See Target."""
        for member in self._opened:
            member.close()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


class StreamMember(Member):
    """A pipe or any other binary stream: written in order, gaps filled with zeroes."""

    fresh = True

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.name = name
        self._stream = stream
        self.at = 0

    def write(self, offset: int, data: Buffer) -> None:
        """See Member; `offset` may not lie before what was written."""
        if offset < self.at:
            raise IntegrityError(
                "a stream cannot be written backwards", file=self.name, offset=offset, expected=self.at
            )
        self.advance(offset)
        self._put(data)

    def advance(self, offset: int) -> None:
        """Write zeroes up to `offset`."""
        while self.at < offset:
            self._put(_ZEROES[: offset - self.at])

    def flush(self) -> None:
        """Give on what the stream holds back. Raises TargetError."""
        while True:
            try:
                self._stream.flush()
            except BlockingIOError:
                self._await_room()
            except OSError as error:
                raise failed(error, self.name) from error
            else:
                return

    def _put(self, data: Buffer) -> None:
        """Write all of `data`: a raw stream takes what it likes, one that does not block perhaps nothing now."""
        view = memoryview(data).cast("B")
        while view:
            count = self._some(view)
            self.at, view = self.at + count, view[count:]

    def _some(self, view: memoryview) -> int:
        try:
            count: int | None = self._stream.write(view)  # None: a raw stream that does not block
        except BlockingIOError as error:  # of a buffered stream
            count = error.characters_written or None
        except OSError as error:
            raise failed(error, self.name) from error
        if count == 0:
            raise TargetError("takes no more bytes", file=self.name)
        if count is None:
            self._await_room()
        return count or 0

    def _await_room(self) -> None:
        """Sleep until a stream that does not block takes more."""
        room = select.poll()
        try:
            room.register(self._stream.fileno(), select.POLLOUT)
            room.poll()
        except OSError as error:  # io.UnsupportedOperation is one: no descriptor to wait for
            raise TargetError("takes no more bytes now", file=self.name) from error


class StreamTarget(Target):
    """Standard output, or any binary stream."""

    def __init__(self, stream: BinaryIO, name: str = "standard output") -> None:
        self._member = StreamMember(stream, name)
        self.members = (self._member,)

    def commit(self, sizes: Sequence[int]) -> None:
        """See Target."""
        self._member.advance(sizes[0])
        self._member.flush()

    def close(self) -> None:
        """See Target; the stream stays open."""
