"""`--also DST2`: further targets of one conversion, with one read of the source.

They are made from the first target, which was just written and holds the same content: what is slow or far away is read
once. Each appears whole or not at all; a failure leaves those that are complete.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.opening import open_asked, origin_of, refuse_same
from diskmorph.convert.options import ConvertOptions, ConvertReport
from diskmorph.convert.plan import make_plan, target_format
from diskmorph.convert.targets import applied
from diskmorph.formats.disk import Disk
from diskmorph.formats.errors import DiskmorphError, OptionError, TargetError
from diskmorph.formats.policy import Parents
from diskmorph.formats.remote import is_url
from diskmorph.formats.tree_names import split_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diskmorph.convert.options import Progress
    from diskmorph.convert.routes import Converter
    from diskmorph.formats.probe import Format


def convert_also(
    source: str | os.PathLike[str] | Disk | Sequence[str | os.PathLike[str] | Disk],
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Convert, then write `options.also`, whose formats their suffixes say; their reports are `ConvertReport.also`.

    Further targets of the first one's format take its options and compression too; others say in their notes what they
    do not take. All are looked at before anything is written. Raises OptionError (the first target cannot be read
    again), and what `convert` raises.
    """
    from diskmorph.convert.routes import converter  # noqa: PLC0415 - which takes this module

    options = options or ConvertOptions()
    if os.fspath(target) == "-" or options.device:
        raise OptionError("--also reads the first target again: it must be a file that is written")
    names = [os.path.realpath(name) for name in (target, *options.also)]
    if len(set(names)) < len(names):
        raise OptionError("--also needs a name of its own for every target")
    _refuse_sources([source] if isinstance(source, str | os.PathLike | Disk) else source, options)
    first = replace(options, also=())
    further = [_further(source, target, name, first) for name in options.also]
    report = converter(source, target, first)(source, target, options=first, on_progress=on_progress)
    others: list[ConvertReport] = []
    for one in further:
        try:
            other = one.convert(one.source, one.name, options=one.options, on_progress=on_progress)
        except DiskmorphError as error:
            if not options.dry_run:
                error.hint = f"{error.hint}; " if error.hint else ""
                error.hint += f"{os.fspath(target)} is complete"
            raise
        others.append(replace(other, notes=(*one.notes, *other.notes)))
    return replace(report, also=tuple(others))


@dataclass(frozen=True, slots=True)
class _Further:
    """A further target: what it is made from and by, and what is said of it."""

    source: str | os.PathLike[str] | Disk | Sequence[str | os.PathLike[str] | Disk]
    name: str
    convert: Converter
    options: ConvertOptions
    notes: tuple[str, ...]


def _further(
    source: str | os.PathLike[str] | Disk | Sequence[str | os.PathLike[str] | Disk],
    target: str | os.PathLike[str],
    name: str,
    first: ConvertOptions,
) -> _Further:
    """Decide how a further target is made. Raises OptionError and TargetError for one that cannot be."""
    from diskmorph.convert.job import convert as convert_disk  # noqa: PLC0415 - loads the pipeline
    from diskmorph.convert.routes import converter  # noqa: PLC0415 - which takes this module

    same = _is_of_one_format(target, name, first)
    again = _again(target, first, same=same)
    if first.dry_run:
        again = _foretold(source, again, first)
    else:
        plain = converter(source, target, first) is convert_disk
        again = replace(again, source_format=_format(target, first).name if plain else None)
    _require_free(name, again)
    made_from = source if first.dry_run else target
    convert = converter(made_from, name, again)
    if convert is convert_disk:
        entry = _format(name, again)
        if isinstance(source, str | os.PathLike | Disk):
            _require_possible(source, name, replace(again, target_format=entry.name), first)
    return _Further(made_from, name, convert, again, _notes(name, first, same=same))


def _is_of_one_format(target: str | os.PathLike[str], name: str, first: ConvertOptions) -> bool:
    """Say whether a further target has the first one's format, for which its options were said."""
    try:
        return target_format(name, ConvertOptions()) is _format(target, first)
    except OptionError:
        return False


