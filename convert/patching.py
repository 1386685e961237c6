"""Changing an image in place: patches behind a journal that can undo them, while no other process writes to it."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.convert import journal as journals
from diskmorph.convert.journal import BROKEN_OFF, UNDO, Place
from diskmorph.convert.mended import MendedSource
from diskmorph.formats.check import Patch
from diskmorph.formats.errors import IntegrityError, PolicyError, TargetError
from diskmorph.formats.locking import lock_for_writing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskmorph.convert.journal import Change
    from diskmorph.formats.probe import Format
    from diskmorph.formats.source import ByteSource, FileSource


def patch_in_place(source: FileSource, entry: Format, patches: Sequence[Patch], repair: str) -> Path:
    """Write patches to an image behind a journal, which is returned; `repair` says in it what for.

    Where a patch cannot be written, those before it are undone. Raises PolicyError where a process uses the image, an
    earlier change was broken off, or it is a device, beside which no journal can stay; TargetError where it cannot be
    written.
    """
    with _opened(source) as (fd, path):
        _change(fd, path, source, entry, patches, repair)
        journals.finish(journals.journal_of(path))
    return journals.journal_of(path)


def change_in_place(source: FileSource, entry: Format, patches: Sequence[Patch], what: str) -> None:
    """Do what `patch_in_place` does, but forget the change when it is on stable storage; earlier ones stay."""
    with _opened(source) as (fd, path):
        length = _change(fd, path, source, entry, patches, what)
        journals.drop(journals.journal_of(path), length)


def undo_in_place(source: FileSource) -> int:
    """Put back what the last change in an image's journal replaced; return how many places that were.

    Raises FormatError where there is nothing to undo, or the journal is damaged, IntegrityError where the image was
    changed since, and what `patch_in_place` raises.
    """
    with _opened(source) as (fd, path):
        change = journals.last_change(path)
        _require_as_left(source, path, change)
        journals.unfinish(path)  # this may break off as well
        try:
            _put_back(fd, [(place.offset, place.old) for place in change.places], change.size)
        except OSError as error:
            raise _unwritable(path, error, UNDO) from error
        journals.drop(journals.journal_of(path), change.at)
        return len(change.places)


def require_finished(image: Path) -> None:
    """Raise PolicyError where a change of an image was broken off: it is undone first."""
    if journals.is_unfinished(image):
        raise PolicyError(BROKEN_OFF, file=str(image), hint=UNDO)


def _require_as_left(source: FileSource, path: Path, change: Change) -> None:
    """Raise IntegrityError where the image was changed since: undoing would mix what is there with what was."""
    if journals.is_unfinished(path):
        kept = source.size <= max(change.size, change.after) and all(_is_either(source, one) for one in _apart(change))
    else:
        after = MendedSource(source, [Patch(one.offset, one.new, "") for one in change.places])
        kept = source.size == change.after and all(
            source.read_upto(one.offset, len(one.new)) == after.read_upto(one.offset, len(one.new))
            for one in change.places
        )
    if not kept:
        raise IntegrityError(
            "was changed since, so that the change is not undone",
            file=str(path),
            hint=f"remove {path.name}{journals.JOURNAL} if the image was replaced",
        )


def _apart(change: Change) -> Iterator[Place]:
    """Yield the places that no other one touches."""
    rows = sorted(change.places, key=lambda place: place.offset)
    stop = 0
    for index, place in enumerate(rows):
        following = rows[index + 1].offset if index + 1 < len(rows) else None
        end = place.offset + len(place.new)
        if stop <= place.offset and (following is None or end <= following):
            yield place
        stop = max(stop, end)


def _is_either(source: ByteSource, place: Place) -> bool:
    """Whether every byte of a place is the old one or the new one: it may be half written."""
    now = np.frombuffer(source.read_upto(place.offset, len(place.new)), np.uint8)
    old = np.frombuffer(place.old.ljust(len(place.new), b"\0"), np.uint8)[: len(now)]
    return bool(((now == old) | (now == np.frombuffer(place.new, np.uint8)[: len(now)])).all())


@contextlib.contextmanager
def _opened(source: FileSource) -> Iterator[tuple[int, Path]]:
    """Open the source's file for writing, locked; its name is that of the file itself."""
    assert source.path is not None  # noqa: S101 - for the type checker
    path = Path(os.path.realpath(source.path))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TargetError(f"cannot be written: {os.strerror(error.errno or 0)}", file=str(path)) from error
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != source.identity[:2]:
            raise PolicyError("is another file now", file=str(path))
        if not stat.S_ISREG(status.st_mode):
            raise PolicyError("is a device, which is not changed in place", file=str(path), hint="write a copy with -o")
        lock_for_writing(fd, str(path))
        source.verify_unchanged()
        yield fd, path
    finally:
        os.close(fd)


def _change(fd: int, path: Path, source: FileSource, entry: Format, patches: Sequence[Patch], what: str) -> int:
    """Journal and write patches; return the journal's length before."""
    require_finished(path)
    places = [Place(one.offset, source.read_upto(one.offset, len(one.data)), one.data) for one in patches]
    after = max(source.size, *(one.offset + len(one.new) for one in places))
    head = {"repair": what, "file": path.name, "format": entry.name, "size": source.size, "after": after}
    rows = [
        {"offset": one.offset, "old": one.old.hex(), "new": bytes(one.new).hex(), "why": patch.why}
        for one, patch in zip(places, patches, strict=True)
    ]
    journal = journals.journal_of(path)
    length = journals.begin(journal, [head, *rows])
    try:
        _apply(fd, patches)
    except BaseException as error:
        _give_up(fd, path, [(one.offset, one.old) for one in places], source.size, error)
        journals.drop(journal, length)
        if isinstance(error, OSError):
            raise _unwritable(path, error, "it is as it was") from error
        raise
    return length


def _apply(fd: int, patches: Sequence[Patch]) -> None:
    for patch in patches:
        if patch.sync:
            os.fsync(fd)
        _write(fd, patch.offset, patch.data)
    os.fsync(fd)


def _give_up(fd: int, path: Path, old: Sequence[tuple[int, bytes]], size: int, error: BaseException) -> None:
    """Undo what was written before a patch failed; raise TargetError where that fails too: the journal stays."""
    try:
        _put_back(fd, old, size)
    except OSError:
        why = error if isinstance(error, OSError) else OSError(0, "interrupted")
        raise _unwritable(path, why, UNDO) from error


def _put_back(fd: int, old: Sequence[tuple[int, bytes]], size: int) -> None:
    for offset, data in reversed(old):
        _write(fd, offset, data)
    os.ftruncate(fd, size)
    os.fsync(fd)


def _write(fd: int, offset: int, data: bytes) -> None:
    view, at = memoryview(data), offset
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count


def _unwritable(path: Path, error: OSError, hint: str) -> TargetError:
    return TargetError(
        f"the change could not be written: {error.strerror or os.strerror(error.errno or 0)}", file=str(path), hint=hint
    )
