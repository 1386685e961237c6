"""Large disks by ranges: each range a task of its own, into a target that takes ranges.

Such targets are a raw file on a path that all workers share, a raw object in S3 (parts of one multipart upload) and an
EBS snapshot (blocks). Nothing is visible until every range is there: the file has a hidden name, the upload and the
snapshot are not completed. A range may be written as often as it must, for it always holds the same bytes: each task
makes sure first that the source is still the one that the row began with.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diskmorph.convert.fleet import ranges_file, ranges_s3
from diskmorph.convert.fleet.identity import token_of
from diskmorph.convert.fleet.places import OURS, mark, standing
from diskmorph.formats import marks
from diskmorph.formats.errors import IntegrityError
from diskmorph.formats.remote import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diskmorph.convert.fleet.rows import Result, Row, RunOptions
    from diskmorph.convert.options import ConvertOptions, ConvertReport
    from diskmorph.convert.plan import Plan
    from diskmorph.formats.output import Target

FILE, OBJECT, SNAPSHOT = "file", "object", "snapshot"
_MOVED = ("cloned", "copied", "encoded", "passed", "skipped")


@dataclass(frozen=True, slots=True)
class Split:
    """How a row is cut: `ranges` (start, stop) of the disk, sizes in bytes.

    `place`: the hidden file, the upload's name, the snapshot. `begun`: seconds since 1970. `zeroes`: a snapshot gets
    zeroes that were written.
    """

    kind: str
    token: str
    place: str
    size: int
    ranges: tuple[tuple[int, int], ...]
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    begun: float = field(default_factory=time.time)
    zeroes: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A range that is written: bytes by how they moved, and what finishing has to show for it."""

    start: int
    moved: Mapping[str, int]
    proof: Any = None


def split_of(row: Row, run: RunOptions, token: str) -> Split | None:
    """Return how a row is split, its place made; None: in one piece. Raises what planning raises."""
    if run.split is None:
        return None
    if row.verb == "aws upload":
        from diskmorph.convert.fleet.ranges_ebs import begin  # noqa: PLC0415 - loads boto3

        return begin(row, run, token)
    if not _may_split(row):
        return None
    from diskmorph.convert.job import refuse_own_files  # noqa: PLC0415 - loads the pipeline
    from diskmorph.convert.plan import make_plan  # noqa: PLC0415 - loads when used

    target, options = cast("str", row.target), cast("ConvertOptions", row.options)
    with make_plan(row.source, target, options) as plan, marks.marked(mark(token, run.run)):
        size = plan.disk.size
        if plan.format.name != "raw" or size < run.split:
            return None
        refuse_own_files(plan)
        if is_url(target):
            kind, step, place = OBJECT, ranges_s3.step_of(size, run.part), ranges_s3.begin(target, force=options.force)
        else:
            reserve = options.format_options.get("preallocation", "off") != "off"
            kind, step, place = FILE, run.part, ranges_file.begin(Path(target), token, size, reserve=reserve)
        return Split(kind, token, place, size, cut(size, step), plan.lost, plan.notes)


def cut(size: int, step: int) -> tuple[tuple[int, int], ...]:
    """Return ranges of about `step` bytes, whole mebibytes, the last one shorter."""
    step = max(step >> 20, 1) << 20
    return tuple((start, min(start + step, size)) for start in range(0, size, step))


def _may_split(row: Row) -> bool:
    """Return whether a row is a plain conversion of one disk into one file or object, as far as it says."""
    target = row.target
    if row.verb != "convert" or target is None or (is_url(target) and not target.startswith("s3://")):
        return False
    from diskmorph.convert.job import convert  # noqa: PLC0415 - loads the pipeline
    from diskmorph.convert.routes import converter  # noqa: PLC0415 - loads when used

    options = cast("ConvertOptions", row.options)
    plain = options.base is None and options.compress is None and not options.verify and not options.device
    name = target.rpartition("/")[2] if is_url(target) else target
    return plain and converter(row.source, name, options) is convert


def write_range(row: Row, run: RunOptions, split: Split, start: int, stop: int) -> Piece:
    """Write one range of a row's disk.

    Raises what converting raises; IntegrityError where the source is another one by now, TargetError where the place
    is gone, for then the row has ended.
    """
    from diskmorph.convert.fleet.worker import slot  # noqa: PLC0415 - loads when used

    with slot(run):
        if token_of(row) != split.token:
            raise IntegrityError(
                "changed while it was read", file=row.source, hint="stop what writes to it and try again"
            )
        if split.kind == SNAPSHOT:
            from diskmorph.convert.fleet.ranges_ebs import write  # noqa: PLC0415 - loads boto3

            return write(row, split, start, stop)
        return _write(row, run, split, start, stop)


