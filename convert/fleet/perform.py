"""One row, on a worker: is it done already, else do it, and tell how it ended.

What another try cannot change (a damaged image, an option that is not known, a target in the way) is a failed Result;
what it may change (the network, AWS, a full disk, a fault) is raised, and Dask's own `retries` decide.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diskmorph.convert.fleet.identity import token_of
from diskmorph.convert.fleet.places import (
    ABSENT,
    OURS,
    Standing,
    keep_report,
    mark,
    path_of,
    remove_remains,
    standing,
)
from diskmorph.convert.fleet.ranges import Split, split_of
from diskmorph.convert.fleet.rows import DONE, SKIPPED, Result, Row, RunOptions, SnapshotOptions, failed, fault_of
from diskmorph.convert.fleet.worker import Pulse, here, scratch, slot, threads
from diskmorph.formats import marks
from diskmorph.formats.errors import (
    DiskmorphError,
    FormatError,
    IntegrityError,
    OptionError,
    PolicyError,
    SourceError,
    TargetError,
    UnsupportedError,
)
from diskmorph.formats.remote import is_url

if TYPE_CHECKING:
    from diskmorph.convert.bridge.options import BuildOptions, ExtractOptions
    from diskmorph.convert.options import ConvertOptions, ConvertReport

_FINAL = (FormatError, UnsupportedError, PolicyError, OptionError, IntegrityError)
"""Another try ends the same way."""
_KEPT = ("format", "digest", "digest_of", "virtual_size", "stored_size", "seconds", "lost", "notes", "snapshot_id")
_TREES = frozenset({"directory", "oci"})
_STEP = 1 << 20


def perform(row: Row, run: RunOptions, known: dict[str, Any] | None = None) -> Result | Split:
    """Do a row and return how it ended, or how it is to be split into ranges.

    `known`: what an earlier run told of it. Raises what another try may mend.
    """
    with slot(run):
        return _held(row, run, known or {})


def _held(row: Row, run: RunOptions, known: dict[str, Any]) -> Result | Split:
    begun, started = time.monotonic(), time.time()
    try:
        done = _perform(row, run, known)
    except DiskmorphError as error:
        if not is_final(row, error):
            raise
        done = failed(row, fault_of(error), seconds=time.monotonic() - begun)
    if isinstance(done, Split):
        return done
    return replace(done, seconds=round(done.seconds or time.monotonic() - begun, 4), started=started, worker=here())


def is_final(row: Row, error: DiskmorphError) -> bool:
    """Return whether another try of the row must end in the same error."""
    if isinstance(error, _FINAL):
        return True
    if isinstance(error, SourceError):
        return not is_url(row.source)
    return isinstance(error, TargetError) and "exists" in error.problem


def _perform(row: Row, run: RunOptions, known: dict[str, Any]) -> Result | Split:
    token = token_of(row)
    if row.verb == "aws upload":
        from diskmorph.convert.fleet.upload import upload_row  # noqa: PLC0415 - loads boto3

        return upload_row(row, run, token)
    target = cast("str", row.target)
    now = standing(target, token)
    if now.state == OURS:
        return _found(row, run, token, now, known)
    if now.state != ABSENT and not _convert_options(row).force:
        raise TargetError("exists already, and is not this row's work", file=target, hint="replace it with --force")
    split = split_of(row, run, token)
    if split is not None:
        return split
    try:
        report = _marked(row, run, token)
    except TargetError:
        now = standing(target, token)  # another try of this row may have been faster
        if now.state == OURS:
            return _found(row, run, token, now, known)
        if now.state != ABSENT or not remove_remains(target, token):
            raise
        report = _marked(row, run, token)
    return told(row, run, token, report)


def told(row: Row, run: RunOptions, token: str, report: ConvertReport) -> Result:
    """Return the result of a row that was done, and let its target carry it."""
    digest, of = report.digest, "content"
    if digest is None and run.digest:
        digest, of = _file_digest(row)
    done = Result(
        row.number,
        row.verb,
        row.source,
        row.target,
        DONE,
        token=token,
        format=report.format,
        digest=digest,
        digest_of=of if digest else None,
        virtual_size=report.virtual_size,
        stored_size=report.stored_size,
        seconds=report.seconds,
        lost=report.lost,
        notes=report.notes,
    )
    kept = {key: getattr(done, key) for key in _KEPT if key not in {"lost", "notes", "snapshot_id"}}
    keep_report(cast("str", row.target), token, run.run, kept)
    return done


# --- a target that is there already


def _found(row: Row, run: RunOptions, token: str, now: Standing, known: dict[str, Any]) -> Result:
    """Return the result of a row whose target an earlier try (of this run: done) or an earlier run (skipped) made."""
    status = DONE if now.run == run.run else SKIPPED
    said = now.report or (known if known.get("token") == token else {})
    result = Result(row.number, row.verb, row.source, row.target, status, token=token)
    if not said:
        return _measured(result, row, run)
    words = {key: said[key] for key in _KEPT if said.get(key) is not None}
    for key in ("lost", "notes"):
        words[key] = tuple(words.get(key, ()))
    return replace(result, **words)


def _measured(result: Result, row: Row, run: RunOptions) -> Result:
    """Fill in what the target itself tells, where nothing else is known of it."""
    from diskmorph.convert.digest import digest as digest_disk  # noqa: PLC0415 - seldom needed
    from diskmorph.convert.opening import open_source  # noqa: PLC0415

    target = cast("str", row.target)
    stored = None if is_url(target) else _stored(path_of(target))
    if row.verb == "extract":
        hashed = _file_digest(row)[0] if run.digest else None
        return replace(result, stored_size=stored, digest=hashed, digest_of="file" if hashed else None)
    options = _convert_options(row)
    parents = replace(options.parents, backing=None)
    try:
        with open_source(target, format=options.target_format, parents=parents) as opened:
            virtual, kind = opened.disk.size, opened.format
        digest = digest_disk(target, format=kind, parents=parents, threads=1).digest if run.digest else None
    except DiskmorphError:
        return replace(result, stored_size=stored)
    of = "content" if digest else None
    return replace(result, virtual_size=virtual, format=kind, stored_size=stored, digest=digest, digest_of=of)


def _stored(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _file_digest(row: Row) -> tuple[str | None, str]:
    """Return the SHA-256 of a target that is one local file: of packages and archives, which hold no single disk."""
    import hashlib  # noqa: PLC0415

    target = cast("str", row.target)
    path = path_of(target)
    if is_url(target) or not path.is_file():
        return None, "file"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), "file"


# --- the work


def _marked(row: Row, run: RunOptions, token: str) -> ConvertReport:
    with marks.marked(mark(token, run.run)):
        return _converted(row, run)


def _convert_options(row: Row) -> ConvertOptions:
    return cast("ConvertOptions", getattr(row.options, "convert", row.options))


def _converted(row: Row, run: RunOptions) -> ConvertReport:
    tell = Pulse(row.number)
    if row.verb == "convert":
        import diskmorph  # noqa: PLC0415

        options = worker_options(cast("ConvertOptions", row.options), run)
        return diskmorph.convert(row.source, cast("str", row.target), options=options, on_progress=tell)
    if row.verb == "build":
        from diskmorph.convert.bridge import build  # noqa: PLC0415 - what is used is loaded

        build_options = cast("BuildOptions", row.options)
        build_options = replace(build_options, convert=worker_options(build_options.convert, run))
        return build(row.source, cast("str", row.target), options=build_options, on_progress=tell)
    return _extracted(row, run, tell)


def worker_options(options: ConvertOptions, run: RunOptions) -> ConvertOptions:
    """Return options as they hold on this worker: its share of the machine's cores, and the digest if it is wanted."""
    return replace(options, threads=options.threads or threads(), digest=run.digest or options.digest)


def _extracted(row: Row, run: RunOptions, tell: Pulse) -> ConvertReport:
    from diskmorph.convert.bridge import extract  # noqa: PLC0415 - what is used is loaded

    target, options = cast("str", row.target), cast("ExtractOptions", row.options)
    if not is_url(target):
        return extract(row.source, target, options=options, on_progress=tell)
    from diskmorph.formats.remote.s3 import client  # noqa: PLC0415 - an extra
    from diskmorph.formats.remote.s3_target import send_file  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="diskmorph-", dir=scratch()) as folder:
        made = Path(folder) / target.rpartition("/")[2]
        local = replace(options, convert=replace(options.convert, sync=False))
        report = extract(row.source, made, options=local, on_progress=tell)
        if report.format in _TREES:
            raise OptionError("a folder is no object in S3", file=target, hint="name it NAME.tar")
        digest = None
        if run.digest:
            digest = _file_digest(replace(row, target=os.fspath(made)))[0]
        send_file(client(), made, target, force=options.convert.force)
    return replace(report, target=target, digest=digest)


__all__ = ["SnapshotOptions", "is_final", "perform", "told", "worker_options"]
