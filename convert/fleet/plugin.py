"""What every worker gets before its first row."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from distributed import WorkerPlugin

from diskmorph._version import __version__

if TYPE_CHECKING:
    from distributed import Worker


class FleetPlugin(WorkerPlugin):  # type: ignore[misc]  # Dask is not typed
    """Refuses workers of another version, and loads what rows need, so that the first takes no longer than others.

    `local`: the worker belongs to the client, which alone heeds Ctrl-C; Dask starts it anew when it has died.
    """

    idempotent = True

    def __init__(self, version: str, *, local: bool) -> None:
        self._version, self._local = version, local

    def setup(self, worker: Worker) -> Any:
        """See WorkerPlugin. Raises RuntimeError."""
        if __version__ != self._version:
            raise RuntimeError(f"{worker.address} has diskmorph {__version__}, not {self._version}")
        if self._local and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        import diskmorph.convert.fleet.perform  # noqa: PLC0415
        import diskmorph.convert.job  # noqa: F401, PLC0415
