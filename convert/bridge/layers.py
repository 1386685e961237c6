"""`build --layers`: a chain of overlays, one an image layer, on a base that images with the same lower layers share."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.bridge.build import Boot, Chance, counted, prepare, root_part
from diskmorph.convert.bridge.facts import architecture
from diskmorph.convert.bridge.outputs import fetching
from diskmorph.convert.bridge.own import refuse_sources
from diskmorph.convert.bridge.parts import ROOT_TYPES, compose, size_of
from diskmorph.convert.job import convert
from diskmorph.convert.plan import target_format
from diskmorph.convert.targets import applied, padded
from diskmorph.formats.allocator import Identity
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.ext4 import Ext4Options, Ext4Writer
from diskmorph.formats.oci import open_image
from diskmorph.formats.policy import Parents
from diskmorph.formats.tree import Tree
from diskmorph.formats.tree_names import IMAGE_FORMATS, split_prefix
from diskmorph.formats.trees import tree_format

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.convert.bridge.options import BuildOptions
    from diskmorph.convert.options import ConvertReport, Progress
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.ext4.writer import State
    from diskmorph.formats.oci import Image


def build_layers(
    source: str | os.PathLike[str] | Tree,
    target: str | os.PathLike[str],
    options: BuildOptions,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Build a chain: DST is the top; the others, NAME.0.SUFFIX the lowest, lie beside it and are named relatively.

    Raises OptionError (no container image, a format without overlays) and what `build` raises. On failure no file that
    was made is left.
    """
    begun = time.monotonic()
    image = _open(source, options, on_progress)
    try:
        tree, disks, notes, lost = _disks(image, options)
        refuse_sources(_names(Path(target), len(disks)), [image.name], tree)
        report = _write_chain(disks, Path(target), options, on_progress)
    finally:
        image.close()
    return replace(
        report,
        source=image.name,
        seconds=time.monotonic() - begun,
        lost=(*report.lost, *tree.lost, *lost),
        notes=(*report.notes, *notes),
    )


def _open(
    source: str | os.PathLike[str] | Tree, options: BuildOptions, on_progress: Callable[[Progress], None] | None
) -> Image:
    kind = None if isinstance(source, Tree) else options.convert.source_format or tree_format(source)
    if isinstance(source, Tree) or kind not in IMAGE_FORMATS:
        raise OptionError(
            "--layers needs a container image", hint="an OCI layout or archive, a docker-archive, docker://"
        )
    _, name = split_prefix(os.fspath(source))
    return open_image(
        name,
        format=kind,
        platform=options.platform,
        limits=options.convert.limits,
        on_fetch=fetching(on_progress),
    )


def _disks(image: Image, options: BuildOptions) -> tuple[Tree, list[Callable[[], Disk]], tuple[str, ...], list[str]]:
    """Return the final tree, what makes the disk after each layer, notes and losses.

    Booting is put into the last state alone; the partitions before the root have their places from the first on.
    """
    first = image.layers[0].diff_id if image.layers else ""
    reproducible = options.convert.reproducible
    identity = Identity(hashlib.sha256(str(first).encode()).digest()) if reproducible else Chance()
    writer = Ext4Writer(Ext4Options(label=options.label.encode(), identity=identity))
    states: list[State] = []
    boot = Boot()
    tree: Tree | None = None
    for number, grown in enumerate(image.states()):
        tree = grown
        if number + 1 >= len(image.layers):
            boot = prepare(tree, options, identity)
        states.append(writer.take(tree))
    assert tree is not None  # noqa: S101 - states() yields at least once
    root_type = ROOT_TYPES.get(architecture(tree), ROOT_TYPES["amd64"])
    _, profile = applied(options.convert)

    def maker(state: State) -> Callable[[], Disk]:
        def make() -> Disk:
            root = root_part(writer, boot, root_type, options, state)
            total = options.size.total if options.size.total is not None else size_of([*boot.parts, root])
            return compose([*boot.parts, root], padded(total, profile), identity, boot.mbr_code)

        return make

    return tree, [maker(state) for state in states], boot.notes, counted(writer.lost)


def _names(target: Path, count: int) -> list[Path]:
    return [*(target.with_name(f"{target.stem}.{number}{target.suffix}") for number in range(count - 1)), target]


def _write_chain(
    disks: list[Callable[[], Disk]],
    target: Path,
    options: BuildOptions,
    on_progress: Callable[[Progress], None] | None,
) -> ConvertReport:
    entry = target_format(str(target), applied(options.convert)[0])
    names = _names(target, len(disks))
    if not options.convert.force:
        for name in names:
            if name.exists() or name.is_symlink():
                raise TargetError("exists already", file=str(name), hint="replace it with --force")
    made: list[Path] = []
    report: ConvertReport | None = None
    try:
        for make, name in zip(disks, names, strict=True):
            wanted = replace(
                options.convert,
                source_format=None,
                target_format=entry.name,
                base=made[-1] if made else None,
                base_format=entry.name if made else None,
                parents=Parents(allow=(target.parent,)),
            )
            report = convert(make(), name, options=wanted, on_progress=on_progress)
            made.append(name)
    except BaseException:
        for name in made:
            name.unlink(missing_ok=True)
        raise
    assert report is not None  # noqa: S101 - there is at least one disk
    return replace(report, members=tuple(str(name) for name in reversed(names)))
