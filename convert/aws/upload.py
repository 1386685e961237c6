"""`aws upload`: a disk becomes an EBS snapshot, and goes on where an earlier run of the same command was cut off."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.convert.aws import journal as journals
from diskmorph.convert.aws.blocks import GIB, HASH, MOST_GIB
from diskmorph.convert.aws.ebs import Counts, Crew, Upload
from diskmorph.convert.aws.faults import AwsError, Fault
from diskmorph.convert.aws.quotas import PUT, quota_of
from diskmorph.convert.aws.rates import Rate
from diskmorph.convert.aws.session import SHORT
from diskmorph.convert.aws.sources import identity_of
from diskmorph.convert.aws.undo import SNAPSHOT
from diskmorph.convert.aws.waiting import wait_snapshot
from diskmorph.convert.options import Progress
from diskmorph.formats.errors import OptionError, TargetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.convert.aws.job import Job
    from diskmorph.convert.aws.session import Session
    from diskmorph.convert.aws.sources import Source

AUTO, SEND, OMIT = "auto", "send", "omit"
_TIMEOUT_MINUTES = 24 * 60
"""StartSnapshot, Timeout: how long after the last block the snapshot waits for more; resuming is possible so long."""


@dataclass(frozen=True, slots=True)
class UploadOptions:
    """How a snapshot is made. `volume_size` in bytes; `zero`: "auto", "send" or "omit" for zeroes that were written."""

    volume_size: int | None = None
    encrypt: bool = False
    kms_key: str | None = None
    zero: str = AUTO
    parent: str | None = None
    workers: int | None = None
    max_rps: float | None = None
    description: str | None = None


@dataclass(slots=True)
class Uploaded:
    """A snapshot that is complete. `volume_size` in GiB."""

    source: str
    job: str
    region: str
    snapshot_id: str
    volume_size: int
    encrypted: bool
    blocks: Counts = field(default_factory=Counts)

    def as_dict(self) -> dict[str, Any]:
        """Return what `aws upload --json` shows."""
        return {
            "source": self.source,
            "job": self.job,
            "region": self.region,
            "snapshot_id": self.snapshot_id,
            "volume_size": self.volume_size,
            "encrypted": self.encrypted,
            "blocks": self.blocks.as_dict(),
        }


def volume_gib(size: int, wanted: int | None) -> int:
    """Return the volume's size in GiB for a disk of `size` bytes. Raises OptionError where it does not fit."""
    least = max(1, -(-size // GIB))
    asked = least if wanted is None else -(-wanted // GIB)
    if asked < least:
        raise OptionError(
            f"--volume-size {asked} GiB is smaller than the disk", hint=f"at least {least} GiB are needed"
        )
    if asked > MOST_GIB:
        raise TargetError(
            f"an EBS volume has at most {MOST_GIB} GiB", expected=f"<= {MOST_GIB} GiB", found=f"{asked} GiB"
        )
    return asked


def require_options(options: UploadOptions) -> None:
    """Raise OptionError for options that exclude each other."""
    if options.kms_key and not options.encrypt:
        raise OptionError("--kms-key needs --encrypt")
    if options.parent and (options.encrypt or options.kms_key):
        raise OptionError("--parent excludes --encrypt and --kms-key", hint="the parent's encryption is taken over")
    if options.zero not in {AUTO, SEND, OMIT}:
        raise OptionError(f"--zero {options.zero} is not known", hint="auto, send or omit")
    if options.workers is not None and not 1 <= options.workers <= 64:
        raise OptionError("--workers takes 1 to 64")
    if options.max_rps is not None and options.max_rps <= 0:
        raise OptionError("--max-rps takes a positive number")


def key_of(source: Source, options: UploadOptions, region: str) -> dict[str, Any]:
    """Return what makes two commands the same upload: the journal's key."""
    return {
        "verb": "upload",
        "source": source.name,
        "format": source.format,
        "region": region,
        "size": source.disk.size,
        "volume_size": options.volume_size,
        "encrypt": options.encrypt,
        "kms_key": options.kms_key,
        "zero": options.zero,
        "parent": options.parent,
    }


def upload(job: Job, source: Source, options: UploadOptions) -> Uploaded:
    """Bring a disk into a snapshot and wait until that is complete; it is not yet marked finished.

    The job's journal says whether an earlier run began it. Raises AwsError, OptionError, what reading raises.
    """
    require_options(options)
    session = job.session
    gib = volume_gib(source.disk.size, options.volume_size)
    below = _parent_map(session, options.parent)
    started = _resumed(job, source) or _started(job, source, options, gib)
    job.undo.made(SNAPSHOT, started.id, session.region)
    zeroes = zero_rule(session, options, started)
    rate = Rate(min(options.max_rps or 1e9, quota_of(session, PUT)))
    done = job.journal.blocks()
    work = Upload(source.disk, started.id, zeroes, done, below, options.workers, started.born)
    crew = Crew(session, work, job.journal, rate)
    size = source.disk.size
    job.on_progress(Progress("upload", 0, size))
    ledger = crew.run(lambda bytes_done: job.on_progress(Progress("upload", bytes_done, size)))
    source.disk.verify_unchanged()
    counts = ledger.counts
    if not started.complete:
        job.journal.note(completing=True)
        complete(session, started, counts.sent + counts.resumed, ledger.aggregate())
    wait_snapshot(session, started.id, session.region, job.on_progress, size=size, born=started.born)
    own = job.journal.all_blocks()
    journals.save_map(session.region, started.id, own if below is None else journals.merged(below, own))
    return Uploaded(source.name, job.id, session.region, started.id, gib, bool(started.encrypted), counts)


@dataclass(slots=True)
class Started:
    """A snapshot that blocks go into; `encrypted` None: AWS did not say."""

    id: str
    encrypted: bool | None
    born: float
    complete: bool = False
    completing: bool = False
    """An earlier run asked for completion, and did not hear the answer."""

    @classmethod
    def of(cls, answer: Any) -> Started:
        """Return the snapshot that StartSnapshot tells of, just born."""
        return cls(str(answer["SnapshotId"]), _encrypted(answer), time.monotonic())


def start_words(options: UploadOptions, name: str, gib: int, tags: list[dict[str, str]]) -> dict[str, Any]:
    """Return what StartSnapshot is asked, but for the client token."""
    words: dict[str, Any] = {"VolumeSize": gib, "Timeout": _TIMEOUT_MINUTES, "Tags": tags}
    words["Description"] = (options.description or f"diskmorph: {name}")[:255]
    if options.encrypt:
        words["Encrypted"] = True
    if options.kms_key:
        words["KmsKeyArn"] = options.kms_key
    if options.parent:
        words["ParentSnapshotId"] = options.parent
    return words


def _started(job: Job, source: Source, options: UploadOptions, gib: int) -> Started:
    identity = identity_of(source.disk)
    words = start_words(options, source.name, gib, job.tags)
    if job.journal.facts.get("start") not in {None, identity}:
        job.journal.restart()
        words["Tags"] = job.tags
    job.journal.note(start=identity)
    job.undo.doubtful(job.session.region)
    try:
        answer = job.session.call("ebs:StartSnapshot", ClientToken=job.id, **words)
    except AwsError as error:
        if error.code != "ConflictException":  # an earlier run asked for something else by this token
            raise
        job.journal.restart()
        job.journal.note(start=identity)
        answer = job.session.call("ebs:StartSnapshot", ClientToken=job.id, **{**words, "Tags": job.tags})
    started = Started.of(answer)
    job.journal.note(
        snapshot=started.id,
        identity=identity,
        encrypted=started.encrypted,
        born=time.time(),
        region=job.session.region,
    )
    return started


def _encrypted(answer: Any) -> bool | None:
    if answer.get("KmsKeyArn") or answer.get("SseType") == "sse-kms":
        return True
    return False if answer.get("SseType") else None


def _resumed(job: Job, source: Source) -> Started | None:
    """Return the snapshot of an earlier run, if it lives and the source is the same; otherwise begin afresh."""
    facts = job.journal.facts
    if "snapshot" not in facts:
        return None
    session, old = job.session, str(facts["snapshot"])
    age = max(0.0, time.time() - float(facts.get("born", 0)))
    state = state_of(session, old, age)
    if facts.get("identity") != identity_of(source.disk):
        if state is not None:
            job.note(f"{source.name} has changed since: snapshot {old} of the earlier run is removed")
            session.known("ec2:DeleteSnapshot", SnapshotId=old)
        job.journal.restart()
        return None
    if state in {"pending", "completed"}:  # only `complete`, with the sum over all blocks, brings it to that
        started = Started(old, facts.get("encrypted"), time.monotonic() - age, complete=state == "completed")
        started.completing = bool(facts.get("completing"))
        return started
    if state is not None:
        session.known("ec2:DeleteSnapshot", SnapshotId=old)
    job.note(f"snapshot {old} of the earlier run is {state or 'gone'}: starting afresh")
    job.journal.restart()
    return None


def state_of(session: Session, id: str, age: float) -> str | None:
    """Return the state of a snapshot, None if it is gone; a young one is given some time to show."""
    end = time.monotonic() + (10.0 if age < 120 else 0.0)
    while True:
        try:
            answer = session.call("ec2:DescribeSnapshots", SnapshotIds=[id], patience=SHORT)
        except AwsError as error:
            if error.code != "InvalidSnapshot.NotFound":
                raise
        else:
            return str(answer["Snapshots"][0]["State"]) if answer.get("Snapshots") else None
        if time.monotonic() >= end:
            return None
        time.sleep(0.5)


def zero_rule(session: Session, options: UploadOptions, started: Started) -> bool:
    """Return whether written zeroes are sent: omitted blocks of an encrypted snapshot read as random bytes."""
    if options.zero != AUTO:
        return options.zero == SEND
    if started.encrypted is None:
        answer = session.known("ec2:GetEbsEncryptionByDefault")
        if answer is not None:
            started.encrypted = bool(answer.get("EbsEncryptionByDefault")) or options.encrypt
    return started.encrypted is not False


def complete(session: Session, started: Started, count: int, checksum: str) -> None:
    """Say that `count` blocks, whose LINEAR aggregate `checksum` is, are all. Raises AwsError."""
    doubtful = started.completing

    def settle(fault: Fault) -> bool | None:
        """Look at the state where an answer was lost and the snapshot is no longer pending."""
        nonlocal doubtful
        doubtful = doubtful or fault.ambiguous
        if doubtful and fault.code == "ValidationException" and fault.reason == "INVALID_SNAPSHOT_ID":
            return state_of(session, started.id, 0.0) in {"pending", "completed"} or None
        return None

    session.call(
        "ebs:CompleteSnapshot",
        born=started.born,
        settle=settle,
        SnapshotId=started.id,
        ChangedBlocksCount=count,
        Checksum=checksum,
        ChecksumAlgorithm="SHA256",
        ChecksumAggregationMethod="LINEAR",
    )


def _parent_map(session: Session, parent: str | None) -> NDArray[np.void] | None:
    """Return the map of the parent: the one kept here, else which blocks it has, with no digest known."""
    if parent is None:
        return None
    kept = journals.load_map(session.region, parent)
    if kept is not None:
        return kept
    indexes = [
        int(block["BlockIndex"])
        for block in session.pages("ebs:ListSnapshotBlocks", "Blocks", SnapshotId=parent, MaxResults=10000)
    ]
    rows = np.zeros(len(indexes), HASH)
    rows["index"] = np.array(indexes, np.uint32)
    return rows
