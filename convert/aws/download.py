"""`aws download`: a snapshot, or an image's root volume, into any format; or what changed, as an overlay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diskmorph.convert.aws.faults import AwsError
from diskmorph.convert.aws.snapshots import SnapshotDisk, open_snapshot, snapshot_of
from diskmorph.convert.opening import open_source
from diskmorph.convert.routes import converter
from diskmorph.formats.errors import OptionError
from diskmorph.formats.views import Overlay

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.convert.aws.session import Session
    from diskmorph.convert.options import ConvertOptions, ConvertReport, Progress


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What was written: `listed` blocks are in the snapshot (or changed), `fetched` were read."""

    snapshot_id: str
    target: str
    format: str
    listed: int
    fetched: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return what `aws download --json` shows."""
        return {
            "snapshot_id": self.snapshot_id,
            "target": self.target,
            "format": self.format,
            "blocks": {"listed": self.listed, "fetched": self.fetched},
        }


def download(
    session: Session,
    what: str,
    target: str,
    options: ConvertOptions,
    *,
    since: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Downloaded:
    """Fetch a snapshot (or an image's root volume) into a file of any format.

    With `since`, only blocks that changed since that snapshot are fetched; the rest is that of `options.base`, an
    image of it, and the target an overlay on that. The target appears complete or not at all. Raises AwsError, and what
    `convert` raises.
    """
    if since is not None and options.base is None:
        raise OptionError("--since needs -B BASE", hint=f"name an image of {since}, on which DST becomes an overlay")
    snapshot = snapshot_of(session, what)
    with _opened(session, snapshot, since) as disk:
        if since is None:
            report = _converted(disk, target, options, on_progress)
        else:
            report = _over_base(disk, target, options, on_progress)
        return Downloaded(snapshot, target, report.format, disk.listed, disk.source.fetched, report.notes)


def _opened(session: Session, snapshot: str, since: str | None) -> SnapshotDisk:
    try:
        return open_snapshot(session, snapshot, since=since)
    except AwsError as error:
        if since is None or error.action != "ebs:ListChangedBlocks":
            raise
        raise AwsError(
            f"what changed in {snapshot} since {since} cannot be told: {error.problem}",
            action=error.action,
            code=error.code,
            hint="--since takes an earlier snapshot of the same volume",
        ) from error


def _over_base(
    disk: SnapshotDisk, target: str, options: ConvertOptions, on_progress: Callable[[Progress], None] | None
) -> ConvertReport:
    """Convert changes laid over the base: blocks that the base has stay unread on both sides."""
    assert options.base is not None  # noqa: S101 - `download` saw to it
    parents = replace(options.parents, backing=None)
    with open_source(options.base, format=options.base_format, parents=parents, limits=options.limits) as base:
        return _converted(Overlay(disk, base.disk), target, options, on_progress)


def _converted(
    disk: SnapshotDisk | Overlay,
    target: str,
    options: ConvertOptions,
    on_progress: Callable[[Progress], None] | None,
) -> ConvertReport:
    return converter(disk, target, options)(disk, target, options=options, on_progress=on_progress)
