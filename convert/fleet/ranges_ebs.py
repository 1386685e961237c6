"""Ranges of an EBS snapshot: each range some of its blocks; completing names the number and the sum of all.

The row's own name is the snapshot's client token, so whoever begins the row again is given the same snapshot.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from diskmorph.convert.aws.blocks import BLOCK, HASH
from diskmorph.convert.aws.ebs import Crew, Upload
from diskmorph.convert.aws.faults import AwsError
from diskmorph.convert.aws.quotas import PUT, quota_of
from diskmorph.convert.aws.rates import Rate
from diskmorph.convert.aws.session import Session
from diskmorph.convert.aws.undo import FINISHED, JOB, STATE, WORKING
from diskmorph.convert.aws.upload import (
    Started,
    complete,
    require_options,
    start_words,
    state_of,
    volume_gib,
    zero_rule,
)
from diskmorph.convert.aws.waiting import wait_snapshot
from diskmorph.convert.fleet.ranges import SNAPSHOT, Piece, Split, cut
from diskmorph.convert.fleet.rows import DONE, Result, Row, RunOptions, SnapshotOptions
from diskmorph.convert.fleet.upload import RUN, content_of, opened_source
from diskmorph.convert.fleet.worker import Pulse
from diskmorph.convert.options import Progress
from diskmorph.formats.views import Slice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.convert.aws.sources import Source

_TRIES = 3


def begin(row: Row, run: RunOptions, token: str) -> Split | None:
    """Start the snapshot of a row and return how it is cut; None: in one piece.

    In one piece go small disks, disks that are built, and what builds on a parent. Raises AwsError, OptionError.
    """
    options = cast("SnapshotOptions", row.options)
    require_options(options.upload)
    if options.upload.parent is not None or run.split is None:
        return None
    with opened_source(row) as source:
        size = source.disk.size
        if size < run.split or source.opened is None:
            return None
        session = Session()
        started = _started(session, options, source, token)
        zeroes = zero_rule(session, options.upload, started)
        return Split(SNAPSHOT, token, started.id, size, cut(size, run.part), notes=source.notes, zeroes=zeroes)


def _started(session: Session, options: SnapshotOptions, source: Source, token: str) -> Started:
    """Return the snapshot of this token, pending; what came of an earlier one by another name."""
    gib = volume_gib(source.disk.size, options.upload.volume_size)
    name = token
    for _ in range(_TRIES):
        tags = {**options.tags, JOB: name, STATE: WORKING}
        words = start_words(options.upload, source.name, gib, [{"Key": key, "Value": tags[key]} for key in tags])
        try:
            started = Started.of(session.call("ebs:StartSnapshot", ClientToken=name, **words))
        except AwsError as error:
            if error.code != "ConflictException":  # an earlier try asked for something else by this token
                raise
        else:
            if state_of(session, started.id, 0.0) in {"pending", None}:  # a young one may not show yet
                return started
        name = f"{token}-{secrets.token_hex(4)}"
    raise AwsError("ebs:StartSnapshot gives no snapshot that takes blocks", action="ebs:StartSnapshot")


class _Digests:
    """Takes note of the blocks of a range. Thread-safe."""

    def __init__(self) -> None:
        self._found: dict[int, bytes] = {}

    def block(self, index: int, digest: bytes) -> None:
        """See BlockLog."""
        self._found[index] = digest

    def joined(self) -> bytes:
        """Return the digests by ascending index."""
        return b"".join(self._found[index] for index in sorted(self._found))


def write(row: Row, split: Split, start: int, stop: int) -> Piece:
    """Bring the blocks of a range into the snapshot. Raises AwsError, what reading raises."""
    options = cast("SnapshotOptions", row.options).upload
    session, seen, pulse = Session(), _Digests(), Pulse(row.number, start)
    with opened_source(row) as source:
        piece = Slice(source.disk, start, stop - start)
        work = Upload(
            disk=piece,
            snapshot=split.place,
            zeroes=split.zeroes,
            done=np.zeros(0, HASH),
            workers=options.workers,
            born=_born(split),
            first=start // BLOCK,
        )
        rate = Rate(min(options.max_rps or 1e9, quota_of(session, PUT)))
        crew = Crew(session, work, seen, rate)
        crew.run(lambda done: pulse(Progress("upload", done, piece.size)))
        source.disk.verify_unchanged()
    return Piece(start, {"copied": piece.size}, seen.joined())


def _born(split: Split) -> float:
    return time.monotonic() - (time.time() - split.begun)


def finish(row: Row, run: RunOptions, split: Split, pieces: Sequence[Piece]) -> Result:
    """Complete the snapshot, wait for it, and mark it as finished; safe to be said again. Raises AwsError."""
    session = Session()
    digests = b"".join(cast("bytes", piece.proof) for piece in pieces)
    count = len(digests) // hashlib.sha256().digest_size
    started = Started(split.place, None, _born(split), completing=True)  # an earlier try may have asked
    if state_of(session, started.id, time.time() - split.begun) != "completed":
        complete(session, started, count, base64.b64encode(hashlib.sha256(digests).digest()).decode())
        wait_snapshot(session, started.id, session.region, Pulse(row.number), size=split.size, born=started.born)
    tags: list[dict[str, Any]] = [{"Key": RUN, "Value": run.run}, {"Key": STATE, "Value": FINISHED}]
    session.call("ec2:CreateTags", Resources=[started.id], Tags=tags)
    content = None
    if run.digest:
        with opened_source(row) as source:
            content = content_of(source)
            source.disk.verify_unchanged()
    return Result(
        row.number,
        row.verb,
        row.source,
        row.target,
        DONE,
        token=split.token,
        format="ebs",
        digest=content,
        digest_of="content" if content else None,
        virtual_size=split.size,
        stored_size=count * BLOCK,
        ranges=len(split.ranges),
        snapshot_id=started.id,
        notes=split.notes,
    )
