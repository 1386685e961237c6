"""`aws import`: VM Import, through an object in S3. Slow and opaque beside `upload`, but it takes whole OVAs.

What VM Import takes goes as it is (OVA; streamOptimized VMDK), everything else is converted to a streamOptimized VMDK
on its way into S3, with no file between.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from diskmorph.convert.aws.faults import AwsError
from diskmorph.convert.aws.infer import Found, infer
from diskmorph.convert.aws.multipart import ObjectWriter
from diskmorph.convert.aws.sources import SourceOptions, opened
from diskmorph.convert.aws.undo import IMAGE, OBJECT, SNAPSHOT, TASK, Thing, made_by_task
from diskmorph.convert.aws.waiting import ticks, wait_image, wait_snapshot
from diskmorph.convert.options import ConvertOptions, Progress
from diskmorph.formats.errors import OptionError, UnsupportedError
from diskmorph.formats.numbers import whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.convert.aws.job import Job
    from diskmorph.convert.aws.publish import JobOptions
    from diskmorph.convert.aws.session import Session
    from diskmorph.convert.aws.sources import Source
    from diskmorph.formats.disk import Disk

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_MOST_VOLUMES = 21
_STEP = 8 << 20


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How to import: `bucket` holds the object for the time being, `role` is VM Import's."""

    bucket: str
    role: str = "vmimport"
    encrypt: bool = False
    kms_key: str | None = None
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Imported:
    """What VM Import made: an image of an OVA, else a snapshot. The object is gone again."""

    task_id: str
    bucket: str
    key: str
    job: str
    region: str
    snapshot_id: str | None = None
    image_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what `aws import --json` shows."""
        made = {"image_id": self.image_id} if self.image_id else {"snapshot_id": self.snapshot_id}
        return {
            "task_id": self.task_id,
            "bucket": self.bucket,
            "key": self.key,
            "job": self.job,
            "region": self.region,
            **made,
        }


# --- the role


@dataclass(frozen=True, slots=True)
class Policies:
    """The two documents of VM Import's role: who may take it, and what it may do."""

    role: str
    trust: dict[str, Any]
    policy: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return what `aws import --print-role --json` shows."""
        return {"role": self.role, "trust": self.trust, "policy": self.policy}

    def lines(self) -> Iterator[str]:
        """Yield the commands that make the role."""
        yield f"# {self.role}-trust.json"
        yield json.dumps(self.trust, indent=2)
        yield f"# {self.role}-policy.json"
        yield json.dumps(self.policy, indent=2)
        yield f"# aws iam create-role --role-name {self.role} --assume-role-policy-document file://{self.role}-trust.json"
        yield (
            f"# aws iam put-role-policy --role-name {self.role} --policy-name {self.role} "
            f"--policy-document file://{self.role}-policy.json"
        )


def role_policies(bucket: str, role: str = "vmimport") -> Policies:
    """Return what the role needs (VM Import/Export User Guide, "Required permissions")."""
    trust = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "vmie.amazonaws.com"},
                "Action": "sts:AssumeRole",
                "Condition": {"StringEquals": {"sts:Externalid": "vmimport"}},
            }
        ],
    }
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": ["s3:GetBucketLocation", "s3:GetObject", "s3:ListBucket"],
                "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/diskmorph/*"],
            },
            {
                "Effect": "Allow",
                "Action": ["ec2:ModifySnapshotAttribute", "ec2:CopySnapshot", "ec2:RegisterImage", "ec2:Describe*"],
                "Resource": "*",
            },
        ],
    }
    return Policies(role, trust, policy)


def require_role(session: Session, role: str) -> str | None:
    """Raise AwsError where the role is missing or VM Import may not take it; return a note where that is not known."""
    hint = "`diskmorph aws import --print-role --bucket B` prints what it needs"
    try:
        answer = session.call("iam:GetRole", RoleName=role)
    except AwsError as error:
        if error.code in {"NoSuchEntity", "NoSuchEntityException"}:
            raise AwsError(f"there is no role {role}", action="iam:GetRole", code=error.code, hint=hint) from error
        return f"whether the role {role} is there is not known: {error.problem}"
    trust = answer["Role"].get("AssumeRolePolicyDocument") or {}
    if "vmie.amazonaws.com" not in json.dumps(trust):
        raise AwsError(f"the role {role} does not trust vmie.amazonaws.com", action="iam:GetRole", hint=hint)
    return None


# --- importing


def import_disk(
    session: Session, what: str | Disk | None, source: SourceOptions, options: ImportOptions, how: JobOptions
) -> Imported:
    """`aws import`. Raises AwsError (with the task's own message), what opening and reading raise."""
    if what is None:
        raise OptionError("import needs a source", hint="or say --print-role")
    if options.kms_key and not options.encrypt:
        raise OptionError("--kms-key needs --encrypt")
    with opened(what, source) as found:
        note = require_role(session, options.role)
        if note and how.note is not None:
            how.note(note)
        whole = found.format == "ova" and source.disk is None
        if whole and found.machine is not None and len(found.machine.disks) > _MOST_VOLUMES:
            raise UnsupportedError(
                f"VM Import takes at most {_MOST_VOLUMES} volumes", feature="volumes", file=found.name
            )
        key = {"verb": "import", "source": found.name, "bucket": options.bucket, "once": time.time()}
        with how.job(session, key) as job:
            sent = _send(job, found, options, whole=whole)
            shape = infer(found.disk, found.machine) if whole else None
            return _import(job, sent, options, shape, found.disk.size)


@dataclass(frozen=True, slots=True)
class _Sent:
    bucket: str
    key: str
    format: str
    title: str


def _send(job: Job, source: Source, options: ImportOptions, *, whole: bool) -> _Sent:
    stem = _UNSAFE.sub("-", Path(source.name).name).strip("-.")[:100] or "disk"
    as_it_is = whole or _is_stream(source)
    name = stem if as_it_is else f"{Path(stem).stem}.vmdk"
    key = f"diskmorph/{job.id}/{name}"
    size = _file_size(source) if as_it_is else source.disk.size
    with ObjectWriter(job, options.bucket, key, size) as writer:
        if as_it_is:
            _copy(job, source, writer, size)
        else:
            _convert(job, source, writer)
    return _Sent(options.bucket, key, "ova" if whole else "vmdk", name)


def _is_stream(source: Source) -> bool:
    opened = source.opened
    return (
        opened is not None
        and opened.info is not None
        and opened.format == "vmdk"
        and opened.info.subformat == "streamOptimized"
        and len(opened.layers) == 1
        and len(source.disk.files) == 1
    )


def _file_size(source: Source) -> int:
    return Path(source.name).stat().st_size


def _copy(job: Job, source: Source, writer: ObjectWriter, size: int) -> None:
    done = 0
    with Path(source.name).open("rb") as file:
        while data := file.read(_STEP):
            writer.write(data)
            done += len(data)
            job.on_progress(Progress("upload", done, size))
    source.disk.verify_unchanged()


def _convert(job: Job, source: Source, writer: ObjectWriter) -> None:
    """Stream the disk as a VMDK into the object, by the same pipeline as any conversion."""
    from diskmorph.convert.copy import Transfer, run  # noqa: PLC0415
    from diskmorph.convert.plan import new_allocator  # noqa: PLC0415
    from diskmorph.formats.output import StreamTarget  # noqa: PLC0415
    from diskmorph.formats.registry import require_format  # noqa: PLC0415
    from diskmorph.formats.views import grown  # noqa: PLC0415

    words = ConvertOptions(format_options={"subformat": "streamOptimized"})
    allocator = new_allocator(require_format("vmdk"), source.disk, "disk.vmdk", words, None)
    disk = grown(source.disk, allocator.size)
    with StreamTarget(cast("BinaryIO", writer), writer.name) as target:
        run(
            Transfer(disk, allocator, phase="upload"),
            target,
            None,
            job.on_progress,
        )
        source.disk.verify_unchanged()
        target.commit(tuple(allocator.sizes()))


def _import(job: Job, sent: _Sent, options: ImportOptions, shape: Found | None, size: int) -> Imported:
    session = job.session
    region = session.region
    job.undo.doubtful_task(region)
    task = _started(job, sent, options, shape)
    job.undo.made(TASK, task, region)
    job.undo.doubtful_task(None)
    ended = _follow(job, task, size, image=shape is not None)
    made = list(made_by_task(session, Thing(TASK, task, region, job.id)))
    for thing in made:
        job.undo.made(thing.kind, thing.id, region)
    job.undo.gone(TASK, task)
    snapshots = [thing.id for thing in made if thing.kind == SNAPSHOT]
    image = next((thing.id for thing in made if thing.kind == IMAGE), None)
    if not made:
        raise AwsError(f"task {task} ended without a result: {ended}", action="ec2:ImportSnapshot")
    session.call("ec2:CreateTags", Resources=[thing.id for thing in made], Tags=job.tags)
    if image is not None:
        wait_image(session, image, region, born=time.monotonic())
    for snapshot in snapshots:
        wait_snapshot(session, snapshot, region, job.on_progress, born=time.monotonic())
    session.call("s3:DeleteObject", Bucket=sent.bucket, Key=sent.key)
    job.undo.gone(OBJECT, f"{sent.bucket}/{sent.key}")
    job.finish({region: [thing.id for thing in made]})
    return Imported(task, sent.bucket, sent.key, job.id, region, None if image else snapshots[0], image)


def _started(job: Job, sent: _Sent, options: ImportOptions, shape: Found | None) -> str:
    container = {"Format": sent.format, "UserBucket": {"S3Bucket": sent.bucket, "S3Key": sent.key}}
    words: dict[str, Any] = {"ClientToken": job.id, "RoleName": options.role}
    words["Description"] = options.description or f"diskmorph: {sent.title}"
    if options.encrypt:
        words["Encrypted"] = True
    if options.kms_key:
        words["KmsKeyId"] = options.kms_key
    if shape is None:
        words["TagSpecifications"] = job.specification("import-snapshot-task")
        answer = job.session.call("ec2:ImportSnapshot", DiskContainer=container, **words)
    else:
        words["TagSpecifications"] = job.specification("import-image-task")
        if shape.architecture:
            words["Architecture"] = shape.architecture
        if shape.boot_mode:
            words["BootMode"] = shape.boot_mode
        answer = job.session.call("ec2:ImportImage", DiskContainers=[container], **words)
    return str(answer["ImportTaskId"])


def _follow(job: Job, task: str, size: int, *, image: bool) -> str:
    """Wait for the task of a disk of `size` bytes, telling how far it is; return its last word.

    Raises AwsError with the task's own message.
    """
    action, key = (
        ("ec2:DescribeImportImageTasks", "ImportImageTasks")
        if image
        else ("ec2:DescribeImportSnapshotTasks", "ImportSnapshotTasks")
    )
    for _ in ticks(task, action):
        rows = job.session.call(action, born=time.monotonic(), ImportTaskIds=[task])[key]
        row = rows[0] if rows else {}
        detail = row if image else row.get("SnapshotTaskDetail") or {}
        status, message = str(detail.get("Status", "active")), str(detail.get("StatusMessage") or "")
        progress = str(detail.get("Progress") or "0")
        share = min(99, whole_number(progress, 100) or 0)
        job.on_progress(Progress("import", size * share // 100, size))
        if status == "completed":
            job.on_progress(Progress("import", size, size))
            return message
        if status in {"deleted", "deleting", "error", "failed"}:
            job.undo.gone(TASK, task)
            raise AwsError(f"VM Import gives up: {message or status} (task {task})", action=action, code=status)
    raise AssertionError
