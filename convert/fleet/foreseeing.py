"""`foresee` for all rows: here one after the other, on a cluster where sources are seen there or are to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diskmorph.convert.fleet.cluster import ClusterOptions, connected, prepare, release
from diskmorph.convert.fleet.foresee import FAIL, Foreseen, foresee
from diskmorph.convert.fleet.rows import fault_of
from diskmorph.convert.options import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskmorph.convert.fleet.rows import Row, RunOptions


def foresee_all(
    rows: Sequence[Row],
    run: RunOptions,
    cluster: ClusterOptions,
    *,
    exact: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Foreseen]:
    """Return what would become of each row. Raises FleetError, UnsupportedError (Dask is missing and needed)."""
    tell = on_progress or (lambda _: None)
    if cluster.scheduler is None and not exact:
        found = []
        for number, row in enumerate(rows):
            tell(Progress("plan", number, len(rows)))
            found.append(foresee(row, run))
        return found
    with connected(cluster) as client:
        try:
            prepare(client, local=cluster.scheduler is None)
            return _on_cluster(client, rows, run, exact, tell)
        finally:
            if cluster.scheduler is not None:
                release(client)


def _on_cluster(
    client: Any,
    rows: Sequence[Row],
    run: RunOptions,
    exact: bool,
    tell: Callable[[Progress], None],
) -> list[Foreseen]:
    from distributed import as_completed  # noqa: PLC0415 - an extra, and heavy

    count = len(rows)
    keys = [f"plan-{run.run}-{row.number}" for row in rows]
    futures = client.map(foresee, rows, [run] * count, [exact] * count, key=keys, pure=False)
    places = {future.key: number for number, future in enumerate(futures)}
    found: list[Foreseen | None] = [None] * count
    for done, future in enumerate(as_completed(futures, loop=client.loop), 1):
        row = rows[places[future.key]]
        if future.status == "finished":
            found[places[future.key]] = future.result()
        else:
            error = future.exception()
            blank = Foreseen(row.number, row.verb, row.source, row.target, FAIL)
            found[places[future.key]] = Foreseen(
                blank.number, blank.verb, blank.source, blank.target, FAIL, error=fault_of(error)
            )
        tell(Progress("plan", done, count))
    return [one for one in found if one is not None]
