"""Ranges of a raw file on a path that all workers share.

The file is made in full size under a hidden name. A range holds a shared lock on it while it writes and stops where
the hidden name is gone; naming takes the lock alone. So a straggler that the cluster gave up for dead never writes into
a file that has its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING

from diskmorph.formats import marks
from diskmorph.formats.errors import IntegrityError, TargetError
from diskmorph.formats.output import Member, Target
from diskmorph.formats.syncing import sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diskmorph.formats.source import Buffer

_WAIT = 60.0
"""Seconds that naming waits for stragglers."""


def begin(target: Path, token: str, size: int, *, reserve: bool) -> str:
    """Make the hidden file of a target, `size` bytes of zeroes, and return its name. Raises TargetError."""
    part = target.with_name(f".{target.name[:180]}.{token}.part")
    with _opened(part, create=True) as fd:
        os.ftruncate(fd, size)
        if reserve:
            os.posix_fallocate(fd, 0, size)
    return str(part)


def _no_room(error: OSError) -> str | None:
    return "make room, or choose another place" if error.errno in {errno.ENOSPC, errno.EDQUOT} else None


@contextlib.contextmanager
def _opened(part: Path, *, create: bool = False) -> Iterator[int]:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        fd = os.open(part, flags, 0o666)
    except OSError as error:
        raise TargetError(f"cannot be opened: {os.strerror(error.errno or 0)}", file=str(part)) from error
    try:
        yield fd
    except OSError as error:
        raise TargetError(f"cannot be written: {error.strerror}", file=str(part), hint=_no_room(error)) from error
    finally:
        os.close(fd)


class RangeMember(Member):
    """`size` bytes from `start` of a file that is larger; what was never written reads as zeroes."""

    fresh = True
    ordered = False  # whatever comes first may be written first

    def __init__(self, fd: int, name: str, start: int, size: int) -> None:
        self.name = name
        self._fd, self._start, self._size = fd, start, size

    def write(self, offset: int, data: Buffer) -> None:
        """See Member. Raises IntegrityError for bytes beyond the range."""
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self._size:
            raise IntegrityError("a range was written beyond its end", file=self.name, offset=self._start + offset)
        at = self._start + offset
        try:
            while view:
                count = os.pwrite(self._fd, view, at)
                at, view = at + count, view[count:]
        except OSError as error:
            raise TargetError(
                f"cannot be written: {error.strerror}", file=self.name, offset=at, hint=_no_room(error)
            ) from error


class RangeTarget(Target):
    """One range of a file, written in place; whether it ever shows is decided elsewhere."""

    def __init__(self, fd: int, name: str, start: int, size: int) -> None:
        self.members = (RangeMember(fd, name, start, size),)

    def commit(self, sizes: Sequence[int]) -> None:
        """See Target."""

    def close(self) -> None:
        """See Target."""


@contextlib.contextmanager
def opened_range(part: Path, start: int, stop: int) -> Iterator[RangeTarget]:
    """Lend a range of the hidden file. Raises TargetError where it is gone, for then the row has ended."""
    with _opened(part) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if not _is_named(fd, part):
            raise TargetError("the row has ended already", file=str(part))
        with RangeTarget(fd, str(part), start, stop - start) as target:
            yield target


def _is_named(fd: int, part: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), part.lstat())
    except FileNotFoundError:
        return False


def finish(part: Path, target: Path, *, force: bool, sync: bool) -> None:
    """Give the hidden file its name, and the mark of the job that writes. Raises TargetError."""
    with _opened(part) as fd:
        _lock_alone(fd, str(part))
        if sync:
            os.fsync(fd)
        _name(fd, part, target, replace_old=force)


def _lock_alone(fd: int, name: str) -> None:
    end = time.monotonic() + _WAIT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise TargetError("another worker still writes to it", file=name) from error
            time.sleep(0.05)
        else:
            return


def _name(fd: int, part: Path, target: Path, *, replace_old: bool) -> None:
    """Name the file by which it was hidden; nothing that writes to it is left, for the lock is held alone."""
    marks.attach(fd, target)
    try:
        if replace_old:
            part.rename(target)
        else:
            os.link(part, target)
            part.unlink()
    except FileExistsError as error:
        raise TargetError("exists already", file=str(target), hint="replace it with --force") from error
    sync_folder(target.parent)
