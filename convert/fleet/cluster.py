"""The engine: Dask distributed, on a running cluster or on this machine; it schedules, tries again and carries."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diskmorph._version import __version__
from diskmorph.convert.fleet.rows import FleetError
from diskmorph.formats.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

PLUGIN = "diskmorph-fleet"
_PATIENCE = 60.0
_DEATHS = 8
"""Workers that may die under a row before it is given up, on this machine; else the scheduler's setting counts."""


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Where rows are done.

    `scheduler`: the address of a running one (tcp://, tls://, ws://), None for this machine; `workers`: processes here
    (None: one a core); `per_host`: rows at once on one machine (None: one a thread of every worker); `retries`: further
    tries of a row that failed for a reason that may pass; `patience`: seconds to wait for a scheduler, also for a lost
    one.
    """

    scheduler: str | None = None
    workers: int | None = None
    per_host: int | None = None
    retries: int = 2
    patience: float = _PATIENCE


def require_options(options: ClusterOptions) -> None:
    """Raise OptionError for numbers that make no sense."""
    if options.per_host is not None and options.per_host < 1:
        raise OptionError("--per-host takes a number from 1")
    if options.workers is not None and options.workers < 1:
        raise OptionError("--workers takes a number from 1")
    if options.workers is not None and options.scheduler is not None:
        raise OptionError("--workers are started on this machine", hint="leave out --scheduler, or start them there")
    if options.retries < 0:
        raise OptionError("--retries takes a number from 0")


@contextlib.contextmanager
def connected(options: ClusterOptions) -> Iterator[Any]:
    """Lend a Dask client. Raises UnsupportedError (Dask is missing), FleetError (there is no such cluster)."""
    require_options(options)
    try:
        from distributed import Client  # noqa: PLC0415 - an extra, and heavy
    except ImportError as error:
        raise UnsupportedError(
            "a fleet needs Dask distributed", feature="fleet", hint="install it with pip install 'diskmorph[fleet]'"
        ) from error
    with contextlib.ExitStack() as stack:
        where: Any = options.scheduler
        if where is None:
            where = stack.enter_context(_local(options))
        else:
            _require_scheduler(where, options.patience)
        try:
            client = Client(where, timeout=options.patience, set_as_default=False)
        except (OSError, ValueError) as error:
            raise FleetError(f"the scheduler cannot be reached: {error}", file=options.scheduler) from error
        try:
            yield client
        finally:
            with contextlib.suppress(Exception):
                client.close(timeout=5)


def _require_scheduler(address: str, patience: float) -> None:
    """Raise FleetError where nothing at an address speaks as Dask does; a Client that fails would linger, and talk."""
    import asyncio  # noqa: PLC0415 - loads when used

    from distributed.core import connect  # noqa: PLC0415 - loads when used
    from distributed.security import Security  # noqa: PLC0415 - loads when used

    async def greet() -> None:
        words = Security().get_connection_args("client")
        # Dask's own timeout does not hold for the greeting, for which a stranger may let it wait.
        comm = await asyncio.wait_for(connect(address, timeout=patience, **words), patience + 1)
        await comm.close()

    hint = "tcp://HOST:PORT, as `dask scheduler` says when it starts; TLS is set up in Dask's own configuration"
    try:
        asyncio.run(greet())
    except TimeoutError as error:
        raise FleetError("what is there does not answer as a Dask scheduler does", file=address, hint=hint) from error
    except OSError as error:
        raise FleetError(f"the scheduler cannot be reached: {error}", file=address) from error
    except (ValueError, TypeError) as error:
        raise FleetError(f"this is no scheduler's address: {error}", file=address, hint=hint) from error
    except Exception as error:  # whatever a stranger's answer brings about in Dask, even MemoryError
        raise FleetError("what is there does not answer as a Dask scheduler does", file=address, hint=hint) from error


@contextlib.contextmanager
def _local(options: ClusterOptions) -> Iterator[Any]:
    """Lend a cluster on this machine: processes of one thread each."""
    import logging  # noqa: PLC0415 - loads when used

    import dask  # noqa: PLC0415 - loads when used
    from distributed import LocalCluster  # noqa: PLC0415 - loads when used

    count = options.workers or len(os.sched_getaffinity(0))
    if options.per_host is not None:
        count = min(count, options.per_host)
    words = {"distributed.scheduler.allowed-failures": _DEATHS, "distributed.worker.profile.enabled": False}
    with dask.config.set(words), contextlib.ExitStack() as stack:
        with _deaf():
            cluster = LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            )
            stack.enter_context(cluster)
        yield cluster


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Let processes that are started meanwhile not heed Ctrl-C, which a terminal sends to all: this one ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heard)


def prepare(client: Any, *, local: bool) -> None:
    """Let every worker, those to come as well, be ready for rows; `local`: they are this process's own.

    Raises FleetError where one is not fit, OSError where the scheduler is lost.
    """
    from diskmorph.convert.fleet.plugin import FleetPlugin  # noqa: PLC0415 - derives from Dask's class

    try:
        client.register_plugin(FleetPlugin(__version__, local=local), name=PLUGIN)
    except OSError:
        raise
    except Exception as error:
        raise FleetError(
            f"a worker cannot do rows: {type(error).__name__}: {error}",
            hint=f"every worker needs diskmorph {__version__}",
        ) from error


def release(client: Any) -> None:
    """Leave a running cluster as it was."""
    with contextlib.suppress(Exception):
        client.unregister_worker_plugin(PLUGIN)
