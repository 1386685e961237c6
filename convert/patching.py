"""Changing an image in place: patches behind a journal that can undo them, while no other process writes to it.

The journal NAME.diskmorph-journal lies beside the image: JSON lines. Each change begins with {"repair", "file", "size",
"format"}; the {"offset", "old", "why"} after it hold, in hexadecimal digits, the bytes that the change replaces from
`offset` on. To undo the last change: write every `old` back, last line first, up to the line that begins it, and cut
the file to its `size`. The journal is on stable storage before the image is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import PolicyError, TargetError
from diskmorph.formats.locking import lock_for_writing
from diskmorph.formats.syncing import sync_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diskmorph.formats.check import Patch
    from diskmorph.formats.probe import Format
    from diskmorph.formats.source import ByteSource, FileSource

JOURNAL = ".diskmorph-journal"


def patch_in_place(source: FileSource, entry: Format, patches: Sequence[Patch], repair: str) -> Path:
    """Write patches to an image behind a journal, which is returned; `repair` says in it what for.

    Raises PolicyError where a process uses the image, or it is a device, beside which no journal can stay; TargetError
    where it cannot be written.
    """
    path = source.path
    assert path is not None  # noqa: S101 - for the type checker
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
        journal = _write_journal(path, source, entry, patches, repair)
        _apply(fd, path, patches)
    finally:
        os.close(fd)
    return journal


def _apply(fd: int, path: Path, patches: Sequence[Patch]) -> None:
    try:
        for patch in patches:
            if patch.sync:
                os.fsync(fd)
            view, at = memoryview(patch.data), patch.offset
            while view:
                count = os.pwrite(fd, view, at)
                view, at = view[count:], at + count
        os.fsync(fd)
    except OSError as error:
        raise TargetError(
            f"the change could not be written: {os.strerror(error.errno or 0)}",
            file=str(path),
            hint=f"{path.name}{JOURNAL} holds what was there before",
        ) from error


def _write_journal(path: Path, source: ByteSource, entry: Format, patches: Sequence[Patch], repair: str) -> Path:
    journal = path.with_name(path.name + JOURNAL)
    lines: list[dict[str, Any]] = [{"repair": repair, "file": path.name, "size": source.size, "format": entry.name}]
    lines += [
        {"offset": patch.offset, "old": source.read_upto(patch.offset, len(patch.data)).hex(), "why": patch.why}
        for patch in patches
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    try:
        _append(journal, text)
        sync_folder(path.parent)
    except OSError as error:
        raise TargetError(
            f"the journal cannot be written: {os.strerror(error.errno or 0)}",
            file=str(journal),
            hint="write a copy with -o FILE",
        ) from error
    return journal


def _append(journal: Path, text: bytes) -> None:
    """Add whole lines to the journal, durably, or none."""
    fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
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
    finally:
        os.close(fd)
