"""`rebase`: another parent for an overlay, by its metadata alone; or the overlay written anew."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diskmorph.convert.compare import compare_disks
from diskmorph.convert.mended import MendedSource, overwritten
from diskmorph.convert.opening import open_source
from diskmorph.convert.options import ConvertOptions, ConvertReport, Progress
from diskmorph.convert.patching import change_in_place
from diskmorph.formats.allocator import NewParent
from diskmorph.formats.errors import IntegrityError, OptionError, UnsupportedError
from diskmorph.formats.policy import Opener
from diskmorph.formats.registry import OpenContext, identify, open_layer
from diskmorph.formats.views import Overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskmorph.formats.check import Patch
    from diskmorph.formats.source import ByteSource

    OnProgress = Callable[[Progress], None] | None

IN_PLACE = ("qcow2", "vmdk", "vdi", "vhd", "vhdx")
"""Formats whose parent can be changed in the image itself."""


@dataclass(frozen=True, slots=True)
class RebaseReport:
    """What was done: the image, its new parent, whether contents were compared, bytes of metadata written."""

    file: str
    format: str
    parent: str
    compared: bool
    written: int

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of docs/json.md."""
        return {name: getattr(self, name) for name in ("file", "format", "parent", "compared", "written")}


def rebase(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    unsafe: bool = False,
    options: ConvertOptions | None = None,
    on_progress: OnProgress = None,
) -> RebaseReport:
    """Make `base` the parent of an overlay; only metadata is written, behind a journal.

    The overlay must show the same content on it: both are compared first, whole, unless `unsafe`. With
    `options.dry_run` nothing is written. Raises IntegrityError where contents differ, UnsupportedError for formats that
    are not changed in place, and what opening raises.
    """
    options = options or ConvertOptions()
    opener = Opener(options.parents, options.limits)
    context = OpenContext(opener, options.limits)
    with opener.user_file(path) as source:
        entry, _ = identify(source, options.source_format)
        if entry.name not in IN_PLACE:
            raise UnsupportedError(
                f"the parent of {entry.name} is not changed in place",
                feature="rebase",
                file=source.name,
                hint="write it anew on the other parent with -o FILE",
            )
        with open_layer(source, entry, context) as layer:
            if layer.info.parent is None:
                raise UnsupportedError(
                    "has no parent", feature="rebase", file=source.name, hint="`convert -B` makes overlays"
                )
            parent = _new_parent(path, base, options)
            patches = _patches(entry.name, source, parent)
            if not unsafe:
                _require_same(path, base, options, on_progress)
            place = overwritten(MendedSource(source, patches), layer)
            if place is not None:
                raise UnsupportedError(
                    "its metadata lies where data of the disk is: it is damaged",
                    feature="rebase",
                    file=source.name,
                    format=entry.name,
                    offset=place,
                    hint="write it anew on the other parent with -o FILE",
                )
            if not options.dry_run:
                change_in_place(source, entry, patches, "rebase")
            written = sum(len(patch.data) for patch in patches)
            return RebaseReport(os.fspath(path), entry.name, parent.name, not unsafe, written)


def _patches(format: str, source: ByteSource, parent: NewParent) -> Sequence[Patch]:
    module = importlib.import_module(f"diskmorph.formats.{format}.rebase")
    found: Sequence[Patch] = module.parent_patches(source, parent)
    return found


def _new_parent(path: str | os.PathLike[str], base: str | os.PathLike[str], options: ConvertOptions) -> NewParent:
    opener = Opener(options.parents, options.limits)
    with opener.user_file(base) as source:
        entry, _ = identify(source, options.base_format)
        real = Path(os.path.realpath(base))
        if real == Path(os.path.realpath(path)):
            raise OptionError("an image cannot be its own parent")
        with open_layer(source, entry, OpenContext(opener, options.limits)) as layer:
            name = os.path.relpath(real, Path(os.path.realpath(path)).parent)
            return NewParent(name, entry.name, layer.size, layer.identity, real)


def _require_same(
    path: str | os.PathLike[str], base: str | os.PathLike[str], options: ConvertOptions, on_progress: OnProgress
) -> None:
    """Raise IntegrityError unless the overlay shows the same content on the new parent."""
    plain = replace(options.parents, backing=None)
    with (
        open_source(path, format=options.source_format, parents=options.parents, limits=options.limits) as now,
        open_source(base, format=options.base_format, parents=plain, limits=options.limits) as other,
    ):
        then = Overlay(now.layers[0], other.disk)
        found = compare_disks(now.disk, then, max_ranges=1, threads=options.threads, on_progress=on_progress)
    if not found.identical:
        raise IntegrityError(
            f"would show other content on {os.fspath(base)}",
            file=os.fspath(path),
            offset=found.first_difference,
            hint="write it anew with -o FILE, which keeps the content; or say --unsafe",
        )


def rewrite(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None,
    options: ConvertOptions | None = None,
    on_progress: OnProgress = None,
) -> ConvertReport:
    """Write an overlay anew into `target`: on another parent, or with None folded into its own; the content stays."""
    from diskmorph.convert.job import convert  # noqa: PLC0415 - loads the pipeline

    options = options or ConvertOptions()
    if options.target_format is None:
        with Opener(options.parents, options.limits).user_file(path) as source:
            options = replace(options, target_format=identify(source, options.source_format)[0].name)
    wanted = replace(options, base=None if base is None else Path(base))
    return convert(path, target, options=wanted, on_progress=on_progress)
