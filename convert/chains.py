"""`--keep-chain`: a chain of overlays becomes a chain in the target's format, each layer a file of its own.

Layers are written from the base up. A layer's file holds what differs between the disk as that layer shows it and the
disk as the layer below shows it, so that a coarser target is filled from the parent and nothing depends on the grids of
the formats. The names that say which parent is the right one (CID, UUIDs, locators) come from the files just written.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.job import perform
from diskmorph.convert.opening import Opened, open_asked
from diskmorph.convert.options import ConvertOptions, ConvertReport, Moved, Progress
from diskmorph.convert.plan import STDOUT, clear_text, make_plan, target_format
from diskmorph.convert.targets import applied
from diskmorph.formats.errors import OptionError, UnsupportedError
from diskmorph.formats.policy import Parents
from diskmorph.formats.views import Overlay, grown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskmorph.formats.bitmaps import DirtyBitmap
    from diskmorph.formats.disk import Disk, ImageDisk, Snapshot

    OnProgress = Callable[[Progress], None] | None

CHAINING = ("qcow2", "vmdk", "vdi", "vhd", "vhdx")
"""Formats whose images may have parents."""
SAME_SIZE = frozenset({"vmdk", "vdi", "vhd", "vhdx"})
"""Those whose parents must be as large as their children."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer to be: the disk as it shows it, and what it was in the source."""

    disk: Disk
    what: str
    bitmaps: tuple[DirtyBitmap, ...] = ()
    """The dirty bitmaps that its file holds, where the target can hold them too."""


def keep_chain(
    source: str | os.PathLike[str] | Disk,
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: OnProgress = None,
) -> ConvertReport:
    """Convert a chain of overlays and internal snapshots, the base first; `target` is the top's name.

    The others lie beside it as NAME-0 (the base), NAME-1, ...; the top appears last. What was written is removed on
    failure. In the report bytes and stored sizes are those of all files, the virtual size is the top's. Raises
    OptionError (a format without parents), and what `convert` raises.
    """
    begun = time.monotonic()
    options = options or ConvertOptions()
    name = os.fspath(target)
    entry = target_format(name, applied(options, name)[0])
    _refuse(name, entry.name, options)
    with contextlib.ExitStack() as stack:
        opened = _open(source, options)
        stack.callback(opened.close)
        layers, lost = _layers(opened, entry.name, options, stack)
        if entry.name in SAME_SIZE:
            most = max(layer.disk.size for layer in layers)
            layers = [replace(layer, disk=grown(layer.disk, most)) for layer in layers]
        paths = _names(Path(target), len(layers))
        for path in paths:
            opened.refuse_to_write(path)
        reports = _write(layers, paths, entry.name, options, on_progress)
    notes = [f"{path.name} holds {layer.what}" for path, layer in zip(paths, layers, strict=True)]
    return replace(
        reports[-1],
        source=opened.name,
        stored_size=sum(report.stored_size for report in reports),
        bytes=_sum(reports),
        seconds=time.monotonic() - begun,
        lost=(*lost, *dict.fromkeys(loss for report in reports for loss in report.lost)),
        notes=(*notes, *dict.fromkeys(note for report in reports for note in report.notes)),
        members=tuple(member for report in reversed(reports) for member in report.members),
    )


def _refuse(name: str, format: str, options: ConvertOptions) -> None:
    if name == STDOUT or options.device:
        raise OptionError("--keep-chain writes several files: neither to a pipe nor to a device")
    if format not in CHAINING:
        raise OptionError(f"{format} has no parents, so that it cannot keep a chain", hint=f"use {', '.join(CHAINING)}")
    words = {"-B": options.base, "--size": options.size, "--snapshot": options.snapshot}
    for word, value in words.items():
        if value is not None:
            raise OptionError(f"{word} does not go with --keep-chain")


def _open(source: str | os.PathLike[str] | Disk, options: ConvertOptions) -> Opened:
    opened = open_asked(source, options)
    if not opened.layers:
        opened.close()
        raise UnsupportedError("is no image with layers", feature="--keep-chain", file=opened.name)
    return opened


