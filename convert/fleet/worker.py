"""What a row knows of the worker that it runs on; everything works without one too, as in `fleet plan`."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import DiskmorphError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.convert.fleet.rows import RunOptions
    from diskmorph.convert.options import Progress

TOPIC = "diskmorph-fleet"
"""Where workers log how far their rows are."""
_PAUSE = 1.0
"""Seconds between two words about a row."""


class CancelledError(DiskmorphError):
    """Nobody wants the row any more; nothing of it stays."""

    kind = "interrupted"


def _worker() -> Any:
    """Return Dask's worker that this runs on, None where there is none."""
    import sys  # noqa: PLC0415

    if "distributed" not in sys.modules:  # then this is no worker, and Dask need not load
        return None
    from distributed import get_worker  # noqa: PLC0415 - an extra, and heavy

    try:
        return get_worker()
    except ValueError:
        return None


def here() -> str | None:
    """Return the worker's address."""
    worker = _worker()
    return None if worker is None else str(worker.address)


def threads() -> int | None:
    """Return how many threads a row may use: one on a worker with a process a core, else what the pipeline takes."""
    worker = _worker()
    return None if worker is None else 1


def scratch() -> str | None:
    """Return the worker's own folder for temporary files, which Dask removes when the worker has died."""
    worker = _worker()
    return None if worker is None else str(worker.local_directory)


@contextlib.contextmanager
def slot(run: RunOptions) -> Iterator[None]:
    """Hold one of the run's places on this machine: a lease of a Dask Semaphore, which the death of its holder ends."""
    worker = _worker()
    if worker is None or run.per_host is None:
        yield
        return
    from distributed import Semaphore  # noqa: PLC0415 - an extra, and heavy

    host = str(worker.address).rpartition(":")[0]
    with Semaphore(max_leases=run.per_host, name=f"diskmorph-{run.run}-{host}"):
        yield


class Pulse:
    """Tells how far a row is, now and then, and ends it when it was cancelled; called as `on_progress`.

    `start`: where the range begins that it is told of, where the row is cut.
    """

    def __init__(self, row: int, start: int = 0) -> None:
        self._row, self._start = row, start
        self._next = time.monotonic() + _PAUSE
        self._worker = _worker()
        self._key = None if self._worker is None else self._worker.get_current_task()

    def __call__(self, now: Progress) -> None:
        """Take note of progress. Raises CancelledError."""
        at = time.monotonic()
        if self._worker is None or at < self._next:
            return
        self._next = at + _PAUSE
        task = self._worker.state.tasks.get(self._key)
        if task is None or task.state in {"cancelled", "released", "forgotten"}:
            raise CancelledError("the row was cancelled")
        self._worker.log_event(TOPIC, {"row": self._row, "start": self._start, "done": now.done, "total": now.total})
