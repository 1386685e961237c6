"""What will be done: the source opened and given its size, the target's layout made, what is lost named."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from diskmorph.convert.guess import remarks_on_guess
from diskmorph.convert.journal import BROKEN_OFF, is_unfinished
from diskmorph.convert.opening import Opened, open_asked, open_source
from diskmorph.convert.targets import Profile, applied, changes, padded
from diskmorph.formats.allocator import Allocator, Identity, NewImage, NewParent
from diskmorph.formats.errors import FormatError, OptionError, TargetError, UnsupportedError
from diskmorph.formats.extents import DEFLATE
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.probe import FORMATS, RAW, Format, format_of_suffix
from diskmorph.formats.registry import OpenContext, identify, load, open_layer, require_format
from diskmorph.formats.remote import is_export
from diskmorph.formats.views import Slice, grown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.convert.options import ConvertOptions
    from diskmorph.convert.resume import Journal
    from diskmorph.formats.bitmaps import DirtyBitmap
    from diskmorph.formats.disk import Disk, ImageDisk

STDOUT = "-"


@dataclass(slots=True)
class Plan:
    """One conversion, ready to run: `disk` has exactly the size of the image that `allocator` lays out."""

    source: Opened
    disk: Disk
    target: str
    format: Format
    allocator: Allocator
    options: ConvertOptions
    base: Opened | None
    lost: tuple[str, ...]
    notes: tuple[str, ...]
    journal: Journal | None = None
    """What an interrupted run has done, and this one does (`--resume`)."""

    def close(self) -> None:
        """Close source and base."""
        if self.journal is not None:
            self.journal.close()
        self.source.close()
        if self.base is not None:
            self.base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_plan(
    source: str | os.PathLike[str] | Disk,
    target: str | os.PathLike[str],
    options: ConvertOptions,
    bitmaps: Sequence[DirtyBitmap] = (),
) -> Plan:
    """Open what is needed and decide everything that can be decided before bytes move; the target is not touched.

    `bitmaps`: dirty bitmaps that go with an open disk, which the target can hold.

    Raises OptionError (nothing says which format), TargetError (the size cannot be had), and what opening raises.
    """
    name = os.fspath(target)
    options, profile = applied(options, name)
    entry = target_format(name, options)
    opened = open_asked(source, options)
    base: Opened | None = None
    journal: Journal | None = None
    try:
        base = _open_base(options)
        disk = sized(opened.disk, options.size, profile)
        journal = _journal(source, opened, base, entry, disk, name, options)
        given = tuple(bitmap.name for bitmap in bitmaps)
        bitmaps = bitmaps or _bitmaps(opened, disk, entry)
        allocator = new_allocator(entry, disk, name, options, base, journal, bitmaps)
        sized_to, disk = disk.size, grown(disk, allocator.size)
        lost, notes = losses(opened, disk, entry, allocator, given, options)
        notes += _rounding(entry, sized_to, allocator.size)
        notes += _ambiguity(opened, options) + remarks_on_guess(opened, options.source_format)
        notes += changes(profile, options, name, opened.disk.size, disk.size)
        if profile is not None:
            from diskmorph.convert.cloud_facts import remarks  # noqa: PLC0415 - only with --for

            notes += remarks(profile.name, disk)
        return Plan(opened, disk, name, entry, allocator, options, base, lost, notes, journal)
    except BaseException:
        if journal is not None:
            journal.close()
        opened.close()
        if base is not None:
            base.close()
        raise


def target_format(name: str, options: ConvertOptions) -> Format:
    """Return the target's format: what was asked for, else by the name's suffix, raw for a pipe. Raises OptionError."""
    if options.target_format is not None:
        entry = require_format(options.target_format)
    elif is_export(name):
        entry = RAW
    else:
        found = RAW if name == STDOUT else format_of_suffix(name)
        if found is None:
            raise OptionError(
                f"the name {name!r} does not say which format the target shall have", hint="say -O FORMAT"
            )
        entry = found
    if not entry.writes:
        writable = ", ".join(other.name for other in (*FORMATS, RAW) if other.writes and other.kind == "disk")
        raise OptionError(f"{entry.name} is read but not written", hint=f"what is written: {writable}")
    return entry


def sized(disk: Disk, size: int | None, profile: Profile | None) -> Disk:
    """Return the disk in the size asked for. Raises TargetError where that would cut data."""
    wanted = padded(disk.size if size is None else size, profile)
    if wanted < disk.size:
        require_zero(disk, wanted)
        return Slice(disk, 0, wanted)
    return grown(disk, wanted)


def require_zero(disk: Disk, start: int) -> None:
    """Raise TargetError unless the disk reads as zeroes from `start` on."""
    from diskmorph.convert.compare import first_data  # noqa: PLC0415 - seldom needed

    found = first_data(disk, start)
    if found is not None:
        raise TargetError(
            "the source has data beyond the size asked for",
            file=disk.name,
            offset=found,
            hint="shrink the file systems and partitions on it first",
        )


def _open_base(options: ConvertOptions) -> Opened | None:
    if options.base is None:
        return None
    parents = replace(options.parents, backing=None)
    if options.keep_chain:  # what lies below is compared with elsewhere, and perhaps cannot be found by name
        return _open_alone(options.base, parents, options)
    base = open_source(options.base, format=options.base_format, parents=parents, limits=options.limits)
    if base.info is not None and "compressed_by" in base.info.features:
        base.close()
        raise UnsupportedError(
            "is compressed as one file and can be no parent", feature="compressed parents", file=base.name
        )
    return base


def _open_alone(path: Path | str, parents: Parents, options: ConvertOptions) -> Opened:
    """Open an image without its own parents."""
    opener = Opener(parents, options.limits)
    source = opener.user_source(path)
    try:
        entry = identify(source, options.base_format)[0]
        layer = open_layer(source, entry, OpenContext(opener, options.limits))
    except BaseException:
        source.close()
        raise
    return Opened(source.name, layer, entry.name, layer.info, (layer,), origins=opener.pool.origins)


def _bitmaps(opened: Opened, disk: Disk, entry: Format) -> Sequence[DirtyBitmap]:
    """Return the dirty bitmaps that the target can take over: those of the source's own format, the size being kept."""
    if opened.info is None or opened.info.format != entry.name or not opened.layers:
        return ()
    return opened.layers[0].dirty_bitmaps if opened.layers[0].size == disk.size else ()