def _layers(
    opened: Opened, format: str, options: ConvertOptions, stack: contextlib.ExitStack
) -> tuple[list[Layer], list[str]]:
    """Return the layers from the base up, internal snapshots of the top by their age, and what is lost."""
    encrypted = "encrypt.format" in options.format_options
    lost = clear_text(opened.layers, encrypted=encrypted)
    found: list[Layer] = []
    whole: Disk = opened.layers[-1]
    for number, layer in enumerate(reversed(opened.layers)):
        whole = layer if not number else Overlay(layer, whole)
        bitmaps, gone = _bitmaps(layer, format)
        lost += [f"dirty bitmap {name} of {layer.name}" for name in gone]
        if layer is not opened.layers[0]:
            found.append(Layer(whole, layer.name, bitmaps))
            lost += [f"internal snapshot {one.name or one.id} of {layer.name}" for one in layer.info.snapshots]
    for snapshot in sorted(opened.layers[0].info.snapshots, key=lambda one: one.created or 0.0):
        found.append(
            Layer(_snapshot(opened.name, snapshot, options, stack), f"snapshot {snapshot.name or snapshot.id}")
        )
        if snapshot.vm_state_size:
            lost.append(f"the state of the virtual machine in snapshot {snapshot.name or snapshot.id}")
    found.append(Layer(whole, opened.name, bitmaps))
    return found, lost


def _bitmaps(layer: ImageDisk, format: str) -> tuple[tuple[DirtyBitmap, ...], list[str]]:
    """Return the dirty bitmaps that go with a layer into its new file, and the names of those that do not."""
    kept = layer.dirty_bitmaps if layer.info.format == format else ()
    names = {bitmap.name for bitmap in kept}
    return tuple(kept), [name for name in layer.info.bitmaps if name not in names]


def _snapshot(name: str, snapshot: Snapshot, options: ConvertOptions, stack: contextlib.ExitStack) -> Disk:
    opened = open_asked(name, replace(options, snapshot=snapshot.id or snapshot.name, disk=None))
    stack.callback(opened.close)
    return opened.disk


def _names(target: Path, count: int) -> list[Path]:
    """Return the paths from the base up."""
    return [*(target.with_name(f"{target.stem}-{number}{target.suffix}") for number in range(count - 1)), target]


def _write(
    layers: Sequence[Layer], paths: Sequence[Path], format: str, options: ConvertOptions, on_progress: OnProgress
) -> list[ConvertReport]:
    """Write the layers one by one; on failure remove those that are new."""
    folder = paths[-1].parent
    passphrase = options.target_passphrase or options.parents.passphrase
    parents = Parents((*options.parents.allow, folder), None, options.parents.shared, passphrase)
    plain = replace(options, target_format=format, parents=parents, source_format=None, disk=None)
    total = sum(layer.disk.size for layer in layers)
    reports: list[ConvertReport] = []
    fresh: list[Path] = []
    try:
        for number, (layer, path) in enumerate(zip(layers, paths, strict=True)):
            below = None if not number else layers[number - 1].disk
            tell = _shifted(on_progress, sum(one.disk.size for one in layers[:number]), total)
            if options.dry_run:
                reports.append(_measured(layer, path, below, plain, tell))
                continue
            new = not os.path.lexists(path)
            words = plain if below is None else replace(plain, base=paths[number - 1], base_format=format)
            with make_plan(layer.disk, path, words, layer.bitmaps) as plan:
                reports.append(perform(plan, tell, against=below))
            if new:
                fresh += [folder / member for member in reports[-1].members]
    except BaseException:
        for path in fresh:
            path.unlink(missing_ok=True)
        raise
    return reports


def _measured(layer: Layer, path: Path, below: Disk | None, options: ConvertOptions, tell: OnProgress) -> ConvertReport:
    """Return what writing a layer would do; its parent is not there, so that another image of nothing stands for it."""
    if below is None:
        with make_plan(layer.disk, path, options, layer.bitmaps) as plan:
            return perform(plan, tell)
    from tempfile import TemporaryDirectory  # noqa: PLC0415 - dry runs of chains only

    from diskmorph.convert.create import create  # noqa: PLC0415

    with TemporaryDirectory(prefix="diskmorph-") as folder:
        stand_in = Path(folder) / f"parent{path.suffix}"
        own = ConvertOptions(target_format=options.target_format, sync=False)
        create(stand_in, below.size, options=own)
        words = replace(options, base=stand_in, base_format=options.target_format)
        with make_plan(layer.disk, path, words, layer.bitmaps) as plan:
            return perform(plan, tell, against=below)


def _shifted(on_progress: OnProgress, done: int, total: int) -> OnProgress:
    if on_progress is None:
        return None
    return lambda progress: on_progress(Progress(progress.phase, done + progress.done, total))


def _sum(reports: Sequence[ConvertReport]) -> Moved:
    moved = Moved()
    for report in reports:
        for word in ("cloned", "copied", "encoded", "passed", "skipped"):
            setattr(moved, word, getattr(moved, word) + getattr(report.bytes, word))
    return moved
