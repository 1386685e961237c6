"""`commit`: what changed on a disk, compared with the image that it was built from, as one new layer."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diskmorph.convert.bridge.config import changed, timestamp
from diskmorph.convert.bridge.diff import Known, changes
from diskmorph.convert.bridge.extract import opened_tree
from diskmorph.convert.bridge.injected import read_record
from diskmorph.convert.bridge.options import CommitOptions
from diskmorph.convert.bridge.outputs import LAYER_TAR, Output, fetching, parse_output, write_image
from diskmorph.convert.bridge.own import refuse_sources
from diskmorph.convert.bridge.pseudo import drop_pseudo, drop_whiteouts
from diskmorph.formats.allocator import Identity
from diskmorph.formats.errors import OptionError
from diskmorph.formats.oci import open_image
from diskmorph.formats.oci.writer import NewImage, NewLayer, OldLayer
from diskmorph.formats.tar import tar_disk
from diskmorph.formats.tree import Tree
from diskmorph.formats.tree_names import IMAGE_FORMATS, split_prefix
from diskmorph.formats.trees import tree_format

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskmorph.convert.options import ConvertReport, Progress
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.oci import Image
    from diskmorph.formats.tree import Entry


def commit(
    source: str | os.PathLike[str] | Disk | Tree,
    target: str | os.PathLike[str],
    *,
    options: CommitOptions,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Write the base image with one more layer: what is different on the disk, and whiteouts for what is gone.

    What `build` had put in does not count. Where nothing changed, no layer is added, but a history entry is. Raises
    DiskmorphError: OptionError (the base or the target is no container image), and what opening and writing raise.
    """
    begun = time.monotonic()
    output = parse_output(os.fspath(target), options.extract.convert.target_format)
    if not output.is_image:
        raise OptionError(f"{os.fspath(target)!r} is no container image", hint="oci:DIR, oci-archive:FILE, ...")
    with _open_base(options, on_progress) as base:
        tree = source if isinstance(source, Tree) else opened_tree(source, options.extract, on_progress)
        try:
            if output.kind != "docker":
                refuse_sources([output.path], [base.name, tree.name], tree)
            layer = _changed_entries(base, tree)
            report = _write(base, tree, layer, output, options, on_progress)
        finally:
            if tree is not source:
                tree.close()
    return replace(
        report,
        source=tree.name,
        target=os.fspath(target),
        seconds=time.monotonic() - begun,
        lost=(*report.lost, *tree.lost),
    )


def _open_base(options: CommitOptions, on_progress: Callable[[Progress], None] | None) -> Image:
    if not options.base:
        raise OptionError("commit needs the image that the disk was built from", hint="name it with --base IMAGE")
    kind = tree_format(options.base)
    if kind not in IMAGE_FORMATS:
        raise OptionError(
            f"the base {options.base!r} is no container image", hint="OCI, oci-archive, docker-archive, docker://"
        )
    limits = options.extract.convert.limits
    _, name = split_prefix(options.base)
    tell = fetching(on_progress)
    return open_image(name, format=kind, platform=options.extract.platform, limits=limits, on_fetch=tell)


def _changed_entries(base: Image, tree: Tree) -> Sequence[Entry]:
    added, removed = read_record(tree)
    drop_pseudo(tree)
    drop_whiteouts(tree)
    before = base.tree()
    return changes(before, tree, Known(added, frozenset(removed)))


def _write(
    base: Image,
    tree: Tree,
    entries: Sequence[Entry],
    output: Output,
    options: CommitOptions,
    on_progress: Callable[[Progress], None] | None,
) -> ConvertReport:
    reproducible = options.extract.convert.reproducible
    identity = Identity(b"diskmorph" if reproducible else None)
    old = [OldLayer(base.files.open(layer.file), str(layer.diff_id), layer.media_type) for layer in base.layers]
    lost: list[str] = []
    fresh = [NewLayer(tar_disk(entries, LAYER_TAR, lost))] if entries else []
    image = NewImage(
        config=_config(base, options, identity, empty=not entries),
        layers=[*old, *fresh],
        compress=options.extract.compress,
    )
    try:
        report = write_image(
            image,
            output,
            options.extract.convert,
            tree=tree,
            total=sum(layer.archive.size for layer in fresh),
            on_progress=on_progress,
            mtime=int(identity.time()) if reproducible else 0,
        )
    finally:
        for layer in old:
            layer.source.close()
    notes = () if entries else ("nothing changed: no layer was added",)
    return replace(report, lost=tuple(lost), notes=(*report.notes, *notes))


def _config(base: Image, options: CommitOptions, identity: Identity, *, empty: bool) -> dict[str, Any]:
    created = timestamp(identity.time())
    entry: dict[str, Any] = {"created": created, "created_by": "diskmorph commit"}
    if options.message:
        entry["comment"] = options.message
    if options.author:
        entry["author"] = options.author
    if empty:
        entry["empty_layer"] = True
    history = base.config.get("history")
    found = {key: value for key, value in base.config.items() if key != "rootfs"}
    found["config"] = changed(base.config.get("config"), options.extract)
    found["created"] = created
    if options.author:
        found["author"] = options.author
    found["history"] = [*(history if isinstance(history, list) else []), entry]
    return found
