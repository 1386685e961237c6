"""`aws plan`: what publishing a disk would send, cost, take and need; asks AWS, but changes nothing there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diskmorph.convert.aws import journal as journals
from diskmorph.convert.aws.blocks import BLOCK, GIB, blocks_of, capacity_of, fill, is_zero, tasks
from diskmorph.convert.aws.faults import AwsError
from diskmorph.convert.aws.infer import UnknownMachineError, infer
from diskmorph.convert.aws.quotas import PUT, Quota, quotas
from diskmorph.convert.aws.register import ImageOptions, require_image_options, settled
from diskmorph.convert.aws.session import SHORT
from diskmorph.convert.aws.sources import SourceOptions, opened
from diskmorph.convert.aws.upload import OMIT, SEND, UploadOptions, require_options, volume_gib
from diskmorph.convert.buffers import new_buffer
from diskmorph.convert.moves import Reader
from diskmorph.convert.options import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.convert.aws.session import Session
    from diskmorph.formats.disk import Disk

# Amazon EBS pricing, us-east-1: US dollars for 1000 PutSnapshotBlock, and for a GiB of snapshot a month.
PUT_PRICE, STORAGE_PRICE = 0.006, 0.05
_PUTS_A_SECOND = 400.0
"""What one machine reaches, where the quota allows more."""
_ENDING = 30.0
"""Seconds that completing and registering take."""

_UPLOAD = (
    "ebs:StartSnapshot",
    "ebs:PutSnapshotBlock",
    "ebs:CompleteSnapshot",
    "ec2:CreateTags",
    "ec2:DescribeSnapshots",
    "ec2:DeleteSnapshot",
)
_REGISTER = ("ec2:RegisterImage", "ec2:DescribeImages", "ec2:DeregisterImage")
_ID, _IMAGE_ID = "snap-00000000000000000", "ami-00000000000000000"


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done. `send` blocks of `total`; `allowed`: True, False, or None where AWS does not tell."""

    source: str
    volume_size: int
    total: int
    send: int
    seconds: float
    permissions: tuple[tuple[str, bool | None], ...]
    quotas: tuple[Quota, ...]
    boot_mode: str | None
    architecture: str | None
    encrypted: bool | None
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes to be sent."""
        return self.send * BLOCK

    @property
    def requests_usd(self) -> float:
        """What the calls cost."""
        return self.send * PUT_PRICE / 1000

    @property
    def storage_usd_month(self) -> float:
        """What keeping the snapshot costs a month, in one region."""
        return self.bytes / GIB * STORAGE_PRICE

    def as_dict(self) -> dict[str, Any]:
        """Return what `aws plan --json` shows."""
        return {
            "source": self.source,
            "volume_size": self.volume_size,
            "blocks": {"total": self.total, "send": self.send, "omit": self.total - self.send},
            "bytes": self.bytes,
            "cost": {"requests_usd": self.requests_usd, "storage_usd_month": self.storage_usd_month},
            "seconds": self.seconds,
            "permissions": [{"action": action, "allowed": allowed} for action, allowed in self.permissions],
            "quotas": [quota.as_dict() for quota in self.quotas],
            "boot_mode": self.boot_mode,
            "architecture": self.architecture,
            "encrypted": self.encrypted,
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """Yield the same for people."""
        sealed = {True: "encrypted", False: "not encrypted", None: "encryption unknown"}[self.encrypted]
        yield f"{self.source}: a volume of {self.volume_size} GiB, {sealed}"
        mib = self.bytes / (1 << 20)
        yield f"  {self.send} of {self.total} blocks to send ({mib:.0f} MiB), about {self.seconds:.0f} s"
        yield f"  cost: ${self.requests_usd:.4f} of requests, ${self.storage_usd_month:.2f} a month of storage"
        yield f"  boots by {self.boot_mode or 'unknown (--boot-mode)'} on {self.architecture or 'unknown (--arch)'}"
        words = {True: "allowed", False: "DENIED", None: "not known"}
        for action, allowed in self.permissions:
            yield f"  {action}: {words[allowed]}"
        for quota in self.quotas:
            yield f"  quota, {quota.name}: {quota.value:g}{'' if quota.read else ' (default)'}"
        yield from (f"  {note}" for note in self.notes)


def plan(
    session: Session,
    what: str | Disk,
    source: SourceOptions,
    options: UploadOptions,
    image: ImageOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """Read the disk and ask AWS. Raises what opening and reading raise, OptionError."""
    require_options(options)
    require_image_options(image, named=False)
    with opened(what, source) as found:
        gib = volume_gib(found.disk.size, options.volume_size)
        notes = list(found.notes)
        shape = infer(found.disk, found.machine)
        try:
            shape = settled(shape, image)
        except UnknownMachineError as error:
            notes.append(str(error))
        encrypted = _encrypted(session, options)
        zeroes = options.zero == SEND or (options.zero != OMIT and encrypted is not False)
        send = _count(session, found.disk, options, zeroes, on_progress)
    limits = tuple(quotas(session))
    rate = min(
        [row.value for row in limits if row.name.startswith(f"{PUT} ")] + [_PUTS_A_SECOND, options.max_rps or 1e9]
    )
    return Plan(
        source=found.name,
        volume_size=gib,
        total=blocks_of(found.disk.size),
        send=send,
        seconds=round(send / rate + _ENDING, 1),
        permissions=tuple(_permissions(session, image)),
        quotas=limits,
        boot_mode=image.boot_mode or shape.boot_mode,
        architecture=image.architecture or shape.architecture,
        encrypted=encrypted,
        notes=tuple(notes),
    )


def _encrypted(session: Session, options: UploadOptions) -> bool | None:
    if options.encrypt:
        return True
    if options.parent is not None:
        answer = session.known("ec2:DescribeSnapshots", SnapshotIds=[options.parent])
        rows = (answer or {}).get("Snapshots") or ()
        return bool(rows[0].get("Encrypted")) if rows else None
    answer = session.known("ec2:GetEbsEncryptionByDefault")
    return None if answer is None else bool(answer.get("EbsEncryptionByDefault"))


def _count(
    session: Session,
    disk: Disk,
    options: UploadOptions,
    zeroes: bool,
    on_progress: Callable[[Progress], None] | None,
) -> int:
    """Return how many blocks would be sent: what is allocated is read, since it may be zero."""
    import hashlib  # noqa: PLC0415 - only where there is a parent

    from diskmorph.convert.aws.ebs import Known  # noqa: PLC0415

    below = journals.load_map(session.region, options.parent) if options.parent else None
    known = Known(below)
    buffer = new_buffer(capacity_of(disk))
    count = 0
    with Reader(disk) as reader:
        for task in tasks(disk, zeroes=zeroes, below=below):
            view = fill(reader, task, buffer) if task.rows is not None else memoryview(bytes(BLOCK))
            for number in range(task.count):
                block = view[number * BLOCK : (number + 1) * BLOCK]
                held = known.digest(task.first + number)
                if is_zero(block) and held is None:
                    count += zeroes
                elif held is None or held != hashlib.sha256(block).digest():
                    count += 1
            if on_progress is not None:
                on_progress(Progress("plan", min(task.stop * BLOCK, disk.size), disk.size))
    if on_progress is not None:
        on_progress(Progress("plan", disk.size, disk.size))
    return count


# --- permissions


def actions(image: ImageOptions) -> list[str]:
    """Return every action that publishing needs."""
    more = []
    if image.copy_to:
        more.append("ec2:CopyImage")
    if image.share:
        more.append("ec2:ModifyImageAttribute")
    if image.deprecate_at:
        more.append("ec2:EnableImageDeprecation")
    return [*_UPLOAD, *_REGISTER, *more]


def _permissions(session: Session, image: ImageOptions) -> Iterator[tuple[str, bool | None]]:
    """Yield each action with whether it is allowed: as IAM simulates it, else by a dry run, else unknown."""
    wanted = actions(image)
    simulated = _simulated(session, wanted)
    for action in wanted:
        allowed = simulated.get(action)
        yield action, _dry_run(session, action) if allowed is None else allowed


def _simulated(session: Session, wanted: list[str]) -> dict[str, bool]:
    caller = session.known("sts:GetCallerIdentity")
    if caller is None:
        return {}
    arn = _role_arn(str(caller["Arn"]))
    answer = session.known("iam:SimulatePrincipalPolicy", PolicySourceArn=arn, ActionNames=wanted)
    rows = (answer or {}).get("EvaluationResults") or ()
    return {row["EvalActionName"]: row["EvalDecision"] == "allowed" for row in rows}


def _role_arn(arn: str) -> str:
    """Return the role of an assumed role's session, which is what policies hang on."""
    head, _, tail = arn.partition(":assumed-role/")
    return f"{head.replace(':sts:', ':iam:')}:role/{tail.split('/')[0]}" if tail else arn


_DRY: dict[str, dict[str, Any]] = {
    "ec2:CreateTags": {"Resources": [_ID], "Tags": [{"Key": "diskmorph:job", "Value": "plan"}]},
    "ec2:DescribeSnapshots": {},
    "ec2:DeleteSnapshot": {"SnapshotId": _ID},
    "ec2:RegisterImage": {"Name": "diskmorph plan"},
    "ec2:DescribeImages": {},
    "ec2:DeregisterImage": {"ImageId": _IMAGE_ID},
    "ec2:CopyImage": {"Name": "diskmorph plan", "SourceImageId": _IMAGE_ID, "SourceRegion": "us-east-1"},
    "ec2:ModifyImageAttribute": {"ImageId": _IMAGE_ID},
    "ec2:EnableImageDeprecation": {"ImageId": _IMAGE_ID, "DeprecateAt": "2038-01-01T00:00:00Z"},
}


def _dry_run(session: Session, action: str) -> bool | None:
    words = _DRY.get(action)
    if words is None:
        return None  # EBS direct has no dry runs
    try:
        session.call(action, patience=SHORT, DryRun=True, **words)
    except AwsError as error:
        if error.code == "DryRunOperation":
            return True
        return False if error.code in {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException"} else None
    return None
