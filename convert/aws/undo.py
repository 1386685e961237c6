"""What a job has made in the account, and how each kind of thing is removed again."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from diskmorph.convert.aws.faults import AwsError
from diskmorph.convert.aws.session import SHORT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.convert.aws.session import Session

JOB, STATE = "diskmorph:job", "diskmorph:state"
FINISHED, WORKING = "finished", "working"

SNAPSHOT, IMAGE, TASK, OBJECT, UPLOAD = "snapshot", "image", "import task", "object", "multipart upload"
_GONE = frozenset(
    {
        "InvalidSnapshot.NotFound",
        "InvalidAMIID.NotFound",
        "InvalidAMIID.Unavailable",
        "InvalidConversionTaskId",
        "NoSuchUpload",
        "NoSuchKey",
        "ResourceNotFoundException",
    }
)


class Thing(NamedTuple):
    """One thing in the account. `id` of an object is BUCKET/KEY; `extra` the id of a multipart upload."""

    kind: str
    id: str
    region: str
    job: str | None = None
    extra: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what `aws gc --json` shows."""
        return {"kind": self.kind, "id": self.id, "region": self.region, "job": self.job}


def remove(session: Session, thing: Thing) -> None:
    """Remove a thing; one that is gone already is fine. Raises AwsError."""
    try:
        _REMOVERS[thing.kind](session, thing)
    except AwsError as error:
        if error.code not in _GONE:
            raise


def _snapshot(session: Session, thing: Thing) -> None:
    for attempt in range(4):
        try:
            session.call("ec2:DeleteSnapshot", region=thing.region, patience=SHORT, SnapshotId=thing.id)
        except AwsError as error:
            if error.code != "InvalidSnapshot.InUse" or attempt == 3:
                raise
            time.sleep(0.5 * 2**attempt)
        else:
            return


def _image(session: Session, thing: Thing) -> None:
    session.call("ec2:DeregisterImage", region=thing.region, patience=SHORT, ImageId=thing.id)


def _task(session: Session, thing: Thing) -> None:
    """Cancel a task; where it has ended, remove what it made."""
    try:
        session.call("ec2:CancelImportTask", region=thing.region, patience=SHORT, ImportTaskId=thing.id)
    except AwsError as error:
        if error.code != "InvalidConversionTaskId":
            raise
        for made in made_by_task(session, thing):
            remove(session, made)


def made_by_task(session: Session, thing: Thing) -> Iterator[Thing]:
    """Yield what an import task that has ended left in the account."""
    if thing.id.startswith("import-snap-"):
        action, key = "ec2:DescribeImportSnapshotTasks", "ImportSnapshotTasks"
    else:
        action, key = "ec2:DescribeImportImageTasks", "ImportImageTasks"
    answer = session.call(action, region=thing.region, patience=SHORT, ImportTaskIds=[thing.id])
    for task in answer.get(key, ()):
        if task.get("ImageId"):
            yield Thing(IMAGE, task["ImageId"], thing.region, thing.job)
        for detail in (task.get("SnapshotTaskDetail") or {}, *(task.get("SnapshotDetails") or ())):
            if detail.get("SnapshotId"):
                yield Thing(SNAPSHOT, detail["SnapshotId"], thing.region, thing.job)


def _object(session: Session, thing: Thing) -> None:
    bucket, _, key = thing.id.partition("/")
    session.call("s3:DeleteObject", region=thing.region, patience=SHORT, Bucket=bucket, Key=key)


def _upload(session: Session, thing: Thing) -> None:
    bucket, _, key = thing.id.partition("/")
    session.call(
        "s3:AbortMultipartUpload",
        region=thing.region,
        patience=SHORT,
        Bucket=bucket,
        Key=key,
        UploadId=thing.extra,
    )


_REMOVERS: dict[str, Callable[[Session, Thing], None]] = {
    SNAPSHOT: _snapshot,
    IMAGE: _image,
    TASK: _task,
    OBJECT: _object,
    UPLOAD: _upload,
}


def tags_of(row: Any) -> dict[str, str]:
    """Return the tags of something that EC2 describes."""
    return {tag["Key"]: tag.get("Value", "") for tag in row.get("Tags") or ()}