def _write(row: Row, run: RunOptions, split: Split, start: int, stop: int) -> Piece:
    from diskmorph.convert.copy import run as move  # noqa: PLC0415 - loads the pipeline
    from diskmorph.convert.fleet.perform import worker_options  # noqa: PLC0415 - which takes this module
    from diskmorph.convert.fleet.worker import Pulse  # noqa: PLC0415 - loads when used
    from diskmorph.convert.job import transfer_of  # noqa: PLC0415 - loads when used
    from diskmorph.convert.plan import make_plan, new_allocator  # noqa: PLC0415 - loads when used
    from diskmorph.formats.views import Slice  # noqa: PLC0415 - loads when used

    # Of the format's options there is one, preallocation; the whole file was reserved when it was made.
    options = replace(
        worker_options(cast("ConvertOptions", row.options), run), digest=False, format_options={}, target_format="raw"
    )
    with make_plan(row.source, cast("str", row.target), options) as plan:
        piece = Slice(plan.disk, start, stop - start)
        allocator = new_allocator(plan.format, piece, plan.target, options, None)
        transfer = replace(transfer_of(plan), disk=piece, allocator=allocator)
        with _place(plan, split, start, stop) as target:
            moved = move(transfer, target, None, Pulse(row.number, start))
            target.commit(allocator.sizes())
        plan.source.disk.verify_unchanged()
    proof = target.sent if isinstance(target, ranges_s3.PartsTarget) else None
    return Piece(start, {name: getattr(moved, name) for name in _MOVED}, proof)


@contextmanager
def _place(plan: Plan, split: Split, start: int, stop: int) -> Iterator[Target]:
    """Lend the target of a range."""
    if split.kind == OBJECT:
        with ranges_s3.PartsTarget(plan.target, split.place, split.size, start) as parts:
            yield parts
    else:
        with ranges_file.opened_range(Path(split.place), start, stop) as target:
            yield target


def finish_split(row: Row, run: RunOptions, split: Split, pieces: Sequence[Piece], begun: float) -> Result:
    """Let what the pieces make up appear and return the row's result; safe to be said again.

    `begun`: when the row was started, in seconds since 1970. Raises TargetError, AwsError.
    """
    from diskmorph.convert.digest import digest  # noqa: PLC0415 - loads when used
    from diskmorph.convert.fleet.perform import told  # noqa: PLC0415 - which takes this module
    from diskmorph.convert.fleet.worker import here  # noqa: PLC0415 - loads when used

    pieces = sorted(pieces, key=lambda piece: piece.start)
    if split.kind == SNAPSHOT:
        from diskmorph.convert.fleet.ranges_ebs import finish  # noqa: PLC0415 - loads boto3

        done = finish(row, run, split, pieces)
        return replace(done, seconds=round(time.time() - begun, 4), started=begun, worker=here())
    target, options = cast("str", row.target), cast("ConvertOptions", row.options)
    if standing(target, split.token).state != OURS:
        if split.kind == OBJECT:
            ranges_s3.finish(target, split.place, [piece.proof for piece in pieces], force=options.force)
        else:
            with marks.marked(mark(split.token, run.run)):
                ranges_file.finish(Path(split.place), Path(target), force=options.force, sync=options.sync)
    if split.kind == FILE:
        Path(split.place).unlink(missing_ok=True)
    content = digest(target, format="raw").digest if run.digest else None
    report = _report(row, split, summed(pieces), time.time() - begun, content)
    return replace(told(row, run, split.token, report), started=begun, worker=here(), ranges=len(split.ranges))


def _report(row: Row, split: Split, moved: dict[str, int], seconds: float, digest: str | None) -> ConvertReport:
    from diskmorph.convert.options import ConvertReport, Moved  # noqa: PLC0415 - loads when used

    target = cast("str", row.target)
    return ConvertReport(
        source=row.source,
        target=target,
        format="raw",
        virtual_size=split.size,
        stored_size=split.size,
        bytes=Moved(**moved),
        seconds=round(seconds, 4),
        verified=False,
        lost=split.lost,
        notes=split.notes,
        digest=digest,
        members=(target.rpartition("/")[2],),
    )


def abandon_split(row: Row, split: Split) -> None:
    """Remove what is there of a row that failed; a snapshot stays for the next try, or for `aws gc`."""
    if split.kind == FILE:
        Path(split.place).unlink(missing_ok=True)
    elif split.kind == OBJECT:
        ranges_s3.abandon(cast("str", row.target), split.place)


def summed(pieces: Sequence[Piece]) -> dict[str, int]:
    """Return the sum of what ranges moved."""
    return {name: sum(piece.moved.get(name, 0) for piece in pieces) for name in _MOVED}
