"""A run: rows go to the cluster, what comes back goes into the ledger, until every row has ended."""

from __future__ import annotations

import contextlib
import time
from asyncio import CancelledError
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diskmorph.convert.fleet.cluster import ClusterOptions, connected, prepare, release
from diskmorph.convert.fleet.perform import perform
from diskmorph.convert.fleet.ranges import Piece, Split, abandon_split, finish_split, write_range
from diskmorph.convert.fleet.rows import DONE, FAILED, SKIPPED, FleetError, Result, Row, RunOptions, failed, fault_of
from diskmorph.convert.fleet.summary import FleetProgress, Summary
from diskmorph.convert.fleet.worker import TOPIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from diskmorph.convert.fleet.ledger import Ledger

_PAUSE = 0.1
"""Seconds between two looks at what has ended: results that came meanwhile are fetched, and put down, as one."""
_FETCH = 10.0
"""Seconds that fetching results may take: where their worker has died since, others have to bring them anew."""
_TICK = 0.5
"""Seconds between two words about progress, and two looks at the workers."""


@dataclass(slots=True)
class _Pieces:
    """A row that is under way in ranges: futures of those to come, and those that are written, by their start."""

    split: Split
    begun: float
    waiting: set[Any] = field(default_factory=set)
    done: dict[int, Piece] = field(default_factory=dict)


def run_fleet(
    rows: Sequence[Row],
    run: RunOptions,
    cluster: ClusterOptions,
    ledger: Ledger,
    *,
    on_result: Callable[[Result], None] | None = None,
    on_progress: Callable[[FleetProgress], None] | None = None,
    on_connected: Callable[[Any], None] | None = None,
) -> Summary:
    """Do rows until each has ended, and tell of each by `on_result` once the ledger has it.

    A scheduler that is lost is waited for; rows that had not ended are then given to it anew, which does nothing twice.
    Raises FleetError where no scheduler comes back; the ledger has what ended, and the same run said again goes on.
    """
    begun = time.monotonic()
    with connected(cluster) as client:
        if on_connected is not None:
            on_connected(client)
        course = _Course(client, run, cluster, ledger, on_result, on_progress)
        try:
            course.follow(rows)
        finally:
            course.close()
            if cluster.scheduler is not None:
                release(client)
    results = sorted(course.results, key=lambda result: result.number)
    return Summary(run.run, results, time.monotonic() - begun, course.workers)


