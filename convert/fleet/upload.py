"""A row of `aws upload`: a snapshot whose job, and client token, is the row's own name, so that it is made once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from diskmorph.convert.aws.faults import AwsError
from diskmorph.convert.aws.job import Job
from diskmorph.convert.aws.session import SHORT, Session
from diskmorph.convert.aws.sources import SourceOptions, opened
from diskmorph.convert.aws.undo import FINISHED, JOB, STATE
from diskmorph.convert.aws.upload import key_of, require_options, upload, volume_gib
from diskmorph.convert.fleet.ranges import split_of
from diskmorph.convert.fleet.rows import DONE, SKIPPED, Result, Row, RunOptions, SnapshotOptions
from diskmorph.convert.fleet.worker import Pulse

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from diskmorph.convert.aws.sources import Source
    from diskmorph.convert.fleet.ranges import Split

RUN = "diskmorph:run"
"""The tag that tells which run made a snapshot."""


def upload_row(row: Row, run: RunOptions, token: str) -> Result | Split:
    """Bring a row's disk into a snapshot, unless there is one of this very work. Raises what `aws upload` raises."""
    options = cast("SnapshotOptions", row.options)
    require_options(options.upload)
    session = Session()
    made = _made(session, token)
    if made is not None:
        return _found(row, run, token, made)
    split = split_of(row, run, token)
    if split is not None:
        return split
    with opened_source(row) as source:
        volume_gib(source.disk.size, options.upload.volume_size)
        try:
            return _uploaded(row, run, token, session, source)
        except AwsError:
            made = _made(session, token)  # another try of this row may have been faster
            if made is None:
                raise
            return _found(row, run, token, made)


def opened_source(row: Row) -> AbstractContextManager[Source]:
    """Lend the row's source, open. Raises what opening and building raise."""
    options = cast("SnapshotOptions", row.options)
    build = options.build
    how = SourceOptions(
        format=options.format,
        parents=options.parents,
        snapshot=options.snapshot,
        disk=options.disk,
        build=None if build is None else lambda: build,
    )
    return opened(row.source, how)


def made_of(token: str) -> dict[str, Any] | None:
    """Return the snapshot of a work as EC2 describes it, None if there is none. Raises AwsError."""
    return _made(Session(), token)


def _uploaded(row: Row, run: RunOptions, token: str, session: Session, source: Source) -> Result:
    options = cast("SnapshotOptions", row.options)
    key = {**key_of(source, options.upload, session.region), "fleet": token}
    tags = {**options.tags}
    # What a failed try began stays: the next one goes on by the same token. `aws gc` removes what nobody went on with.
    with Job(session, key, tags=tags, keep=True, on_progress=Pulse(row.number), name=token) as job:
        made = upload(job, source, options.upload)
        session.call("ec2:CreateTags", Resources=[made.snapshot_id], Tags=[{"Key": RUN, "Value": run.run}])
        job.finish({session.region: [made.snapshot_id]})
    return Result(
        row.number,
        row.verb,
        row.source,
        row.target,
        DONE,
        token=token,
        format="ebs",
        digest=content_of(source) if run.digest else None,
        digest_of="content" if run.digest else None,
        virtual_size=source.disk.size,
        stored_size=(made.blocks.sent + made.blocks.resumed) << 19,
        snapshot_id=made.snapshot_id,
        notes=source.notes,
    )


def content_of(source: Source) -> str:
    """Return the SHA-256 of a disk's content."""
    from diskmorph.convert.digest import content_digest  # noqa: PLC0415

    return content_digest(source.disk)


def _made(session: Session, token: str) -> dict[str, Any] | None:
    """Return the snapshot of this work as EC2 describes it, marked as finished; None if there is none.

    Completing names the number and the sum of all blocks, so one that is completed is whole.
    """
    wanted = [{"Name": f"tag:{JOB}", "Values": [token, f"{token}-*"]}]
    answer = session.call("ec2:DescribeSnapshots", patience=SHORT, OwnerIds=["self"], Filters=wanted)
    found: dict[str, Any] | None = next(
        (one for one in answer.get("Snapshots", ()) if one.get("State") == "completed"), None
    )
    if found is not None and {"Key": STATE, "Value": FINISHED} not in found.get("Tags", ()):
        session.call("ec2:CreateTags", Resources=[found["SnapshotId"]], Tags=[{"Key": STATE, "Value": FINISHED}])
    return found


def _found(row: Row, run: RunOptions, token: str, made: dict[str, Any]) -> Result:
    tags = {tag["Key"]: tag["Value"] for tag in made.get("Tags", ())}
    return Result(
        row.number,
        row.verb,
        row.source,
        row.target,
        DONE if tags.get(RUN) == run.run else SKIPPED,
        token=token,
        format="ebs",
        snapshot_id=str(made["SnapshotId"]),
    )
