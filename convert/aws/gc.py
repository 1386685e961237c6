"""`aws gc`: what jobs that died left behind, found by its tag; nothing else is ever touched."""

from __future__ import annotations

import datetime as dt
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diskmorph.convert.aws.faults import AwsError
from diskmorph.convert.aws.undo import (
    FINISHED,
    IMAGE,
    JOB,
    OBJECT,
    SNAPSHOT,
    STATE,
    TASK,
    UPLOAD,
    Thing,
    remove,
    tagged,
    tags_of,
)
from diskmorph.formats.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.convert.aws.session import Session

PREFIX = "diskmorph/"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_KEY = re.compile(r"diskmorph/(\d{8}-[0-9a-f]{16})/[^/]+")


def parse_age(text: str) -> float:
    """Return seconds of `12h`, `3d` or `0`; a number alone is days. Raises OptionError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text.strip().lower())
    if match is None:
        raise OptionError(f"--older-than {text} is not a time", hint="such as 12h or 3d; a number is days")
    return float(match[1]) * _UNITS[match[2] or "d"]


@dataclass(slots=True)
class Collected:
    """What was removed (or would be), what was kept and why, what could not be removed and why."""

    dry_run: bool
    removed: list[Thing] = field(default_factory=list)
    kept: list[tuple[Thing, str]] = field(default_factory=list)
    failed: list[tuple[Thing, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return what `aws gc --json` shows."""
        return {
            "dry_run": self.dry_run,
            "removed": [thing.as_dict() for thing in self.removed],
            "kept": [{**thing.as_dict(), "why": why} for thing, why in self.kept],
            "failed": [{**thing.as_dict(), "why": why} for thing, why in self.failed],
        }

    def lines(self) -> Iterator[str]:
        """Yield the same for people."""
        word = "would be removed" if self.dry_run else "removed"
        for thing in self.removed:
            yield f"{word}: {thing.kind} {thing.id} in {thing.region}, job {thing.job}"
        for thing, why in self.failed:
            yield f"not removed: {thing.kind} {thing.id} in {thing.region}: {why}"
        unfinished = [(thing, why) for thing, why in self.kept if why != FINISHED]
        for thing, why in unfinished:
            yield f"kept: {thing.kind} {thing.id} in {thing.region}, job {thing.job}: {why}"
        if not self.removed and not self.failed and not unfinished:
            yield "nothing was left behind"


def gc(session: Session, age: float, *, bucket: str | None = None, dry_run: bool = False) -> Collected:
    """Remove tagged things that are not marked finished and older than `age` seconds, in all enabled regions.

    Objects and multipart uploads only in `bucket`, under diskmorph/JOB/. Raises AwsError where even looking is denied
    in the session's own region.
    """
    found = Collected(dry_run)
    limit = time.time() - age
    active = _active_jobs(session)
    for thing, row in _everywhere(session):
        _judge(found, thing, _made_at(row), limit, finished=tags_of(row).get(STATE) == FINISHED, active=active)
    if bucket is not None:
        for thing, at in _in_bucket(session, bucket):
            _judge(found, thing, at, limit, finished=False, active=active)
    if not dry_run:
        _remove(session, found)
    return found


def _judge(found: Collected, thing: Thing, at: float, limit: float, *, finished: bool, active: set[str]) -> None:
    if finished:
        found.kept.append((thing, FINISHED))
    elif thing.job in active:
        found.kept.append((thing, "its import task is still running"))
    elif at > limit:
        found.kept.append((thing, "younger than --older-than"))
    else:
        found.removed.append(thing)


def _remove(session: Session, found: Collected) -> None:
    """Remove what was found: images before the snapshots that they use."""
    wanted, found.removed = found.removed, []
    order = (TASK, IMAGE, SNAPSHOT, UPLOAD, OBJECT)
    for thing in sorted(wanted, key=lambda thing: order.index(thing.kind)):
        try:
            remove(session, thing)
            found.removed.append(thing)
        except AwsError as error:
            if error.code == "InvalidSnapshot.InUse":
                found.kept.append((thing, "an image uses it"))
            else:
                found.failed.append((thing, error.problem))


def _everywhere(session: Session) -> Iterator[tuple[Thing, Any]]:
    """Yield tagged things of all regions; those in which looking is not allowed are passed over."""
    answer = session.known("ec2:DescribeRegions")
    others = [str(row["RegionName"]) for row in (answer or {}).get("Regions", ())]
    regions = [region for region in dict.fromkeys(others) if region != session.region]

    def look(region: str) -> list[tuple[Thing, Any]]:
        try:
            return list(tagged(session, region))
        except AwsError:
            return []

    yield from tagged(session, session.region)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(look, regions):
            yield from found


def _made_at(row: Any) -> float:
    at = row.get("StartTime") or row.get("CreationDate")
    if isinstance(at, str):
        at = dt.datetime.fromisoformat(at)
    return at.timestamp() if at is not None else 0.0


def _active_jobs(session: Session) -> set[str]:
    """Return the jobs whose import tasks are under way."""
    jobs = set()
    for action, key in (
        ("ec2:DescribeImportSnapshotTasks", "ImportSnapshotTasks"),
        ("ec2:DescribeImportImageTasks", "ImportImageTasks"),
    ):
        for task in (session.known(action) or {}).get(key, ()):
            status = task.get("Status") or (task.get("SnapshotTaskDetail") or {}).get("Status")
            job = tags_of(task).get(JOB)
            if job and status in {"active", "pending"}:
                jobs.add(job)
    return jobs


def _in_bucket(session: Session, bucket: str) -> Iterator[tuple[Thing, float]]:
    """Yield objects and multipart uploads of ours in a bucket, and when they were begun."""
    token: dict[str, Any] = {}
    while True:
        answer = session.call("s3:ListObjectsV2", Bucket=bucket, Prefix=PREFIX, **token)
        for row in answer.get("Contents", ()):
            thing = _thing_of(session, OBJECT, bucket, row["Key"])
            if thing is not None:
                yield thing, row["LastModified"].timestamp()
        if not answer.get("IsTruncated"):
            break
        token = {"ContinuationToken": answer["NextContinuationToken"]}
    token = {}
    while True:
        answer = session.call("s3:ListMultipartUploads", Bucket=bucket, Prefix=PREFIX, **token)
        for row in answer.get("Uploads", ()):
            thing = _thing_of(session, UPLOAD, bucket, row["Key"], row["UploadId"])
            if thing is not None:
                yield thing, row["Initiated"].timestamp()
        if not answer.get("IsTruncated"):
            return
        token = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}


def _thing_of(session: Session, kind: str, bucket: str, key: str, extra: str = "") -> Thing | None:
    match = _KEY.fullmatch(key)
    return None if match is None else Thing(kind, f"{bucket}/{key}", session.region, match[1], extra)
