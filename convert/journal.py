"""The journal of changes in place, NAME.diskmorph-journal beside the image: what was there before, to be put back.

It is JSON lines. A change begins with {"repair", "file", "format", "size", "after"}, the file's sizes before and after.
Each {"offset", "old", "new", "why"} behind holds, in hexadecimal digits, what is written at `offset`, and what was.
The line {"unfinished": true} ends it until all is on stable storage. To undo a change every `old` is written back, last
line first, and the file cut to its `size`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from diskmorph.formats.errors import FormatError, TargetError
from diskmorph.formats.syncing import sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

JOURNAL = ".diskmorph-journal"
BROKEN_OFF = "a change of it was broken off, and it may hold half of it"
UNDO = "`diskmorph check --repair undo` puts back what was there"
_UNFINISHED = b'{"unfinished": true}\n'


class Place(NamedTuple):
    """What is written at `offset`, and what was there; less where the file ended."""

    offset: int
    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class Change:
    """A change as the journal has it: where it begins there; the file's sizes before and after it; what it replaced."""

    at: int
    size: int
    after: int
    places: tuple[Place, ...]


def journal_of(image: Path) -> Path:
    """Return where an image's journal is, beside the file itself where `image` is a link to it."""
    real = Path(os.path.realpath(image))
    return real.with_name(real.name + JOURNAL)


def is_unfinished(image: Path) -> bool:
    """Return whether a change of the image was broken off, so that it may hold half of it."""
    try:
        fd = _open(journal_of(image), os.O_RDONLY)
    except OSError:
        return False
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, len(_UNFINISHED), max(size - len(_UNFINISHED), 0)) == _UNFINISHED
    finally:
        os.close(fd)


def begin(journal: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Append what a change will replace, durably, or nothing; return the length before. Raises TargetError."""
    import json  # noqa: PLC0415 - every conversion asks whether there is a journal, few have one

    return _append(journal, b"".join(json.dumps(line).encode() + b"\n" for line in lines) + _UNFINISHED)


def unfinish(image: Path) -> None:
    """Say of a journal's last change that the image may hold half of it. Raises TargetError."""
    if not is_unfinished(image):
        _append(journal_of(image), _UNFINISHED)


def finish(journal: Path) -> None:
    """Say that the change is on stable storage. Raises TargetError."""
    drop(journal, journal.stat().st_size - len(_UNFINISHED))


def drop(journal: Path, length: int) -> None:
    """Forget all behind `length`: the change was undone, or need not be. Raises TargetError."""
    try:
        if not length:
            journal.unlink(missing_ok=True)
            return
        fd = _open(journal, os.O_WRONLY)
        try:
            os.ftruncate(fd, length)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _unwritable(journal, error) from error


def last_change(image: Path) -> Change:
    """Return the change that ends the journal. Raises FormatError where there is none, or it is damaged."""
    journal = journal_of(image)
    try:
        fd = _open(journal, os.O_RDONLY)
    except OSError as error:
        raise FormatError("has no journal: nothing was changed that could be undone", file=str(image)) from error
    with os.fdopen(fd, "rb") as file:
        start, head = None, {}
        for at, line in _lines(file, journal):
            if "repair" in line:
                start, head = at, line
        if start is None:
            raise FormatError("the journal holds no change", file=str(journal))
        file.seek(start)
        places = tuple(_place(line, journal) for _, line in _lines(file, journal) if "offset" in line)
    size, after = head.get("size"), head.get("after")
    if not _is_size(size) or not _is_size(after):
        raise _damaged(journal)
    return Change(start, size, after, places)


def _lines(file: Any, journal: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset, object) of every line; a last one without its end was being written and says nothing."""
    import json  # noqa: PLC0415 - see begin

    at = file.tell()
    for raw in file:
        if not raw.endswith(b"\n"):
            return
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _damaged(journal) from error
        if not isinstance(line, dict):
            raise _damaged(journal)
        yield at, line
        at += len(raw)


def _place(line: dict[str, Any], journal: Path) -> Place:
    offset, old, new = line.get("offset"), line.get("old"), line.get("new")
    if not _is_size(offset) or not isinstance(old, str) or not isinstance(new, str) or len(old) > len(new):
        raise _damaged(journal)
    try:
        return Place(offset, bytes.fromhex(old), bytes.fromhex(new))
    except ValueError as error:
        raise _damaged(journal) from error


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63


def _damaged(journal: Path) -> FormatError:
    return FormatError("the journal is damaged", file=str(journal))


def _open(journal: Path, how: int) -> int:
    """Open the journal, never through a link, and never what is no file. Raises OSError."""
    fd = os.open(journal, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(22, "it is no file")


def _append(journal: Path, text: bytes) -> int:
    """Add whole lines, durably, or none; return the length before."""
    try:
        fd = _open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(fd).st_size
            _write(fd, text, size, journal)
        finally:
            os.close(fd)
        sync_folder(journal.parent)
    except OSError as error:
        raise _unwritable(journal, error) from error
    return size


def _write(fd: int, text: bytes, size: int, journal: Path) -> None:
    try:
        view = memoryview(text)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)
        if not size:
            journal.unlink(missing_ok=True)
        raise


def _unwritable(journal: Path, error: OSError) -> TargetError:
    return TargetError(
        f"the journal cannot be written: {error.strerror or os.strerror(error.errno or 0)}",
        file=str(journal),
        hint="write a copy with -o FILE",
    )