def tagged(session: Session, region: str, job: str | None = None) -> Iterator[tuple[Thing, Any]]:
    """Yield the images, then the snapshots of a region that carry the tag (of one job, if given), with their rows."""
    condition = {"Name": f"tag:{JOB}", "Values": [job]} if job else {"Name": "tag-key", "Values": [JOB]}
    for action, key, kind, owner, field in (
        ("ec2:DescribeImages", "Images", IMAGE, {"Owners": ["self"]}, "ImageId"),
        ("ec2:DescribeSnapshots", "Snapshots", SNAPSHOT, {"OwnerIds": ["self"]}, "SnapshotId"),
    ):
        for row in session.pages(action, key, region=region, Filters=[condition], **owner):
            yield Thing(kind, row[field], region, tags_of(row).get(JOB)), row


def import_tasks(session: Session, region: str, job: str) -> Iterator[Thing]:
    """Yield a job's import tasks that are still running."""
    for action, key in (
        ("ec2:DescribeImportSnapshotTasks", "ImportSnapshotTasks"),
        ("ec2:DescribeImportImageTasks", "ImportImageTasks"),
    ):
        for row in session.call(action, region=region, patience=SHORT).get(key) or ():
            status = row.get("Status") or (row.get("SnapshotTaskDetail") or {}).get("Status")
            if tags_of(row).get(JOB) == job and status in {"active", "pending"}:
                yield Thing(TASK, row["ImportTaskId"], region, job)


class Undo:
    """A stack of what was made. Thread-safe enough: things are added by one call of `append` each."""

    def __init__(self, session: Session, job: Callable[[], str]) -> None:
        self._session, self._job = session, job
        self.things: list[Thing] = []
        self.left = False
        self._doubtful: list[str] = []
        self._doubtful_task: str | None = None

    def made(self, kind: str, id: str, region: str, extra: str = "") -> None:
        """Take note of a thing that was made."""
        self.things.append(Thing(kind, id, region, self._job(), extra))

    def gone(self, kind: str, id: str) -> None:
        """Take note that a thing is removed already, or not this job's to remove."""
        self.things = [thing for thing in self.things if (thing.kind, thing.id) != (kind, id)]

    def doubtful(self, region: str) -> None:
        """Take note that a call is under way that may make tagged things in a region."""
        if region not in self._doubtful:
            self._doubtful.append(region)

    def doubtful_task(self, region: str | None) -> None:
        """Take note that a call is under way that may start an import task in a region; None: it has answered."""
        self._doubtful_task = region

    def clear(self) -> None:
        """Forget all: the job is finished."""
        self.things.clear()
        self._doubtful.clear()
        self._doubtful_task = None

    def everything(self) -> list[Thing]:
        """Return what there is to remove: images first, what is only found by its tag included."""
        found = list(self.things)
        for region in self._doubtful:
            try:
                found += [thing for thing, _ in tagged(self._session, region, self._job())]
            except AwsError:
                continue
        if self._doubtful_task is not None:
            with contextlib.suppress(AwsError):
                found += import_tasks(self._session, self._doubtful_task, self._job())
        unique = {(thing.kind, thing.id, thing.region): thing for thing in found}
        order = (TASK, IMAGE, SNAPSHOT, UPLOAD, OBJECT)
        return sorted(unique.values(), key=lambda thing: order.index(thing.kind))

    def run(self) -> str:
        """Remove everything; return what was done, in words. Raises nothing of AWS."""
        removed, left = [], []
        for thing in self.everything():
            try:
                remove(self._session, thing)
                removed.append(f"{thing.kind} {thing.id}")
            except AwsError as error:
                left.append(f"{thing.kind} {thing.id} ({error.problem})")
        self.clear()
        self.left = bool(left)
        words = [f"removed {', '.join(removed)}"] if removed else []
        if left:
            words.append(f"could not remove {', '.join(left)}: `diskmorph aws gc` tries again")
        return "; ".join(words)

    def keep(self) -> str:
        """Return what is left behind on request, in words."""
        kept = [f"{thing.kind} {thing.id}" for thing in self.everything()]
        return f"kept {', '.join(kept)}" if kept else ""


__all__ = ["FINISHED", "IMAGE", "JOB", "OBJECT", "SNAPSHOT", "STATE", "TASK", "UPLOAD", "WORKING", "Undo"]
