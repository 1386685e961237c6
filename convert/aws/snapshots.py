"""A snapshot as a disk: its blocks are data, what it does not list was never written. Blocks are fetched as needed.

Tokens, which reading a block needs, are kept for the pages around the reader and asked for again when they are gone or
have expired. Sequential readers are read ahead of by several connections; every block is fetched once.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from bisect import bisect_left
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.convert.aws.blocks import BLOCK, GIB
from diskmorph.convert.aws.faults import AwsError, WrongChecksumError
from diskmorph.convert.aws.quotas import GET, quota_of
from diskmorph.convert.aws.rates import Rate
from diskmorph.convert.aws.session import SHORT
from diskmorph.formats.disk import Disk
from diskmorph.formats.errors import OptionError
from diskmorph.formats.extents import ABSENT, BATCH, DATA, EXTENT, HOLE, ZERO, clip
from diskmorph.formats.source import ByteSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.convert.aws.session import Session

_PAGE = 10_000
_NEAR = 512
"""Blocks asked for when a single token is wanted."""
_PAGES = 8
_WORKERS = 24
_KEPT = 96
"""Blocks in memory: 48 MiB."""
_LOST = frozenset({"INVALID_BLOCK_TOKEN", "INVALID_PAGE_TOKEN"})


def require_completed(session: Session, id: str) -> int:
    """Return the size in GiB of a snapshot that can be read. Raises AwsError where there is none, or it is pending."""
    answer = session.call("ec2:DescribeSnapshots", patience=SHORT, SnapshotIds=[id])
    rows = answer.get("Snapshots") or ()
    if not rows:
        raise AwsError(f"there is no snapshot {id} in {session.region}", action="ec2:DescribeSnapshots")
    state = str(rows[0]["State"])
    if state != "completed":
        raise AwsError(
            f"snapshot {id} is {state}, and only completed ones can be read",
            action="ec2:DescribeSnapshots",
            code=state,
            hint="wait for it" if state == "pending" else None,
        )
    return int(rows[0]["VolumeSize"])


def snapshot_of(session: Session, id: str) -> str:
    """Return the snapshot that a name stands for: itself, or the root volume's of an image. Raises AwsError."""
    if id.startswith("snap-"):
        return id
    if not id.startswith("ami-"):
        raise OptionError(f"{id} is neither a snapshot nor an image", hint="such as snap-0123... or ami-0123...")
    answer = session.call("ec2:DescribeImages", patience=SHORT, ImageIds=[id])
    image: dict[str, Any] = (answer.get("Images") or ({},))[0]
    for mapping in image.get("BlockDeviceMappings", ()):
        found = mapping.get("Ebs", {}).get("SnapshotId")
        if found and mapping.get("DeviceName") == image.get("RootDeviceName"):
            return str(found)
    raise AwsError(f"image {id} has no root volume made from a snapshot", action="ec2:DescribeImages")


