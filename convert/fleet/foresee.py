"""What a run would do, row by row, before anything runs: bytes, sizes, losses, and what would fail.

By default only headers and tables are read: `stored_size` is then the most that the target can take. With `exact` every
source is read as a conversion would read it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from diskmorph.convert.fleet.identity import token_of
from diskmorph.convert.fleet.perform import worker_options
from diskmorph.convert.fleet.places import ABSENT, OURS, path_of, standing
from diskmorph.convert.fleet.rows import Row, RunOptions, SnapshotOptions, fault_of
from diskmorph.formats.allocator import RUN
from diskmorph.formats.errors import TargetError
from diskmorph.formats.extents import DATA, PLAIN
from diskmorph.formats.remote import is_url

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from diskmorph.convert.bridge.options import BuildOptions, ExtractOptions
    from diskmorph.convert.options import ConvertOptions, ConvertReport
    from diskmorph.formats.allocator import Allocator
    from diskmorph.formats.disk import Disk

DO, SKIP, FAIL = "do", "skip", "fail"
_UNITS = 1 << 16
_BLOCK = 512 << 10


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What would become of a row: `will` is "do", "skip" or "fail". Sizes in bytes, None where they are not known.

    `bytes`: data of the disk that would be read; `stored_size`: what the target would take, `exact` or at the most.
    """

    number: int
    verb: str
    source: str
    target: str | None
    will: str
    format: str | None = None
    bytes: int | None = None
    virtual_size: int | None = None
    stored_size: int | None = None
    exact: bool = False
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the object of `fleet plan --json`."""
        said = asdict(self)
        return {"row": said.pop("number"), **said, "lost": list(self.lost), "notes": list(self.notes)}


def foresee(row: Row, run: RunOptions, exact: bool = False) -> Foreseen:
    """Return what would become of a row; never raises but for what ends the process."""
    blank = Foreseen(row.number, row.verb, row.source, row.target, FAIL)
    if row.error is not None:
        return replace(blank, error=dict(row.error))
    try:
        return _foreseen(row, run, blank, exact)
    except Exception as error:  # noqa: BLE001 - whatever it is, the row would fail by it
        return replace(blank, error=fault_of(error))


def _foreseen(row: Row, run: RunOptions, blank: Foreseen, exact: bool) -> Foreseen:
    token = token_of(row)
    if row.verb == "aws upload":
        return _snapshot(row, token, blank)
    target = cast("str", row.target)
    options = cast("ConvertOptions", getattr(row.options, "convert", row.options))
    now = standing(target, token)
    if now.state == OURS:
        return replace(blank, will=SKIP, virtual_size=(now.report or {}).get("virtual_size"))
    if now.state != ABSENT and not options.force:
        raise TargetError("exists already, and is not this row's work", file=target, hint="replace it with --force")
    _require_place(target)
    if row.verb == "convert" and not exact and _is_plain(row, options):
        return _from_tables(row, options, blank)
    return _from_dry_run(row, run, blank)


def _require_place(target: str) -> None:
    """Raise TargetError where the target's folder, or bucket, is not there or not writable."""
    if target.startswith("s3://"):
        _require_bucket(target)
        return
    folder = path_of(target).parent
    if not folder.is_dir():
        raise TargetError("the target's folder does not exist", file=str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TargetError("the target's folder is not writable", file=str(folder))


def _require_bucket(target: str) -> None:
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - an extra, and heavy

    from diskmorph.formats.remote.s3 import client, split  # noqa: PLC0415

    try:
        client().head_bucket(Bucket=split(target)[0])
    except (ClientError, BotoCoreError) as error:
        raise TargetError(f"s3:head_bucket is refused: {error}", file=target) from error


# --- conversions of disks, by their tables


def _is_plain(row: Row, options: ConvertOptions) -> bool:
    """Return whether a row goes through the pipeline for disks, and nothing round it."""
    from diskmorph.convert.job import convert  # noqa: PLC0415
    from diskmorph.convert.routes import converter  # noqa: PLC0415

    target = cast("str", row.target)
    name = target.rpartition("/")[2] if is_url(target) else target
    return converter(row.source, name, options) is convert


def _from_tables(row: Row, options: ConvertOptions, blank: Foreseen) -> Foreseen:
    from diskmorph.convert.plan import make_plan  # noqa: PLC0415

    with make_plan(row.source, cast("str", row.target), options) as plan:
        return replace(
            blank,
            will=DO,
            format=plan.format.name,
            bytes=data_bytes(plan.disk),
            virtual_size=plan.disk.size,
            stored_size=most_stored(plan.allocator, plan.disk),
            lost=plan.lost,
            notes=plan.notes,
        )


def data_bytes(disk: Disk) -> int:
    """Return how many bytes of a disk are data, by its tables."""
    return sum(int(batch["length"][batch["kind"] == DATA].sum()) for batch in disk.extents())


def most_stored(allocator: Allocator, disk: Disk) -> int:
    """Return the most bytes that an image of the disk can take, its data being wherever its tables say; uses it up."""
    _exhaust(allocator.begin())
    if allocator.unit >= allocator.size:
        if allocator.size:
            allocator.place(_runs(allocator, np.array([0]), np.array([allocator.size])))
    else:
        at = 0
        for batch in disk.extents():
            at = _place(allocator, batch[batch["kind"] == DATA], at)
            _exhaust(allocator.settle(at))
    _exhaust(allocator.finish())
    return sum(allocator.sizes())


def _exhaust(writes: Iterable[object]) -> None:
    for _ in writes:
        pass


def _place(allocator: Allocator, rows: NDArray[np.void], at: int) -> int:
    """Place whole units that hold some of these rows, from `at` on; return where the last one ends."""
    if not len(rows):
        return at
    unit = allocator.unit
    start = rows["start"].astype(np.int64)
    stop = -(-(start + rows["length"].astype(np.int64)) // unit) * unit
    start = np.maximum(start // unit * unit, np.maximum.accumulate(np.concatenate(([at], stop[:-1]))))
    kept = start < stop
    start, stop = start[kept], np.minimum(stop[kept], allocator.size)
    for low in range(0, len(start), _UNITS):
        allocator.place(_runs(allocator, start[low : low + _UNITS], stop[low : low + _UNITS]))
    return max(at, int(stop[-1])) if len(stop) else at


def _runs(
    allocator: Allocator, start: NDArray[np.int64], stop: NDArray[np.int64]
) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Return RUN rows of data: plain ones, or where the format takes none, one a unit that does not compress."""
    if PLAIN in allocator.codecs and allocator.codec == PLAIN:
        runs = np.zeros(len(start), RUN)
        runs["start"], runs["length"] = start, stop - start
        runs["kind"], runs["codec"] = DATA, PLAIN
        return runs
    unit = allocator.unit
    counts = -(-(stop - start) // unit)
    first = np.repeat(start - np.concatenate(([0], np.cumsum(counts)[:-1])) * unit, counts)
    runs = np.zeros(int(counts.sum()), RUN)
    runs["start"] = first + np.arange(len(runs)) * unit
    runs["length"] = np.minimum(runs["start"].astype(np.int64) + unit, allocator.size) - runs["start"].astype(np.int64)
    if PLAIN in allocator.codecs:  # what does not compress is stored as it is
        runs["kind"], runs["codec"] = DATA, PLAIN
        return runs
    runs["size"] = len(allocator.frame(0, bytes(unit + unit // 1000 + 16)))
    runs["kind"], runs["codec"] = DATA, allocator.codec
    return runs


# --- everything else, by a dry run


def _from_dry_run(row: Row, run: RunOptions, blank: Foreseen) -> Foreseen:
    report = _dry(row, replace(run, digest=False))
    moved = report.bytes
    return replace(
        blank,
        will=DO,
        format=report.format,
        bytes=moved.cloned + moved.copied + moved.encoded + moved.passed,
        virtual_size=report.virtual_size,
        stored_size=report.stored_size or None,
        exact=bool(report.stored_size),
        lost=report.lost,
        notes=report.notes,
    )


def _dry(row: Row, run: RunOptions) -> ConvertReport:
    target = cast("str", row.target)
    if row.verb == "convert":
        import diskmorph  # noqa: PLC0415

        options = replace(worker_options(cast("ConvertOptions", row.options), run), dry_run=True, digest=False)
        return diskmorph.convert(row.source, target, options=options)
    if row.verb == "build":
        from diskmorph.convert.bridge import build  # noqa: PLC0415

        asked = cast("BuildOptions", row.options)
        dry = replace(worker_options(asked.convert, run), dry_run=True, digest=False)
        return build(row.source, target, options=replace(asked, convert=dry))
    from diskmorph.convert.bridge import extract  # noqa: PLC0415

    wanted = cast("ExtractOptions", row.options)
    local = Path(target).name if is_url(target) else target
    return extract(row.source, local, options=replace(wanted, convert=replace(wanted.convert, dry_run=True)))


def _snapshot(row: Row, token: str, blank: Foreseen) -> Foreseen:
    from diskmorph.convert.aws.upload import require_options, volume_gib  # noqa: PLC0415
    from diskmorph.convert.fleet.upload import made_of, opened_source  # noqa: PLC0415 - loads boto3

    options = cast("SnapshotOptions", row.options)
    require_options(options.upload)
    if made_of(token) is not None:
        return replace(blank, will=SKIP)
    with opened_source(row) as source:
        gib = volume_gib(source.disk.size, options.upload.volume_size)
        count = data_bytes(source.disk)
        return replace(
            blank,
            will=DO,
            format="ebs",
            bytes=count,
            virtual_size=source.disk.size,
            stored_size=min(-(-count // _BLOCK) * _BLOCK, gib << 30),
            notes=source.notes,
        )


# --- the whole


def shortfalls(rows: Iterable[Foreseen]) -> list[dict[str, Any]]:
    """Return the file systems without room for what would be written to them: folder, bytes needed, bytes free."""
    needed: dict[int, list[Any]] = {}
    for row in rows:
        if row.will != DO or row.target is None or is_url(row.target) or not row.stored_size:
            continue
        folder = path_of(row.target).parent
        entry = needed.setdefault(folder.stat().st_dev, [folder, 0])
        entry[1] += row.stored_size
    found = []
    for folder, total in needed.values():
        room = os.statvfs(folder)
        free = room.f_bavail * room.f_frsize
        if total > free:
            found.append({"folder": str(folder), "needed": total, "free": free})
    return found