class _Course:
    """One run under way."""

    def __init__(
        self,
        client: Any,
        run: RunOptions,
        cluster: ClusterOptions,
        ledger: Ledger,
        on_result: Callable[[Result], None] | None,
        on_progress: Callable[[FleetProgress], None] | None,
    ) -> None:
        self._client, self._run, self._cluster, self._ledger = client, run, cluster, ledger
        self._on_result, self._on_progress = on_result, on_progress
        self._tasks: dict[Any, Row] = {}
        self._pieces: dict[int, _Pieces] = {}
        self._open: dict[int, Row] = {}
        self._flight: dict[int, dict[int, tuple[int, int]]] = {}
        self._counts: Counter[str] = Counter()
        self._bytes = 0
        self._rows = 0
        self._round = 0
        self._begun = time.monotonic()
        self._next_tick = 0.0
        self.results: list[Result] = []
        self.workers = 0

    def follow(self, rows: Sequence[Row]) -> None:
        """Do everything. Raises FleetError."""
        self._rows = len(rows)
        self._open = {row.number: row for row in rows if row.error is None}
        self._end([failed(row, row.error) for row in rows if row.error is not None])
        while self._open:
            try:
                self._start()
                whole = self._collect()
            except OSError:  # also Dask's CommClosedError: the scheduler went while it was spoken to
                whole = False
            if not whole:
                self._wait_for_scheduler()
        self._tick(last=True)

    def close(self) -> None:
        """Let go of what has not ended: tasks that run notice it, and leave nothing."""
        with contextlib.suppress(Exception):
            if self._tasks and self._client.status == "running":
                self._client.cancel(list(self._tasks), force=True)

    # --- giving out

    def _start(self) -> None:
        from distributed import as_completed  # noqa: PLC0415 - an extra, and heavy

        self._round += 1
        self._tasks.clear()
        prepare(self._client, local=self._cluster.scheduler is None)
        self._client.subscribe_topic(TOPIC, self._heard)
        self.workers = len(self._client.nthreads())
        self._ended = as_completed([], loop=self._client.loop)
        for number, pieces in self._pieces.items():  # their places outlive the scheduler
            self._cut(self._open[number], pieces)
        rows = [row for row in self._open.values() if row.number not in self._pieces]
        known = [self._ledger.known.get((row.verb, row.source, row.target)) for row in rows]
        futures = self._client.map(
            perform,
            rows,
            [self._run] * len(rows),
            known,
            key=[self._key("row", row) for row in rows],
            **self._how(),
        )
        self._await(futures, rows)

    def _how(self) -> dict[str, Any]:
        return {"pure": False, "retries": self._cluster.retries}

    def _key(self, kind: str, row: Row, more: str = "") -> str:
        return f"{kind}-{self._run.run}-{self._round}-{row.number}{more}"

    def _await(self, futures: Sequence[Any], rows: Iterable[Row]) -> None:
        """Take note of which row futures stand for: whole, as one of its ranges, as the naming of its target."""
        self._tasks.update(zip(futures, rows, strict=True))
        self._ended.update(futures)

    # --- taking in

    def _collect(self) -> bool:
        """Take in what ends until every row has; return False where the scheduler was lost."""
        while self._open:
            if not self._ended.has_ready():
                if self._client.status != "running" or not self._tasks:
                    return False
                self._tick()
                time.sleep(_PAUSE)
                continue
            batch = [future for future in self._ended.next_batch(block=False) if future in self._tasks]
            said = self._fetched([future for future in batch if future.status == "finished"])
            ended: list[Result] = []
            for future in batch:
                if future.status == "error":
                    ended.extend(self._failed(self._tasks.pop(future), future.exception()))
                elif said.get(future.key) is not None:
                    ended.extend(self._taken(future, self._tasks.pop(future), said[future.key]))
            self._end(ended)
            if any(future.cancelled() for future in batch):
                return False
            self._ended.update([future for future in batch if future in self._tasks])
            self._tick()
        return True

    def _fetched(self, futures: Sequence[Any]) -> dict[str, Any]:
        """Return what futures brought, by key, in one question; what cannot be had now is left out."""
        if not futures:
            return {}

        async def ask() -> Any:
            return await self._client.gather({one.key: one for one in futures}, errors="skip", asynchronous=True)

        try:
            found: dict[str, Any] = self._client.sync(ask, callback_timeout=_FETCH)
        except (TimeoutError, OSError, CancelledError):
            time.sleep(_PAUSE)
            return {}
        return found

    def _taken(self, future: Any, row: Row, said: Any) -> list[Result]:
        """Return the results that a future brings."""
        if row.number not in self._open:
            return []
        if isinstance(said, Result):
            self._pieces.pop(row.number, None)
            return [said]
        if isinstance(said, Split):
            self._pieces[row.number] = pieces = _Pieces(said, time.time())
            self._cut(row, pieces)
            return []
        written = self._pieces.get(row.number)
        if written is not None:
            written.waiting.discard(future)
            written.done[said.start] = said
            size = sum(said.moved.values())
            self._flight.setdefault(row.number, {})[said.start] = (size, size)
            if not written.waiting:
                self._name(row, written)
        return []

    def _cut(self, row: Row, pieces: _Pieces) -> None:
        """Give out the ranges of a row that are not written yet."""
        split = pieces.split
        ranges = [one for one in split.ranges if one[0] not in pieces.done]
        if not ranges:
            self._name(row, pieces)
            return
        count = len(ranges)
        futures = self._client.map(
            write_range,
            [row] * count,
            [self._run] * count,
            [split] * count,
            [start for start, _ in ranges],
            [stop for _, stop in ranges],
            key=[self._key("range", row, f"-{start}") for start, _ in ranges],
            **self._how(),
        )
        pieces.waiting = set(futures)
        self._await(futures, [row] * count)

    def _name(self, row: Row, pieces: _Pieces) -> None:
        done = list(pieces.done.values())
        future = self._client.submit(
            finish_split, row, self._run, pieces.split, done, pieces.begun, key=self._key("name", row), **self._how()
        )
        self._await([future], [row])

    def _failed(self, row: Row, error: BaseException) -> list[Result]:
        """Return the result of a row that Dask gave up."""
        if row.number not in self._open:
            return []
        pieces = self._pieces.pop(row.number, None)
        if pieces is not None:
            for future in pieces.waiting:
                self._tasks.pop(future, None)
            self._client.cancel(list(pieces.waiting))
            self._client.submit(abandon_split, row, pieces.split, pure=False).add_done_callback(lambda _: None)
        return [failed(row, fault_of(error))]

    def _end(self, results: list[Result]) -> None:
        """Bring results into the ledger, then tell of them."""
        if not results:
            return
        self._ledger.write(results)
        for result in results:
            self._open.pop(result.number, None)
            self._flight.pop(result.number, None)
            self._counts[result.status] += 1
            self._bytes += result.virtual_size or 0
            self.results.append(result)
            if self._on_result is not None:
                self._on_result(result)

    # --- the cluster

    def _heard(self, event: Any) -> None:
        said = event[1]
        if isinstance(said, dict) and said.get("row") in self._open:
            self._flight.setdefault(said["row"], {})[said["start"]] = (said["done"], said["total"])

    def _tick(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if now < self._next_tick and not last:
            return
        self._next_tick = now + _TICK
        if not last:
            with contextlib.suppress(OSError):
                self.workers = len(self._client.nthreads())
        if self._on_progress is None:
            return
        flight = [one for parts in self._flight.values() for one in parts.values()]
        counts = self._counts
        self._on_progress(
            FleetProgress(
                self._rows,
                counts[DONE],
                counts[FAILED],
                counts[SKIPPED],
                self._bytes + sum(done for done, _ in flight),
                self._bytes + sum(total for _, total in flight),
                self.workers,
                now - self._begun,
            )
        )

    def _wait_for_scheduler(self) -> None:
        """Wait until Dask has found the scheduler again. Raises FleetError where it gives up."""
        end = time.monotonic() + self._cluster.patience + 5
        while self._client.status == "connecting" and time.monotonic() < end:
            time.sleep(_PAUSE)
        if self._client.status != "running":
            raise FleetError(
                f"the scheduler was lost, with {len(self._open)} of {self._rows} rows not ended",
                file=self._cluster.scheduler,
                hint=f"{self._ledger.path} has the others; say it again to go on",
            )