class Blocks(ByteSource):
    """The blocks of a snapshot, as one long source of the volume's size; read only what the snapshot lists."""

    def __init__(self, session: Session, id: str, gib: int, *, ahead: bool, since: str | None = None) -> None:
        self.name = id
        self.size = gib * GIB
        self.fetched = 0
        self._session, self._id, self._since = session, id, since
        self._lock = threading.Lock()
        self._tokens: OrderedDict[int, tuple[list[int], list[str]]] = OrderedDict()
        self._held: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._order: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self._stop = threading.Event()
        self._rate = Rate(quota_of(session, GET)) if ahead else None
        self._pool = ThreadPoolExecutor(_WORKERS if ahead else 1, thread_name_prefix="get")
        self._ahead = _WORKERS if ahead else 0

    def plan(self, indexes: NDArray[np.uint32]) -> None:
        """Say which blocks will be read, in ascending order, so that they can be read ahead."""
        self._order = indexes

    # --- listing

    def pages(self, first: int = 0, most: int = _PAGE) -> Iterator[Any]:
        """Yield the entries of the listing from block `first` on, page after page; expired page tokens are renewed."""
        token: str | None = None
        while True:
            words = {"NextToken": token} if token else {"StartingBlockIndex": first}
            try:
                answer = self._list(most, words)
            except AwsError as error:
                if token is None or error.code != "ValidationException":
                    raise
                token = None  # pages' tokens live 60 minutes: begin again behind what was seen
                continue
            rows = answer.get("Blocks") or answer.get("ChangedBlocks") or []
            self._remember(rows)
            yield from rows
            if rows:
                first = int(rows[-1]["BlockIndex"]) + 1
            token = answer.get("NextToken")
            if not token:
                return

    def _list(self, most: int, words: dict[str, Any]) -> Any:
        if self._since is None:
            return self._session.call(
                "ebs:ListSnapshotBlocks", stop=self._stop, SnapshotId=self._id, MaxResults=most, **words
            )
        return self._session.call(
            "ebs:ListChangedBlocks",
            stop=self._stop,
            FirstSnapshotId=self._since,
            SecondSnapshotId=self._id,
            MaxResults=most,
            **words,
        )

    def _remember(self, rows: list[Any]) -> None:
        kept = [row for row in rows if _token_in(row)]
        if not kept:
            return
        with self._lock:
            self._tokens[int(kept[0]["BlockIndex"])] = (
                [int(row["BlockIndex"]) for row in kept],
                [str(_token_in(row)) for row in kept],
            )
            while len(self._tokens) > _PAGES:
                self._tokens.popitem(last=False)

    def _token(self, index: int) -> str:
        for attempt in range(2):
            with self._lock:
                for indexes, tokens in reversed(self._tokens.values()):
                    at = bisect_left(indexes, index)
                    if at < len(indexes) and indexes[at] == index:
                        return tokens[at]
            if attempt == 0:
                for _ in self.pages(index, _NEAR):
                    break
        raise AwsError(f"block {index} of {self._id} is listed no longer", action="ebs:ListSnapshotBlocks")

    # --- reading

    def _get(self, index: int) -> bytes:
        for attempt in range(3):
            token = self._token(index)
            try:
                data = self._session.call(
                    "ebs:GetSnapshotBlock",
                    rate=self._rate,
                    stop=self._stop,
                    take=_verified,
                    SnapshotId=self._id,
                    BlockIndex=index,
                    BlockToken=token,
                )
            except AwsError as error:
                if error.code != "ValidationException" or "token" not in error.problem.lower() or attempt == 2:
                    raise
                with self._lock:
                    self._tokens.clear()  # tokens live seven days
            else:
                self.fetched += 1
                return bytes(data)
        raise AssertionError

    def _future(self, index: int) -> Future[bytes]:
        with self._lock:
            found = self._held.get(index)
            if found is None:
                found = self._start(index)
            if self._ahead:
                at = int(np.searchsorted(self._order, index, side="right"))
                for near in self._order[at : at + self._ahead].tolist():
                    if near not in self._held:
                        self._start(near)
            self._held.move_to_end(index)
            self._drop()
            return found

    def _start(self, index: int) -> Future[bytes]:
        found = self._held[index] = self._pool.submit(self._get, index)
        return found

    def _drop(self) -> None:
        """Let go of blocks that lie longest behind; those that are under way stay."""
        while len(self._held) > _KEPT:
            index = min(self._held)
            if not self._held[index].done():
                return
            del self._held[index]

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        count = max(0, min(len(buffer), self.size - offset))
        done = 0
        while done < count:
            index, skip = divmod(offset + done, BLOCK)
            piece = self._future(index).result()[skip : skip + count - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        return count

    def close(self) -> None:
        """See ByteSource."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._held.clear()


def _token_in(row: Any) -> str | None:
    found = row.get("BlockToken") or row.get("SecondBlockToken")
    return None if found is None else str(found)


def _verified(answer: Any) -> bytes:
    """Read a block's bytes and hold them against the checksum that came with them."""
    data: bytes = answer["BlockData"].read()
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    if len(data) != BLOCK or digest != answer.get("Checksum", digest):
        raise WrongChecksumError("a block arrived with another checksum")
    return data


class SnapshotDisk(Disk):
    """A snapshot, or with `since` what changed from that one to it (the rest is ABSENT, what is gone reads zero)."""

    format = "ebs"

    def __init__(self, source: Blocks, *, changes: bool = False) -> None:
        self.source = source
        self.files = (source,)
        self.name = source.name
        self.size = source.size
        self._rows, self.listed = self._listed(changes)

    def _listed(self, changes: bool) -> tuple[NDArray[np.void], int]:
        """Return the extents of the whole snapshot: runs of blocks, gaps between them."""
        indexes: list[int] = []
        gone: list[int] = []
        for row in self.source.pages():
            (indexes if _token_in(row) else gone).append(int(row["BlockIndex"]))
        data, zero = np.array(indexes, np.uint32), np.array(gone, np.uint32)
        self.source.plan(data)
        order = np.argsort(np.concatenate([data, zero]), kind="stable")
        at = np.concatenate([data, zero])[order].astype(np.uint64)
        kinds = np.concatenate([np.full(len(data), DATA, np.uint8), np.full(len(zero), ZERO, np.uint8)])[order]
        return _extents_of(at, kinds, self.size, ABSENT if changes else HOLE), len(indexes) + len(gone)

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        rows = clip(self._rows, start, stop)
        for at in range(0, len(rows), BATCH):
            yield rows[at : at + BATCH]


def _extents_of(at: NDArray[np.uint64], kinds: NDArray[np.uint8], size: int, gap: int) -> NDArray[np.void]:
    if not len(at):
        rows = np.zeros(1, EXTENT)
        rows[0] = (0, size, 0, 0, 0, 0, gap, 0, 0, 0)
        return rows
    breaks = np.flatnonzero((at[1:] != at[:-1] + np.uint64(1)) | (kinds[1:] != kinds[:-1])) + 1
    heads = np.concatenate(([0], breaks))
    block = np.uint64(BLOCK)
    first = at[heads] * block
    last = (at[np.concatenate((breaks, [len(at)])) - 1] + np.uint64(1)) * block
    runs = np.zeros(len(heads), EXTENT)
    runs["start"], runs["length"], runs["kind"] = first, last - first, kinds[heads]
    runs["offset"] = np.where(runs["kind"] == DATA, first, np.uint64(0))
    gaps = np.zeros(len(heads) + 1, EXTENT)
    gaps["kind"] = gap
    gaps["start"] = np.concatenate(([np.uint64(0)], last))
    gaps["length"] = np.concatenate((first, [np.uint64(max(size, int(last[-1])))])) - gaps["start"]
    rows = np.concatenate([runs, gaps[gaps["length"] > 0]])
    return clip(rows[np.argsort(rows["start"], kind="stable")], 0, size)


def open_snapshot(session: Session, id: str, *, ahead: bool = True, since: str | None = None) -> SnapshotDisk:
    """Open a completed snapshot for reading. Raises AwsError."""
    source = Blocks(session, id, require_completed(session, id), ahead=ahead, since=since)
    try:
        return SnapshotDisk(source, changes=since is not None)
    except BaseException:
        source.close()
        raise
