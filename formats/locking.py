"""QEMU's locks on image files: ranges of one byte each, locked by open file descriptions (block/file-posix.c).

A process locks byte 100 + N for what it does, 200 + N for what it lets nobody else do: N is 1 for writing, 3 for
resizing. All are shared locks; whoever comes asks whether an exclusive one could be had.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

from diskmorph.formats.errors import PolicyError

if TYPE_CHECKING:
    from pathlib import Path

_FLOCK = "hhqqi4x"  # struct flock of Linux, 64-bit: l_type, l_whence, l_start, l_len, l_pid
_READS, _WRITES, _RESIZES = 0, 1, 3
_DOES, _FORBIDS = 100, 200
_OTHERS = (_DOES + _WRITES, _DOES + _RESIZES, _FORBIDS + _READS, _FORBIDS + _WRITES, _FORBIDS + _RESIZES)
"""What of another process stands against a change of the file."""
_GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
_SETLK = getattr(fcntl, "F_OFD_SETLK", 37)


def locked_by_writer(fd: int) -> bool:
    """Return whether another process writes to the file, resizes it, or lets nobody read it."""
    return any(_held_by_another(fd, byte) for byte in (_DOES + _WRITES, _DOES + _RESIZES, _FORBIDS + _READS))


def lock_for_writing(fd: int, name: str) -> None:
    """Lock a file that is changed in place, until `fd` is closed: nobody writes to it, or keeps others from it.

    Raises PolicyError where another process does. A file system without such locks has none to hold.
    """
    bytes_held = (_DOES + _READS, _DOES + _WRITES, _DOES + _RESIZES, _FORBIDS + _WRITES, _FORBIDS + _RESIZES)
    try:
        for byte in bytes_held:
            fcntl.fcntl(fd, _SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            raise _in_use(name) from error
        return
    if any(_held_by_another(fd, byte) for byte in _OTHERS):
        raise _in_use(name)


def refuse_in_use(path: Path) -> None:
    """Raise PolicyError if a process uses a file that is about to be replaced: it would go on with the old one."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return  # a link to nowhere, or a file that is not ours to read
    try:
        if any(_held_by_another(fd, byte) for byte in _OTHERS):
            raise _in_use(str(path))
    finally:
        os.close(fd)


def _held_by_another(fd: int, byte: int) -> bool:
    ask = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    with contextlib.suppress(OSError):
        return bool(struct.unpack(_FLOCK, fcntl.fcntl(fd, _GETLK, ask))[0] != fcntl.F_UNLCK)
    return False


def _in_use(name: str) -> PolicyError:
    return PolicyError("is in use by a running process, so it is not changed", file=name, hint="stop it first")
