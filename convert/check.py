"""`check`: a format's own check, and repairs: into a copy, or in place behind a journal that can undo them."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diskmorph.convert.journal import BROKEN_OFF, UNDO, is_unfinished
from diskmorph.convert.options import CheckResult
from diskmorph.convert.patching import patch_in_place, undo_in_place
from diskmorph.convert.repair import plan_repair
from diskmorph.formats.check import CheckReport, Patch
from diskmorph.formats.errors import DiskmorphError, OptionError, TargetError
from diskmorph.formats.limits import Limits
from diskmorph.formats.output import FileMember, FileTarget
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import OpenContext, identify, load
from diskmorph.formats.remote import is_url
from diskmorph.formats.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.policy import Allowed
    from diskmorph.formats.registry import FormatModule

_BLOCK = 1 << 20


def check(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    repair: str | None = None,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    sync: bool = True,
    parents: Allowed = None,
    limits: Limits | None = None,
) -> CheckResult:
    """Check an image's structure; with `repair` ("leaks" or "all") mend it, in place or as the copy `output`.

    In place the old bytes are journalled first (`CheckResult.journal`); `repair` "undo" puts back what the last
    change in place replaced. The result tells what is left after the repair. Raises FormatError where the image
    cannot be read at all, TargetError where it cannot be written.
    """
    if repair not in {None, "leaks", "all", "undo"}:
        raise OptionError(f"repair {repair!r} is not known", hint="leaks, all or undo")
    if output is not None and repair == "undo":
        raise OptionError("the journal undoes a change in place, not in a copy", hint="leave out -o")
    if output is not None and repair is None:
        raise OptionError("-o needs --repair", hint="say --repair leaks or --repair all")
    parents = Parents.of(parents)
    if repair is not None and output is None and parents.shared:
        raise OptionError(
            "an image that may be in use is not repaired in place", hint="repair into a copy with -o FILE"
        )
    if os.fspath(path) == "-":
        raise OptionError("check reads a file, not standard input", hint="write the image to a file first")
    limits = limits or Limits()
    opener = Opener(parents, limits)
    context = OpenContext(opener, limits)
    if repair is not None and is_url(path):
        raise OptionError("what lies at a URL is checked only, not mended", hint="fetch it to a file first")
    if repair == "undo":
        with opener.user_file(path) as file:
            count = undo_in_place(file)
        return _result(str(path), _again(Path(path), format, parents, limits), repaired=count)
    with opener.user_source(path) as source:
        entry, _ = identify(source, format)
        module = load(entry)
        report = module.check_image(source, context, repair)
        if repair is None or (not report.patches and output is None):
            if source.path is not None and is_unfinished(source.path):
                report.add("journal", None, f"{BROKEN_OFF}: {UNDO}")
            return _result(str(path), report)
        assert isinstance(source, FileSource)  # noqa: S101 - URLs are not mended
        if output is not None:
            _refuse_parts(module, source, context, Path(output))
        patches = plan_repair(module, source, context, repair, report)
        if output is not None:
            _repair_copy(source, Path(output), patches, force=force, sync=sync)
        else:
            journal = patch_in_place(source, entry, patches, repair)
    where = Path(path) if output is None else Path(output)
    left = _again(where, entry.name, parents, limits)
    return _result(str(where), left, repaired=len(patches), journal=str(journal) if output is None else None)


def _again(path: Path, format: str | None, parents: Parents, limits: Limits) -> CheckReport:
    opener = Opener(parents, limits)
    with opener.user_file(path) as source:
        entry, _ = identify(source, format)
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


def _refuse_parts(module: FormatModule, source: FileSource, context: OpenContext, output: Path) -> None:
    """Raise OptionError where a copy of the one file would not be the image: it has others, or would not find them."""
    try:
        disk = module.open_image(source, context)
    except DiskmorphError:
        return  # what cannot be opened is not known to have any
    for other in disk.files[1:]:
        other.close()
    if len(disk.files) > 1:
        raise OptionError(
            "the image consists of several files, of which a copy would hold one",
            hint="mend it in place, or `convert` it",
        )
    names = disk.info.parent.names if disk.info.parent is not None else ()
    own = source.path.parent if source.path is not None else Path()
    if names and not any(name.startswith("/") for name in names) and not _same_folder(own, output.parent):
        raise OptionError(
            f"the image names its parent from its own folder, which {output.parent} is not",
            hint="choose a name beside the image",
        )


def _same_folder(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


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
