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
from diskmorph.convert.mended import MendedSource
from diskmorph.convert.options import ConvertReport, Moved
from diskmorph.convert.patching import patch_in_place
from diskmorph.convert.variants import variant_of
from diskmorph.formats.check import Patch
from diskmorph.formats.policy import Opener
from diskmorph.formats.probe import RAW
from diskmorph.formats.registry import OpenContext, identify, open_layer
from diskmorph.formats.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.convert.opening import Opened
    from diskmorph.convert.options import ConvertOptions
    from diskmorph.formats.disk import ImageDisk
    from diskmorph.formats.probe import Format
    from diskmorph.formats.source import ByteSource

WITH_TABLES = ("qcow2", "vdi", "vhd", "vhdx")
"""Formats with a module `grow`."""


def grow_in_place(opened: Opened, size: int, options: ConvertOptions) -> ConvertReport | None:
    """Make an open image's disk larger in its file; None, and nothing written, where the image must be written anew.

    With `options.dry_run` nothing is written either. Raises PolicyError (the image is in use), TargetError.
    """
    started = time.monotonic()
    if not _may(opened, options):
        return None
    opener = Opener(options.parents, options.limits)
    with opener.user_file(opened.name) as source:
        entry, _ = identify(source, options.source_format)
        patches = _patches(source, entry, size)
        if patches is None or not isinstance(source, FileSource):
            return None
        grown = MendedSource(source, patches)
        if not _is_right(grown, entry, opened, size, OpenContext(opener, options.limits)):
            return None
        if not options.dry_run:
            patch_in_place(source, entry, patches, "resize").unlink(missing_ok=True)
    changed = "would be changed" if options.dry_run else "changed"
    return ConvertReport(
        source=opened.name,
        target=opened.name,
        format=entry.name,
        virtual_size=size,
        stored_size=grown.size,
        bytes=Moved(skipped=size),
        seconds=time.monotonic() - started,
        verified=False,
        lost=(),
        notes=(f"{changed} in place: the disk's bytes stay where they are",),
    )


def _may(opened: Opened, options: ConvertOptions) -> bool:
    """Whether the image alone is meant, as it is, and no word asks for something that writing it anew would bring."""
    if options.snapshot is not None or options.disk is not None or options.parents.shared:
        return False
    if not Path(opened.name).is_file():
        return False
    asked = options.format_options or options.compress is not None or options.reproducible
    if asked or options.target_format not in {None, opened.format}:
        return False
    if opened.format not in {RAW.name, *WITH_TABLES} or not opened.layers or len(opened.layers[0].files) != 1:
        return False
    if len(opened.layers) > 1:  # what of the parent lies behind the old end would come to light
        return opened.format == "qcow2" and opened.layers[1].size <= opened.layers[0].size
    return opened.format != RAW.name or "preallocation" not in variant_of(opened, options).options.format_options


def _patches(source: ByteSource, entry: Format, size: int) -> Sequence[Patch] | None:
    if entry.name == RAW.name:
        return [Patch(size - 1, b"\0", f"the disk becomes {size} bytes large")]
    if entry.name not in WITH_TABLES:
        return None
    module = importlib.import_module(f"diskmorph.formats.{entry.name}.grow")
    found: Sequence[Patch] | None = module.growth_patches(source, size)
    return found


def _is_right(source: ByteSource, entry: Format, opened: Opened, size: int, context: OpenContext) -> bool:
    """Whether the image would have the size asked for, zeroes behind its old end, and the same snapshots."""
    own = opened.layers[0]
    layer: ImageDisk = open_layer(source, entry, context)
    if layer.size != size or layer.info.snapshots != own.info.snapshots:
        return False
    return first_data(layer, own.size) is None