def _format(target: str | os.PathLike[str], options: ConvertOptions) -> Format:
    name = os.fspath(target)
    return target_format(name, applied(options, name)[0])


def _again(target: str | os.PathLike[str], first: ConvertOptions, *, same: bool) -> ConvertOptions:
    """Return the options of a further target, which is made from the first."""
    opens = first.target_passphrase or first.parents.passphrase
    return ConvertOptions(
        format_options=first.format_options if same else {},
        compress=first.compress if same else None,
        profile=first.profile if same else None,
        target_passphrase=opens,
        zero_unit=first.zero_unit,
        digest=first.digest,
        verify=first.verify,
        reproducible=first.reproducible,
        sync=first.sync,
        force=first.force,
        dry_run=first.dry_run,
        threads=first.threads,
        rate=first.rate,
        limits=first.limits,
        parents=Parents((*first.parents.allow, Path(target).parent), _backing(first), passphrase=opens),
    )


def _foretold(source: object, again: ConvertOptions, first: ConvertOptions) -> ConvertOptions:
    """Return the options of a further target of a dry run, which is foretold from the source: there is nothing else."""
    if source == "-":
        raise OptionError("--dry-run with --also reads the source again, which standard input does not allow")
    return _of_source(again, first)


def _of_source(again: ConvertOptions, first: ConvertOptions) -> ConvertOptions:
    return replace(
        again,
        source_format=first.source_format,
        snapshot=first.snapshot,
        disk=first.disk,
        size=first.size,
        parents=first.parents,
    )


def _require_free(name: str, options: ConvertOptions) -> None:
    """Raise TargetError for a name that exists, or whose folder does not."""
    if is_url(name) or Path(name).is_dir():
        return
    if os.path.lexists(name) and not options.force:
        raise TargetError("exists already", file=name, hint="replace it with --force")
    if not Path(split_prefix(name)[1]).absolute().parent.is_dir():
        raise TargetError("its folder does not exist", file=name, hint="make it first")


def _require_possible(
    source: str | os.PathLike[str] | Disk, name: str, again: ConvertOptions, first: ConvertOptions
) -> None:
    """Plan a further target, so that what it cannot hold shows before anything is written."""
    if isinstance(source, str) and (source == "-" or is_url(source)):  # read once
        return
    with make_plan(source, name, replace(_of_source(again, first), reproducible=False, dry_run=True)):
        pass


def _notes(name: str, first: ConvertOptions, *, same: bool) -> tuple[str, ...]:
    """Return what was asked of the first target and does not go for this one."""
    words = {"-c": first.compress, "-o": first.format_options, "--for": first.profile}
    said = [] if same else [word for word, value in words.items() if value]
    notes = [f"{name} is of another format: {', '.join(said)} is for the first target"] if said else []
    if first.base is not None:
        notes.append(f"{name} is no overlay: -B is for the first target")
    return tuple(notes)


def _refuse_sources(sources: Sequence[str | os.PathLike[str] | Disk], options: ConvertOptions) -> None:
    """Raise TargetError where a further target is one of the files that the first is made from."""
    taken = [Path(name) for name in options.also if os.path.lexists(name)]
    for source in sources if taken else ():
        if source == "-" or (isinstance(source, str) and is_url(source)):
            continue
        origins = _origins(source, options)
        for path in taken:
            refuse_same(path, origins)


def _origins(source: str | os.PathLike[str] | Disk, options: ConvertOptions) -> Mapping[tuple[int, int], str]:
    try:
        with open_asked(source, options) as opened:
            return opened.every_origin()
    except DiskmorphError:  # a package of several disks, a tree, or a conversion that fails and says why
        return {} if isinstance(source, Disk) else origin_of(source)


def _backing(options: ConvertOptions) -> Path | None:
    return None if options.base is None else Path(options.base)
