"""`create` and `resize`: images made from nothing, images made larger or smaller."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.growing import grow_in_place
from diskmorph.convert.job import perform, refuse_own_files
from diskmorph.convert.opening import Opened, open_asked, open_source
from diskmorph.convert.options import ConvertOptions, ConvertReport, Progress, whole_bytes
from diskmorph.convert.patching import require_finished
from diskmorph.convert.plan import STDOUT, Plan, losses, make_plan, require_zero
from diskmorph.convert.variants import Variant, lost_by_plan, lost_room, variant_of
from diskmorph.formats.errors import OptionError, TargetError, UnsupportedError
from diskmorph.formats.extents import ABSENT, HOLE
from diskmorph.formats.views import Slice, Zero, grown

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.disk import Disk


def create(
    target: str | os.PathLike[str],
    size: int | None = None,
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Write an empty image of `size` bytes; with `options.base` an overlay that holds nothing yet.

    `size` None takes the base's. Raises what `convert` raises.
    """
    options = options or ConvertOptions()
    if size is None:
        if options.base is None:
            raise OptionError("an empty image needs a size", hint="say it, as in 10G")
        size = _size_of(options)
    size = whole_bytes(size, "size")
    empty = Zero(size, kind=HOLE if options.base is None else ABSENT)
    empty.name = "nothing"
    with make_plan(empty, target, options) as plan:
        refuse_own_files(plan)
        return perform(plan, on_progress, differences=False)


def _size_of(options: ConvertOptions) -> int:
    assert options.base is not None  # noqa: S101 - for the type checker
    parents = replace(options.parents, backing=None)
    with open_source(options.base, format=options.base_format, parents=parents, limits=options.limits) as base:
        return base.disk.size


def resize(
    path: str | os.PathLike[str],
    size: int,
    *,
    shrink: bool = False,
    output: str | os.PathLike[str] | None = None,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Give an image another size: into `output`, by its tables alone, or rewritten and put in its own place.

    A larger disk is a change of a few bytes in its file, behind a journal, where the tables have room for it (see
    convert.growing). Data is never cut unless `shrink` allows it. The format and its variant stay where the options say
    nothing else; what of the variant cannot be written again stands in the report's `lost`. Raises TargetError (data
    would be cut), UnsupportedError (without `output`: something that rewriting loses), and what `convert` raises.
    """
    options = options or ConvertOptions()
    if os.fspath(path) == STDOUT:
        raise OptionError("standard input cannot be resized", hint="`convert --size SIZE - DST` takes it")
    size = whole_bytes(size, "size")
    with open_asked(path, options) as opened:
        if output is None:
            require_finished(Path(opened.name))
        if output is None and size >= opened.disk.size:
            report = grow_in_place(opened, size, options)
            if report is not None:
                if on_progress is not None:
                    on_progress(Progress("resize", size, size))
                return report
        disk = _resized(opened.disk, size, shrink=shrink)
        variant = _variant(opened, options, elsewhere=output is not None)
        wanted = replace(options if variant is None else variant.options, size=None)
        if output is None:
            wanted = replace(wanted, force=True)
        with make_plan(disk, path if output is None else output, wanted) as plan:
            if output is not None:
                refuse_own_files(plan)
            _tell_losses(opened, plan)
            if variant is None:
                return replace(perform(plan, on_progress), source=opened.name)
            lost = lost_by_plan(opened, variant, plan, options.format_options)
            report = perform(plan, on_progress)
            lost += lost_room(variant, report, opened.disk.size)
            return replace(report, source=opened.name, lost=(*report.lost, *lost))


def _variant(opened: Opened, options: ConvertOptions, *, elsewhere: bool) -> Variant | None:
    """Return what is to be kept of the image's format and variant; None where another format is asked for."""
    if not elsewhere:
        _require_whole(opened)
    elif options.target_format not in {None, opened.format}:
        return None
    return variant_of(opened, options)


def _tell_losses(opened: Opened, plan: Plan) -> None:
    """Add what the image's own headers say to a plan that knows the disk alone."""
    lost, notes = losses(opened, plan.disk, plan.format, plan.allocator)
    plan.lost = tuple(dict.fromkeys((*lost, *plan.lost)))
    plan.notes = tuple(dict.fromkeys((*notes, *plan.notes)))


def _resized(disk: Disk, size: int, *, shrink: bool) -> Disk:
    if size >= disk.size:
        return grown(disk, size)
    if not shrink:
        try:
            require_zero(disk, size)
        except TargetError as error:
            error.hint = "--shrink cuts it off for good"
            raise
    return Slice(disk, 0, size)


def _require_whole(opened: Opened) -> None:
    """Raise UnsupportedError where rewriting the image in its place would lose more than its size."""
    info = opened.info
    if len(opened.layers) > 1 or (info is not None and info.parent is not None):
        raise _elsewhere(opened, "an overlay cannot be resized in its place")
    if info is not None and "compressed_by" in info.features:
        raise _elsewhere(opened, "is compressed as one file and cannot be resized in its place")
    if info is not None and info.encrypted:
        raise _elsewhere(
            opened,
            f"resizing in its place would lose its encryption ({info.features['encryption']})",
            "`convert --size SIZE -o encrypt.format=luks --target-passphrase-file FILE` writes an encrypted qcow2",
        )
    if info is not None and (info.snapshots or info.bitmaps):
        raise _elsewhere(opened, "resizing in its place would lose its snapshots or bitmaps")
    if len(opened.files) > 1:
        raise _elsewhere(opened, "an image of several files cannot be resized in its place")
    if Path(opened.name).is_symlink():
        raise _elsewhere(opened, "is a symbolic link, which would be replaced", "name the file itself")


def _elsewhere(opened: Opened, problem: str, hint: str = "write to -o FILE") -> UnsupportedError:
    return UnsupportedError(problem, file=opened.name, feature="resize", hint=hint)
