"""Waiting until AWS has really done what it said it would do."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from diskmorph.convert.aws.faults import AwsError
from diskmorph.convert.aws.rates import pause
from diskmorph.convert.options import Progress
from diskmorph.formats.numbers import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.convert.aws.session import Session

_FIRST, _FACTOR, _MOST = 0.25, 1.4, 10.0
_PATIENCE = 6 * 3600.0
"""Seconds after which a snapshot or an image that is still pending is given up."""


def ticks(what: str, action: str, stop: threading.Event | None = None, patience: float = _PATIENCE) -> Iterator[None]:
    """Yield at once, then at growing intervals. Raises AwsError after `patience` seconds, Stopped by `stop`."""
    begun, delay = time.monotonic(), _FIRST
    while True:
        yield
        if time.monotonic() - begun > patience:
            raise AwsError(f"{action}: {what} is still pending after {patience / 3600:.0f} hours", action=action)
        pause(delay, stop)
        delay = min(_MOST, delay * _FACTOR)


def wait_snapshot(
    session: Session,
    id: str,
    region: str,
    on_progress: Callable[[Progress], None],
    *,
    size: int = 100,
    born: float | None = None,
) -> None:
    """Wait until a snapshot of a disk of `size` bytes is completed. Raises AwsError where it ends otherwise."""
    action = "ec2:DescribeSnapshots"
    for _ in ticks(id, action):
        row = session.call(action, region=region, born=born, SnapshotIds=[id])["Snapshots"][0]
        state = row["State"]
        on_progress(Progress("complete", size * _percent(row.get("Progress")) // 100, size))
        if state == "completed":
            on_progress(Progress("complete", size, size))
            return
        if state not in {"pending", "recovering"}:
            why = row.get("StateMessage") or "AWS gives no reason"
            raise AwsError(f"snapshot {id} ended in the state {state}: {why}", action=action, code=state)


def wait_image(
    session: Session, id: str, region: str, *, born: float | None = None, stop: threading.Event | None = None
) -> Any:
    """Wait until an image is available; return it. Raises AwsError where it ends otherwise."""
    action = "ec2:DescribeImages"
    for _ in ticks(id, action, stop):
        rows = session.call(action, region=region, born=born, stop=stop, ImageIds=[id])["Images"]
        state = rows[0]["State"] if rows else "pending"
        if state == "available":
            return rows[0]
        if state not in {"pending", "transient"}:
            why = (rows[0].get("StateReason") or {}).get("Message") or "AWS gives no reason"
            raise AwsError(f"image {id} in {region} ended in the state {state}: {why}", action=action, code=state)
    raise AssertionError


def _percent(text: str | None) -> int:
    """Return the number of `42%`."""
    return min(99, whole_number((text or "0").rstrip("%"), 100) or 0)
