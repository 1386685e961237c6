"""How far a run is, and what it came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from diskmorph.convert.fleet.rows import DONE, FAILED, SKIPPED

if TYPE_CHECKING:
    from diskmorph.convert.fleet.rows import Result


class FleetProgress(NamedTuple):
    """How far a run is: rows by how they ended, bytes of their disks, workers, seconds since the start."""

    rows: int
    done: int
    failed: int
    skipped: int
    bytes_done: int
    bytes_total: int
    workers: int
    seconds: float


@dataclass(slots=True)
class Summary:
    """What a run came to; `results` by the rows' order."""

    run: str
    results: list[Result]
    seconds: float
    workers: int = 0

    def counts(self) -> dict[str, int]:
        """Return the number of rows, in all and by how they ended."""
        found = Counter(result.status for result in self.results)
        return {"total": len(self.results), **{status: found[status] for status in (DONE, FAILED, SKIPPED)}}

    def bytes(self) -> int:
        """Return the bytes of the disks that were converted by this run."""
        return sum(result.virtual_size or 0 for result in self.results if result.status == DONE)
