"""`extract`: the root file system of a disk becomes a directory, an archive or a container image."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from diskmorph.convert.bridge.config import new_config
from diskmorph.convert.bridge.options import ExtractOptions
from diskmorph.convert.bridge.outputs import LAYER_TAR, Output, fetching, parse_output, write_image, write_tree
from diskmorph.convert.bridge.own import refuse_sources
from diskmorph.convert.bridge.pseudo import drop_from_root, drop_whiteouts, strip_boot
from diskmorph.convert.source_trees import open_source_tree
from diskmorph.formats.allocator import Identity
from diskmorph.formats.oci.writer import NewImage, NewLayer
from diskmorph.formats.tar import tar_disk
from diskmorph.formats.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.convert.options import ConvertReport, Progress
    from diskmorph.formats.disk import Disk


def extract(
    source: str | os.PathLike[str] | Disk | Tree,
    target: str | os.PathLike[str],
    *,
    options: ExtractOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Extract a disk's root file system; `source` may also be an ISO, an archive, an open Disk or Tree.

    The root is found by partition type, else by its content; what its fstab mounts from the same disk is merged. DST is
    NAME.tar, a directory, `oci:DIR`, `oci-archive:FILE`, `docker-archive:FILE` or `docker://HOST/NAME`. Raises
    DiskmorphError.
    """
    options = options or ExtractOptions()
    begun = time.monotonic()
    output = parse_output(os.fspath(target), options.convert.target_format)
    tree = source if isinstance(source, Tree) else opened_tree(source, options, on_progress)
    try:
        if output.kind != "docker":
            refuse_sources([output.path], [tree.name], tree)
        drop_from_root(tree)
        if options.strip_boot:
            strip_boot(tree)
        report = write_output(tree, output, options, on_progress)
    finally:
        if tree is not source:
            tree.close()
    return replace(report, source=tree.name, target=os.fspath(target), seconds=time.monotonic() - begun)


def write_output(
    tree: Tree, output: Output, options: ExtractOptions, on_progress: Callable[[Progress], None] | None
) -> ConvertReport:
    """Write a tree as what `output` says; raise IntegrityError where its sources changed meanwhile."""
    if output.is_image:
        return _write_image(tree, output, options, on_progress)
    return write_tree(tree, output, options.convert, on_progress)


def opened_tree(
    source: str | os.PathLike[str] | Disk,
    options: ExtractOptions,
    on_progress: Callable[[Progress], None] | None = None,
) -> Tree:
    """Open what is to be extracted as a tree. Raises DiskmorphError."""
    return open_source_tree(
        source,
        options.convert,
        partition=options.partition,
        platform=options.platform,
        on_fetch=fetching(on_progress),
    )


def _write_image(
    tree: Tree, output: Output, options: ExtractOptions, on_progress: Callable[[Progress], None] | None
) -> ConvertReport:
    lost: list[str] = []
    drop_whiteouts(tree)
    layer = tar_disk(tree.walk(ordered=True), LAYER_TAR, lost)
    identity = Identity(b"diskmorph" if options.convert.reproducible else None)
    image = NewImage(config=new_config(tree, options, identity), layers=[NewLayer(layer)], compress=options.compress)
    report = write_image(
        image,
        output,
        options.convert,
        tree=tree,
        total=layer.size,
        on_progress=on_progress,
        mtime=int(identity.time()) if options.convert.reproducible else 0,
    )
    return replace(report, lost=(*tree.lost, *lost))
