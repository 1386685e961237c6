"""`--also DST2`: further targets of one conversion, with one read of the source.

They are made from the first target, which was just written and holds the same content: what is slow or far away is read
once. Each appears whole or not at all; a failure leaves those that are complete.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.opening import Opened, open_source
from diskmorph.convert.options import ConvertOptions, ConvertReport
from diskmorph.formats.disk import Disk
from diskmorph.formats.errors import DiskmorphError, OptionError
from diskmorph.formats.policy import Parents
from diskmorph.formats.remote import is_url
from diskmorph.formats.views import Zero

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diskmorph.convert.options import Progress


def convert_also(
    source: str | os.PathLike[str] | Disk | Sequence[str | os.PathLike[str] | Disk],
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Convert, then write `options.also`, whose formats their suffixes say; their reports are `ConvertReport.also`.

    Raises OptionError (the first target cannot be read again), and what `convert` raises.
    """
    from diskmorph.convert.routes import converter  # noqa: PLC0415 - which takes this module

    options = options or ConvertOptions()
    if os.fspath(target) == "-" or options.device or options.dry_run:
        raise OptionError("--also reads the first target again: it must be a file that is written")
    names = [os.path.realpath(name) for name in (target, *options.also)]
    if len(set(names)) < len(names):
        raise OptionError("--also needs a name of its own for every target")
    _refuse_sources([source] if isinstance(source, str | os.PathLike | Disk) else source, options)
    first = replace(options, also=())
    report = converter(source, target, first)(source, target, options=first, on_progress=on_progress)
    again = ConvertOptions(
        size=None,
        zero_unit=options.zero_unit,
        digest=options.digest,
        verify=options.verify,
        reproducible=options.reproducible,
        sync=options.sync,
        force=options.force,
        threads=options.threads,
        rate=options.rate,
        limits=options.limits,
        parents=Parents((*options.parents.allow, Path(target).parent), _backing(options)),
    )
    others: list[ConvertReport] = []
    for name in options.also:
        try:
            convert = converter(target, name, again)
            others.append(convert(target, name, options=again, on_progress=on_progress))
        except DiskmorphError as error:
            error.hint = f"{error.hint}; " if error.hint else ""
            error.hint += f"{os.fspath(target)} is complete"
            raise
    return replace(report, also=tuple(others))


def _refuse_sources(sources: Sequence[str | os.PathLike[str] | Disk], options: ConvertOptions) -> None:
    """Raise TargetError where a further target is one of the files that the first is made from."""
    taken = [Path(name) for name in options.also if os.path.lexists(name)]
    for source in sources if taken else ():
        if source == "-" or (isinstance(source, str) and is_url(source)):
            continue
        try:
            opened = _opened(source, options)
        except DiskmorphError:  # a package of several disks, a tree, or a conversion that fails and says why
            opened = Opened(str(source), Zero(0), "", origins=_itself(source))
        with opened:
            for path in taken:
                opened.refuse_to_write(path)


def _itself(source: object) -> Mapping[tuple[int, int], str]:
    try:
        status = Path(str(source)).stat()
    except OSError:
        return {}
    return {(status.st_dev, status.st_ino): str(source)}


def _opened(source: str | os.PathLike[str] | Disk, options: ConvertOptions) -> Opened:
    return open_source(
        source,
        format=options.source_format,
        parents=options.parents,
        limits=options.limits,
        snapshot=options.snapshot,
        disk=options.disk,
    )


def _backing(options: ConvertOptions) -> Path | None:
    return None if options.base is None else Path(options.base)
