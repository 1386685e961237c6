"""A mark that a target carries from the moment it appears: which job wrote it, so that another try can tell.

The mark is an extended attribute, set before the file gets its name. Where a file system keeps none, a file beside the
target holds it, with the inode, size and time of change of the target: it is there first, and means no other file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ATTRIBUTE = "user.diskmorph.job"
_MOST = 3072
"""Bytes of a mark: ext4 keeps all attributes of a file in one block."""
_NOT_KEPT = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENOSPC, errno.E2BIG})

_current: ContextVar[str | None] = ContextVar("mark", default=None)


@contextlib.contextmanager
def marked(mark: str) -> Iterator[None]:
    """Let every target that appears within this context carry `mark`."""
    token = _current.set(mark)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> str | None:
    """Return the context's mark, for targets that are no files."""
    return _current.get()


def attach(fd: int, path: Path) -> None:
    """Give the context's mark, if there is one, to an open file or directory that is about to be named `path`."""
    mark = _current.get()
    if mark is not None:
        _set(fd, path, mark)


def change(path: Path, mark: str) -> None:
    """Give a target that has its name another mark; nothing is done where it is gone."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _set(fd, path, mark)
        finally:
            os.close(fd)


def mark_of(path: Path) -> str | None:
    """Return the mark that a file or directory carries, None if it has none or is not there."""
    try:
        return os.getxattr(path, ATTRIBUTE, follow_symlinks=False).decode("utf-8", "replace")
    except OSError:
        pass
    try:
        kept = json.loads(_beside(path).read_text())
        same = kept["file"] == _identity(path.lstat())
        return str(kept["mark"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _set(fd: int, path: Path, mark: str) -> None:
    data = mark.encode()
    if len(data) > _MOST:
        raise ValueError("a mark is too long")
    try:
        os.setxattr(fd, ATTRIBUTE, data)
    except OSError as error:
        if error.errno not in _NOT_KEPT:
            raise
        _set_beside(os.fstat(fd), path, mark)


def _set_beside(status: os.stat_result, path: Path, mark: str) -> None:
    beside = _beside(path)
    building = beside.with_name(f"{beside.name}.{os.urandom(4).hex()}")
    building.write_text(json.dumps({"file": _identity(status), "mark": mark}))
    building.rename(beside)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.mark")


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_ino, status.st_size, status.st_mtime_ns]
