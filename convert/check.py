"""`check`: a format's own check, and repairs: into a copy, or in place behind a journal that can undo them.

The journal NAME.diskmorph-journal lies beside the image: JSON lines. A repair begins with {"repair", "file", "size",
"format"}; each following {"offset", "old", "why"} holds, in hexadecimal digits, the bytes that the repair replaces from
`offset` on. To undo: write every `old` back, last line first, and cut the file to `size`. The journal is on stable
storage before the image is touched.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diskmorph.convert.options import CheckResult
from diskmorph.formats.check import CheckReport, Patch
from diskmorph.formats.errors import OptionError, PolicyError, TargetError
from diskmorph.formats.limits import Limits
from diskmorph.formats.output import FileMember, FileTarget
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import OpenContext, identify, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.probe import Format
    from diskmorph.formats.source import ByteSource, FileSource

JOURNAL = ".diskmorph-journal"
_BLOCK = 1 << 20


def check(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    repair: str | None = None,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    sync: bool = True,
    parents: Parents | None = None,
    limits: Limits | None = None,
) -> CheckResult:
    """Check an image's structure; with `repair` ("leaks" or "all") mend it, in place or as the copy `output`.

    In place the old bytes are journalled first (`CheckResult.journal`). The result tells what is left after the repair.
    Raises FormatError where the image cannot be read at all, TargetError where it cannot be written.
    """
    if repair not in {None, "leaks", "all"}:
        raise OptionError(f"repair {repair!r} is not known", hint="leaks or all")
    if output is not None and repair is None:
        raise OptionError("-o needs --repair", hint="say --repair leaks or --repair all")
    limits = limits or Limits()
    opener = Opener(parents or Parents(), limits)
    context = OpenContext(opener, limits)
    with opener.user_file(path) as source:
        entry, _ = identify(source, format)
        report = load(entry).check_image(source, context, repair)
        if repair is None or (not report.patches and output is None):
            return _result(str(path), report)
        if output is not None:
            _repair_copy(source, Path(output), report.patches, force=force, sync=sync)
        else:
            journal = patch_in_place(source, entry, report.patches, repair)
    where = Path(path) if output is None else Path(output)
    left = _again(where, entry, parents, limits)
    return _result(str(where), left, repaired=len(report.patches), journal=str(journal) if output is None else None)


def _again(path: Path, entry: Format, parents: Parents | None, limits: Limits) -> CheckReport:
    opener = Opener(parents or Parents(), limits)
    with opener.user_file(path) as source:
        return load(entry).check_image(source, OpenContext(opener, limits))


def _result(file: str, report: CheckReport, repaired: int = 0, journal: str | None = None) -> CheckResult:
    findings: list[dict[str, Any]] = [asdict(finding) for finding in report.findings]
    return CheckResult(
        file=file,
        format=report.format,
        clean=report.clean,
        corruptions=report.corruptions,
        leaks=report.leaks,
        repaired=repaired,
        findings=tuple(findings),
        journal=journal,
    )


def _repair_copy(source: FileSource, output: Path, patches: Sequence[Patch], *, force: bool, sync: bool) -> None:
    """Write a copy of the image with the patches applied."""
    _refuse_same(source, output)
    with FileTarget(output.parent, [output.name], force=force, sync=sync) as target:
        member = target.members[0]
        assert isinstance(member, FileMember)  # noqa: S101 - for the type checker
        for start, length, allocated in source.runs(0, source.size):
            for at in range(start, start + length if allocated else start, _BLOCK):
                member.write(at, source.read(at, min(_BLOCK, start + length - at)))
        for patch in patches:
            member.write(patch.offset, patch.data)
        source.verify_unchanged()
        target.commit([max([source.size, *(patch.offset + len(patch.data) for patch in patches)])])


def _refuse_same(source: FileSource, output: Path) -> None:
    try:
        status = output.lstat()
    except OSError:
        return
    if (status.st_dev, status.st_ino) == source.identity[:2]:
        raise TargetError("is the image that is repaired", file=str(output), hint="leave out -o to repair in place")


def patch_in_place(source: FileSource, entry: Format, patches: Sequence[Patch], repair: str) -> Path:
    """Write patches to an image behind a journal, which is returned; `repair` says in it what for."""
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
            f"the repair could not be written: {os.strerror(error.errno or 0)}",
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
        fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while text:
                text = text[os.write(fd, text) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise TargetError(
            f"the journal cannot be written: {os.strerror(error.errno or 0)}",
            file=str(journal),
            hint="repair into a copy with -o FILE",
        ) from error
    return journal
