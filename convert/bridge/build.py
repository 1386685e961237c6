"""`build`: a tree becomes a disk, straight through the pipeline; nothing is unpacked, no image is written between."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diskmorph.convert.bridge.facts import architecture, seed_of
from diskmorph.convert.bridge.options import BuildOptions
from diskmorph.convert.bridge.outputs import fetching
from diskmorph.convert.bridge.own import refuse_sources
from diskmorph.convert.bridge.parts import MIB, ROOT_TYPES, Part, compose, room_for_last, size_of
from diskmorph.convert.job import convert
from diskmorph.convert.targets import applied, padded
from diskmorph.formats.allocator import Identity
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.ext4 import Ext4Options, Ext4Writer
from diskmorph.formats.tree import Tree
from diskmorph.formats.trees import open_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.convert.options import ConvertReport, Progress
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.ext4.writer import State
    from diskmorph.formats.source import ByteSource

_LEAST_ROOT = 8 * MIB


@dataclass(frozen=True)
class Boot:
    """What booting adds to a disk: partitions before the root, code in the MBR, things to say to the user.

    What it adds to the tree is in the tree already.
    """

    parts: tuple[Part, ...] = ()
    mbr_code: bytes = b""
    notes: tuple[str, ...] = field(default_factory=tuple)
    kernel: ByteSource | None = None
    ramdisk: ByteSource | None = None


class Composed(NamedTuple):
    """A disk that is to be written, its root file system, what booting added, what the disk cannot hold."""

    disk: Disk
    root: Disk
    boot: Boot
    lost: tuple[str, ...]


def build(
    source: str | os.PathLike[str] | Tree,
    target: str | os.PathLike[str],
    *,
    options: BuildOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Build a disk from a tree: a directory, an archive, a container image, or an open Tree; return what was done.

    The disk has a GPT; its last partition is the root. The target appears complete or not at all. Raises
    DiskmorphError: OptionError, TargetError (too small, exists), FormatError, UnsupportedError, SourceError.
    """
    options = options or BuildOptions()
    begun = time.monotonic()
    if options.fs != "ext4":
        raise OptionError(f"--fs {options.fs} is not written", hint="ext4 is")
    if options.layers:
        from diskmorph.convert.bridge.layers import build_layers  # noqa: PLC0415 - seldom asked for

        return build_layers(source, target, options, on_progress)
    tree = source if isinstance(source, Tree) else _open(source, options, on_progress)
    try:
        refuse_sources([Path(target)], [tree.name], tree)
        composed = composed_of(tree, options)
        plain = replace(options.convert, source_format=None)
        report = convert(composed.disk, target, options=plain, on_progress=on_progress)
        _write_triple(composed, options)
    finally:
        if tree is not source:
            tree.close()
    return replace(
        report,
        source=tree.name,
        seconds=time.monotonic() - begun,
        lost=(*report.lost, *composed.lost),
        notes=(*report.notes, *composed.boot.notes),
    )


def _open(
    source: str | os.PathLike[str], options: BuildOptions, on_progress: Callable[[Progress], None] | None
) -> Tree:
    return open_tree(
        source,
        format=options.convert.source_format,
        platform=options.platform,
        limits=options.convert.limits,
        on_fetch=fetching(on_progress),
    )


def built(tree: Tree, options: BuildOptions) -> tuple[Disk, tuple[str, ...], tuple[str, ...]]:
    """Return the disk of a tree, what a user should know, and what the disk cannot hold.

    The disk reads from the tree's sources: keep the tree open.
    """
    found = composed_of(tree, options)
    return found.disk, found.boot.notes, found.lost


def composed_of(tree: Tree, options: BuildOptions) -> Composed:
    """Return the disk of a tree with its parts; see `built`."""
    identity = Identity(seed_of(tree)) if options.convert.reproducible else Chance()
    boot = prepare(tree, options, identity)
    writer = Ext4Writer(Ext4Options(label=options.label.encode(), identity=identity))
    writer.take(tree)
    root_type = ROOT_TYPES.get(architecture(tree), ROOT_TYPES["amd64"])
    root = root_part(writer, boot, root_type, options)
    disk = assemble(root, boot, options, identity)
    return Composed(disk, root.disk, boot, (*tree.lost, *counted(writer.lost)))


def _write_triple(composed: Composed, options: BuildOptions) -> None:
    kernel, ramdisk = composed.boot.kernel, composed.boot.ramdisk
    if options.triple is None or options.convert.dry_run or kernel is None or ramdisk is None:
        return
    from diskmorph.convert.bridge.triple import write_triple  # noqa: PLC0415 - seldom asked for

    write_triple(options.triple, composed.root, kernel, ramdisk, options)


def prepare(tree: Tree, options: BuildOptions, identity: Identity) -> Boot:
    """Put into the tree what booting needs and return the rest; nothing for `--boot none`."""
    if not options.boot and options.triple is None:
        return Boot()
    from diskmorph.convert.bridge.boot import prepare_boot  # noqa: PLC0415 - a plain disk needs none of it

    return prepare_boot(tree, options, identity)


def assemble(root: Part, boot: Boot, options: BuildOptions, identity: Identity) -> Disk:
    """Return the whole disk in the size asked for."""
    _, profile = applied(options.convert)
    total = size_of([*boot.parts, root]) if options.size.total is None else options.size.total
    return compose([*boot.parts, root], padded(total, profile), identity, boot.mbr_code)


def root_part(
    writer: Ext4Writer, boot: Boot, root_type: str, options: BuildOptions, state: State | None = None
) -> Part:
    """Return the root partition: of a state of a growing tree, or of the tree last taken. Raises TargetError."""
    if options.size.total is None:
        return Part("root", root_type, writer.disk(None, slack=options.size.slack, state=state))
    _, profile = applied(options.convert)
    room = room_for_last(padded(options.size.total, profile), boot.parts)
    try:
        if room < _LEAST_ROOT:
            raise TargetError("no room for a root file system")
        return Part("root", root_type, writer.disk(room, state=state))
    except TargetError as error:
        raise TargetError(
            f"a disk of {options.size.total} bytes is too small for the tree: {error.problem}",
            expected=error.expected,
            hint="ask for more with --size, or for the least with --size min",
        ) from error


class Chance(Identity):
    """Identifiers by chance, but the same for the same label within one build; the time is now."""

    def __init__(self) -> None:
        super().__init__(os.urandom(32))

    @property
    def reproducible(self) -> bool:
        """See Identity."""
        return False

    def time(self) -> float:
        """See Identity."""
        return self._now


def counted(lost: list[str]) -> list[str]:
    """Return losses, each said once with how often it came."""
    found: dict[str, int] = {}
    for what in lost:
        found[what] = found.get(what, 0) + 1
    return [what if count == 1 else f"{what} ({count} times)" for what, count in found.items()]
