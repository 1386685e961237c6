"""All disks of a package into a folder, each in the format that was asked for."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.job import convert
from diskmorph.convert.options import ConvertOptions, ConvertReport, Moved, Progress
from diskmorph.formats.errors import OptionError, TargetError, UnsupportedError
from diskmorph.formats.packages import open_package
from diskmorph.formats.registry import require_format
from diskmorph.formats.syncing import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.formats.machine import MachineDisk

_UNSAFE = re.compile(r"[^A-Za-z0-9._ -]+")
_SUFFIXES = re.compile(r"\.(vmdk|qcow2|qcow|vhdx?|vdi|raw|img|iso|gz)$", re.IGNORECASE)
_FALLBACK = "qcow2"


def package_to_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Convert every disk of a package into a new folder, named after the files that hold them.

    The format is the one asked for, else each disk's own where it can be written, else qcow2. The folder appears when
    all is done; one that exists must be empty. Raises what `convert` raises.
    """
    begun = time.monotonic()
    options = options or ConvertOptions()
    with open_package(source, format=options.source_format, parents=options.parents, limits=options.limits) as package:
        chosen = list(package.disks) if options.disk is None else [package.pick(options.disk)]
        if not chosen:
            raise UnsupportedError("holds no disk", feature="disks", file=package.name, format=package.format)
        if options.digest and len(chosen) > 1:
            raise OptionError("--digest takes one disk, not several", hint="choose one with --disk N")
        total = sum(disk.virtual_size or 0 for disk in chosen)
        reports: list[ConvertReport] = []
        names: list[str] = []
        with new_folder(Path(target), sync=options.sync, dry_run=options.dry_run) as folder:
            for one, file in zip(chosen, _names(chosen), strict=True):
                with package.open_disk(one.number) as disk:
                    entry = require_format(options.target_format or disk.format)
                    if options.target_format is None and (not entry.writes or entry.kind != "disk"):
                        entry = require_format(_FALLBACK)
                    names.append(f"{file}{entry.suffixes[0] if entry.suffixes else f'.{entry.name}'}")
                    done = sum(report.virtual_size for report in reports)
                    own = replace(options, target_format=entry.name, source_format=None, disk=None, force=False)
                    reports.append(
                        convert(disk, folder / names[-1], options=own, on_progress=_shifted(on_progress, done, total))
                    )
        return _joined(reports, package.name, os.fspath(target), names, time.monotonic() - begun)


def _shifted(
    on_progress: Callable[[Progress], None] | None, done: int, total: int
) -> Callable[[Progress], None] | None:
    if on_progress is None:
        return None
    return lambda progress: on_progress(
        Progress(progress.phase, done + progress.done, max(total, done + progress.total))
    )


def _names(disks: list[MachineDisk]) -> Iterator[str]:
    """Yield a file name for each disk, without suffix, none twice."""
    seen: set[str] = set()
    for disk in disks:
        stem = disk.file or disk.id
        while _SUFFIXES.search(stem):
            stem = _SUFFIXES.sub("", stem)
        stem = _UNSAFE.sub("-", stem).strip("-. ")[:100] or f"disk{disk.number}"
        name = stem
        while name.lower() in seen:
            name = f"{name}-{disk.number}"
        seen.add(name.lower())
        yield name


def _joined(reports: list[ConvertReport], source: str, target: str, names: list[str], seconds: float) -> ConvertReport:
    moved = Moved()
    for report in reports:
        for word in ("cloned", "copied", "encoded", "passed", "skipped"):
            setattr(moved, word, getattr(moved, word) + getattr(report.bytes, word))
    return ConvertReport(
        source=source,
        target=target,
        format=", ".join(dict.fromkeys(report.format for report in reports)),
        virtual_size=sum(report.virtual_size for report in reports),
        stored_size=sum(report.stored_size for report in reports),
        bytes=moved,
        seconds=seconds,
        verified=all(report.verified for report in reports),
        lost=tuple(dict.fromkeys(loss for report in reports for loss in report.lost)),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
        digest=reports[0].digest if len(reports) == 1 else None,
        members=tuple(names),
    )


@contextlib.contextmanager
def new_folder(target: Path, *, sync: bool = True, dry_run: bool = False) -> Iterator[Path]:
    """Lend a folder beside `target` that takes its name when the block ends well, and is removed when it does not.

    Raises TargetError where the target exists and is not an empty folder.
    """
    target = Path(os.path.normpath(target))
    _refuse_taken(target)
    if dry_run:
        yield target.parent
        return
    building = target.parent / f".{target.name[:200]}.{secrets.token_hex(4)}.part"
    try:
        building.mkdir()
    except OSError as error:
        raise TargetError(f"cannot be created: {error.strerror}", file=str(target)) from error
    try:
        yield building
        try:
            building.rename(target)  # replaces an empty folder, fails where it is not empty
        except OSError as error:
            raise TargetError(f"cannot be named: {error.strerror}", file=str(target)) from error
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    if sync:
        sync_folder(target.parent)


def _refuse_taken(target: Path) -> None:
    try:
        taken = target.is_symlink() or not target.is_dir() or any(target.iterdir())
        exists = target.is_symlink() or target.exists()
    except OSError as error:
        raise TargetError(f"cannot be looked into: {error.strerror}", file=str(target)) from error
    if exists and taken:
        raise TargetError("exists already and is not an empty folder", file=str(target), hint="write to another name")