def _journal(
    source: object,
    opened: Opened,
    base: Opened | None,
    entry: Format,
    disk: Disk,
    target: str,
    options: ConvertOptions,
) -> Journal | None:
    if not options.resume or options.dry_run:
        return None
    from diskmorph.convert.resume import Journal, facts_of, require_resumable  # noqa: PLC0415 - only with --resume

    require_resumable(source, target, options)
    return Journal(Path(target), facts_of(opened, base, entry.name, disk.size, options))


def new_allocator(
    entry: Format,
    disk: Disk,
    target: str,
    options: ConvertOptions,
    base: Opened | None,
    journal: Journal | None = None,
    bitmaps: Sequence[DirtyBitmap] = (),
) -> Allocator:
    """Return the layout of the target. Raises OptionError and TargetError (too large for the format)."""
    codec, level, words = _codec(entry, options)
    name = "disk" if target == STDOUT or is_export(target) else Path(target).name
    if not name:
        raise TargetError("is not the name of a file", file=target)
    image = NewImage(
        size=disk.size,
        name=name,
        sector_size=disk.sector_size,
        options=words,
        codec=codec,
        level=level,
        parent=_parent(target, base),
        identity=_identity(disk, options, journal),
        bitmaps=bitmaps,
        passphrase=options.target_passphrase or options.parents.passphrase,
    )
    try:
        return load(entry).new_allocator(image)
    except FormatError as error:
        raise error.located(format=entry.name) from error.__cause__


