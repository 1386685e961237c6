"""`resize` in place: a larger disk by an image's tables alone, where they have room for it.

A format that can has a module `grow` with `growth_patches(source, size)`: the patches that make the disk `size` bytes
large, nothing else of the image touched, or None where its tables have no room. What is behind the old end then must
read as zeroes: that is looked at before anything is written.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.compare import first_data
from diskmorph.convert.mended import MendedSource, overwritten
from diskmorph.convert.options import ConvertReport, Moved
from diskmorph.convert.patching import change_in_place
from diskmorph.convert.variants import variant_of
from diskmorph.formats.check import Patch
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.policy import Opener
from diskmorph.formats.probe import RAW
from diskmorph.formats.registry import OpenContext, identify, open_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.convert.opening import Opened
    from diskmorph.convert.options import ConvertOptions
    from diskmorph.formats.probe import Format
    from diskmorph.formats.source import ByteSource

WITH_TABLES = ("qcow2", "vdi", "vhd", "vhdx")
"""Formats with a module `grow`."""


def grow_in_place(opened: Opened, size: int, options: ConvertOptions) -> ConvertReport | None:
    """Make an open image's disk larger in its file; None, and nothing written, where the image must be written anew.

    With `options.dry_run` nothing is written either. Raises PolicyError (the image is in use), TargetError.
    """
    started = time.monotonic()
    if not _means_the_image(opened, options):
        return None
    if size == opened.disk.size:
        return _report(opened, size, Path(opened.name).stat().st_size, started, "has this size already")
    if not _has_room(opened, options):
        return None
    opener = Opener(options.parents, options.limits)
    with opener.user_file(opened.name) as source:
        entry, _ = identify(source, options.source_format)
        try:
            patches = _planned(source, entry, opened, size, OpenContext(opener, options.limits))
        except (FormatError, UnsupportedError):  # whatever is odd about it, writing it anew tells or mends
            return None
        if not patches:
            return None
        if not options.dry_run:
            change_in_place(source, entry, patches, "resize")
        stored = MendedSource(source, patches).size
    done = "would be changed" if options.dry_run else "changed"
    return _report(opened, size, stored, started, f"{done} in place: the disk's bytes stay where they are")


def _report(opened: Opened, size: int, stored: int, started: float, note: str) -> ConvertReport:
    return ConvertReport(
        source=opened.name,
        target=opened.name,
        format=opened.format,
        virtual_size=size,
        stored_size=stored,
        bytes=Moved(skipped=size),
        seconds=time.monotonic() - started,
        verified=False,
        lost=(),
        notes=(note,),
    )


def _means_the_image(opened: Opened, options: ConvertOptions) -> bool:
    """Whether the image alone is meant, as it is, and no word asks for something that writing it anew would bring."""
    if options.snapshot is not None or options.disk is not None or options.parents.shared:
        return False
    if not Path(opened.name).is_file():
        return False
    asked = options.format_options or options.compress is not None or options.reproducible
    return not asked and options.target_format in {None, opened.format}


def _has_room(opened: Opened, options: ConvertOptions) -> bool:
    """Whether the format, and what lies below the image, let it grow by its tables."""
    if opened.format not in {RAW.name, *WITH_TABLES} or not opened.layers or len(opened.layers[0].files) != 1:
        return False
    if len(opened.layers) > 1:  # what of the parent lies behind the old end would come to light
        return opened.format == "qcow2" and opened.layers[1].size <= opened.layers[0].size
    return opened.format != RAW.name or "preallocation" not in variant_of(opened, options).options.format_options


def _planned(
    source: ByteSource, entry: Format, opened: Opened, size: int, context: OpenContext
) -> Sequence[Patch] | None:
    """Return the patches that make the disk larger and do nothing else; None where there are none."""
    own = opened.layers[0]
    patches = _patches(source, entry, size)
    if patches is None:
        return None
    grown = MendedSource(source, patches)
    layer = open_layer(grown, entry, context)
    if layer.size != size or layer.info.snapshots != own.info.snapshots:
        return None
    if overwritten(grown, own) is not None or first_data(layer, own.size) is not None:
        return None
    return patches


def _patches(source: ByteSource, entry: Format, size: int) -> Sequence[Patch] | None:
    if entry.name == RAW.name:
        return [Patch(size - 1, b"\0", f"the disk becomes {size} bytes large")]
    if entry.name not in WITH_TABLES:
        return None
    module = importlib.import_module(f"diskmorph.formats.{entry.name}.grow")
    found: Sequence[Patch] | None = module.growth_patches(source, size)
    return found
