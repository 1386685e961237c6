"""Blocks into an EBS snapshot: workers that read, hash and put them, and the sum over all of them.

EBS direct APIs: every block carries its SHA-256; CompleteSnapshot carries their number and the LINEAR aggregate, which
is the SHA-256 of the binary digests by ascending index. Workers share one ascending line of tasks, so memory is bounded
by their number. How many there are follows from what they gain.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from diskmorph.convert.aws.blocks import BLOCK, Task, blocks_of, capacity_of, fill, is_zero, tasks
from diskmorph.convert.aws.faults import WrongChecksumError
from diskmorph.convert.aws.rates import Stopped
from diskmorph.convert.buffers import new_buffer
from diskmorph.convert.moves import Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from diskmorph.convert.aws.rates import Rate
    from diskmorph.convert.aws.session import Session
    from diskmorph.formats.disk import Disk

MOST_WORKERS = 64
_FIRST_WORKERS = 8
_MOST_AHEAD = 4096
"""Tasks that may be taken before the oldest one is done: bounds what the aggregate holds back."""
_TICK = 0.1
_PACE = 1.0
_ZERO = bytes(BLOCK)
_ZERO_DIGEST = hashlib.sha256(_ZERO).digest()


@dataclass(frozen=True, slots=True)
class Upload:
    """What goes where: a disk into a pending snapshot.

    `zeroes`: written zeroes are sent too (the encryption rule). `done`, `below`: HASH rows of the blocks that are in
    the snapshot already, and in its parent. `born`: when it was started (time.monotonic). `first`: the block of the
    snapshot that the disk begins at, where it is a part of a larger one without a parent.
    """

    disk: Disk
    snapshot: str
    zeroes: bool
    done: NDArray[np.void]
    below: NDArray[np.void] | None = None
    workers: int | None = None
    born: float = 0.0
    first: int = 0


class BlockLog(Protocol):
    """Takes note of blocks that are in the snapshot."""

    def block(self, index: int, digest: bytes) -> None:
        """Take note of one; called by every worker."""


@dataclass(slots=True)
class Counts:
    """Blocks: of the disk, sent now, sent by earlier runs, and those that need not be sent."""

    total: int = 0
    sent: int = 0
    resumed: int = 0

    @property
    def omitted(self) -> int:
        """Blocks that are not in the snapshot, or that its parent has."""
        return max(0, self.total - self.sent - self.resumed)

    def as_dict(self) -> dict[str, int]:
        """Return what `--json` shows."""
        return {"total": self.total, "sent": self.sent, "omitted": self.omitted, "resumed": self.resumed}


class Known:
    """HASH rows to be looked up by index."""

    def __init__(self, rows: NDArray[np.void] | None) -> None:
        self._rows = rows if rows is not None and len(rows) else None
        self._indexes = None if self._rows is None else np.ascontiguousarray(self._rows["index"])

    def digest(self, index: int) -> bytes | None:
        """Return the digest of a block, None if it is not there."""
        if self._rows is None or self._indexes is None:
            return None
        at = int(np.searchsorted(self._indexes, index))
        if at == len(self._indexes) or int(self._indexes[at]) != index:
            return None
        return bytes(self._rows["sha256"][at].tobytes())


class Ledger:
    """Sums up blocks in the order of tasks, whatever the order in which they are done. Thread-safe."""

    def __init__(self, total: int) -> None:
        self.counts = Counts(total=total)
        self._lock = threading.Lock()
        self._state = hashlib.sha256()
        self._next = 0
        self._early: dict[int, bytes] = {}
        self.reached = 0

    def settle(self, number: int, task: Task, digests: bytes, sent: int, resumed: int) -> None:
        """Take note that task `number` is done: the digests of its blocks that are in the snapshot."""
        with self._lock:
            self.counts.sent += sent
            self.counts.resumed += resumed
            self.reached = max(self.reached, task.stop)
            self._early[number] = digests
            while self._next in self._early:
                self._state.update(self._early.pop(self._next))
                self._next += 1

    def behind(self, number: int) -> bool:
        """Whether task `number` is too far ahead of the oldest one that is not done."""
        return number - self._next > _MOST_AHEAD

    def aggregate(self) -> str:
        """Return the LINEAR aggregate, in base64."""
        return base64.b64encode(self._state.digest()).decode()


class Crew:
    """Workers that bring a disk's blocks into a snapshot."""

    def __init__(self, session: Session, upload: Upload, journal: BlockLog, rate: Rate) -> None:
        self._session, self._upload, self._journal, self._rate = session, upload, journal, rate
        self.ledger = Ledger(blocks_of(upload.disk.size))
        self._done, self._below = Known(upload.done), Known(upload.below)
        self._tasks = tasks(upload.disk, zeroes=upload.zeroes, below=upload.below)
        self._take_lock = threading.Lock()
        self._number = 0
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._puts = 0
        self._exhausted = False

    def run(self, tick: Callable[[int], None]) -> Ledger:
        """Send everything; `tick` is called in this thread with the disk's bytes done. Raises what a worker raised."""
        total = self._upload.disk.size
        try:
            with Reader(self._upload.disk) as reader:
                self._reader = reader
                self._grow(self._upload.workers or _FIRST_WORKERS)
                pace = _Pace(self._upload.workers is not None)
                while any(thread.is_alive() for thread in self._threads) and not self._stop.is_set():
                    self._wake.wait(_TICK)
                    self._wake.clear()
                    tick(min(self.ledger.reached * BLOCK, total))
                    if not self._exhausted:
                        self._grow(pace.more(self._puts, len(self._threads)))
                self._join()
        except BaseException:
            self._stop.set()
            self._join()
            raise
        if self._failure is not None:
            raise self._failure
        tick(total)
        return self.ledger

    def _grow(self, count: int) -> None:
        for _ in range(min(count, MOST_WORKERS - len(self._threads))):
            thread = threading.Thread(target=self._loop, daemon=True, name="put")
            self._threads.append(thread)
            thread.start()

    def _join(self) -> None:
        """Wait for workers; those that hang in a call when all is stopped end by themselves, unheeded."""
        end = time.monotonic() + 2.0
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()) if self._stop.is_set() else None)

    def _loop(self) -> None:
        try:
            buffer = new_buffer(capacity_of(self._upload.disk))
            while (taken := self._take()) is not None:
                self._do(*taken, buffer)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by `run`
            if self._failure is None:
                self._failure = error
            self._stop.set()
        finally:
            self._wake.set()

    def _take(self) -> tuple[int, Task] | None:
        with self._take_lock:
            if self._stop.is_set():
                raise Stopped
            task = next(self._tasks, None)
            if task is None:
                self._exhausted = True
                return None
            number = self._number
            self._number += 1
        while self.ledger.behind(number):
            if self._stop.wait(_TICK):
                raise Stopped
        return number, task

    def _do(self, number: int, task: Task, buffer: memoryview) -> None:
        digests, sent, resumed = [], 0, 0
        for index, digest, view in self._blocks(task, buffer):
            if view is None:
                resumed += 1
            elif digest == self._below.digest(index):
                continue
            else:
                self._put(index, digest, view)
                sent += 1
            digests.append(digest)
        self.ledger.settle(number, task, b"".join(digests), sent, resumed)

    def _blocks(self, task: Task, buffer: memoryview) -> Iterator[tuple[int, bytes, memoryview | None]]:
        """Yield index, digest and bytes of the blocks that belong into the snapshot; no bytes: it is there already."""
        known = {index: self._done.digest(index) for index in range(task.first, task.stop)}
        view = None if task.rows is None or all(known.values()) else fill(self._reader, task, buffer)
        for index, digest in known.items():
            if digest is not None:
                yield index, digest, None
                continue
            at = (index - task.first) * BLOCK
            block = view[at : at + BLOCK] if view is not None else memoryview(_ZERO)
            if view is None or is_zero(block):
                if self._upload.zeroes or self._below.digest(index) is not None:
                    yield index, _ZERO_DIGEST, memoryview(_ZERO)
                continue
            yield index, hashlib.sha256(block).digest(), block

    def _put(self, index: int, digest: bytes, view: memoryview) -> None:
        checksum = base64.b64encode(digest).decode()

        def take(answer: Any) -> bool:
            if answer.get("Checksum", checksum) != checksum:
                raise WrongChecksumError(f"block {index} arrived with another checksum")
            return True

        self._session.call(
            "ebs:PutSnapshotBlock",
            born=self._upload.born,
            rate=self._rate,
            stop=self._stop,
            take=take,
            SnapshotId=self._upload.snapshot,
            BlockIndex=self._upload.first + index,
            BlockData=bytes(view),
            DataLength=BLOCK,
            Progress=min(100, 100 * index // max(1, self.ledger.counts.total)),
            Checksum=checksum,
            ChecksumAlgorithm="SHA256",
        )
        self._journal.block(index, digest)
        self._puts += 1


class _Pace:
    """Adds workers as long as they bring more blocks a second."""

    def __init__(self, fixed: bool) -> None:
        self._fixed = fixed
        self._at, self._puts, self._best = time.monotonic(), 0, 0.0

    def more(self, puts: int, workers: int) -> int:
        """Return how many workers to add now."""
        at = time.monotonic()
        if self._fixed or at - self._at < _PACE:
            return 0
        speed = (puts - self._puts) / (at - self._at)
        self._at, self._puts = at, puts
        if speed < 1.15 * self._best or not speed:
            self._fixed = bool(speed)
            return 0
        self._best = speed
        return workers