def _codec(entry: Format, options: ConvertOptions) -> tuple[int | None, int | None, dict[str, str]]:
    words = dict(options.format_options)
    if options.compress is None:
        return None, None, words
    from diskmorph.convert.codecs import parse_compress  # noqa: PLC0415 - most targets need none

    if options.compress.startswith("deflate") and words.get("compression_type") == "zstd":
        raise OptionError("compression with deflate contradicts compression_type=zstd", hint="leave one of them out")
    if entry.name == "vmdk":
        words.setdefault("subformat", "streamOptimized")
    codec, level = parse_compress(options.compress, DEFLATE)
    return codec, level, words


def _parent(target: str, base: Opened | None) -> NewParent | None:
    if base is None:
        return None
    path = Path(os.path.realpath(base.name))
    folder = Path(os.path.realpath(Path(target).parent))
    identity = base.layers[0].identity if base.layers else {}
    return NewParent(os.path.relpath(path, folder), base.format, base.disk.size, identity, path)


def _identity(disk: Disk, options: ConvertOptions, journal: Journal | None) -> Identity:
    if not options.reproducible:
        return Identity() if journal is None else journal.identity()
    from diskmorph.convert.digest import tree_digest  # noqa: PLC0415 - seldom needed

    return Identity(tree_digest(disk, threads=options.threads))


def losses(
    source: Opened,
    disk: Disk,
    entry: Format,
    allocator: Allocator,
    bitmaps: tuple[str, ...] = (),
    asked: ConvertOptions | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the target cannot hold, and what else a user should know; `bitmaps` came with an open disk.

    Of what is `asked`: beside a snapshot the others do not count, and an overlay on a base flattens nothing.
    """
    one_snapshot = asked is not None and asked.snapshot is not None
    lost: list[str] = []
    notes: list[str] = []
    info = source.info
    if info is not None and not one_snapshot:
        names = [snapshot.name or snapshot.id for snapshot in info.snapshots]
        if names:
            lost.append(f"internal snapshots: {', '.join(names)}")
        bitmaps = (*bitmaps, *info.bitmaps)
    notes.extend(info.warnings if info is not None else ())
    notes.extend(f"{name}: {BROKEN_OFF}" for name in source.every_origin().values() if is_unfinished(Path(name)))
    lost += clear_text(source.layers, encrypted=allocator.encrypted)
    gone = [name for name in bitmaps if name not in allocator.bitmaps]
    if gone:
        lost.append(f"dirty bitmaps: {', '.join(gone)}")
    if len(source.layers) > 1 and (asked is None or asked.base is None):
        below = ", ".join(layer.name for layer in source.layers[1:])
        notes.append(f"the chain of parents is flattened into one disk: {below}")
    holds = allocator.sector_size if entry.name != "raw" else 512
    if disk.sector_size != holds:
        lost.append(
            f"the logical sector size of {disk.sector_size} bytes becomes {holds}: "
            "partition tables made for the one are not found with the other"
        )
    return tuple(lost), tuple(notes)


def _rounding(entry: Format, before: int, after: int) -> tuple[str, ...]:
    if after == before:
        return ()
    return (f"the disk grows from {before} to {after} bytes, the next size that {entry.name} can have",)


def clear_text(layers: Sequence[ImageDisk], *, encrypted: bool) -> list[str]:
    """Return what is lost where what was encrypted is stored in the clear."""
    found = dict.fromkeys(str(layer.info.features["encryption"]) for layer in layers if layer.info.encrypted)
    return [] if encrypted else [f"encryption ({name}): the target holds the content in the clear" for name in found]


def _ambiguity(source: Opened, options: ConvertOptions) -> tuple[str, ...]:
    outer = [signature for signature in source.signatures if signature.outer]
    if options.source_format is not None or len(outer) < 2:
        return ()
    others = ", ".join(f"{signature.what} at {signature.offset}" for signature in outer[1:])
    return (f"{source.name} is read as {source.format}, but also has: {others}; say -f FORMAT to choose",)
