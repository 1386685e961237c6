"""Service quotas of EBS: read from the account; where that is not allowed, the published defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diskmorph.convert.aws.faults import AwsError
from diskmorph.convert.aws.session import SHORT

if TYPE_CHECKING:
    from diskmorph.convert.aws.session import Session

PUT, GET, LIST = "PutSnapshotBlock", "GetSnapshotBlock", "ListSnapshotBlocks"

# Amazon EBS endpoints and quotas, "Quotas for EBS direct APIs".
DEFAULTS = {
    "PutSnapshotBlock requests per account": 1000.0,
    "PutSnapshotBlock requests per snapshot": 1000.0,
    "GetSnapshotBlock requests per account": 1000.0,
    "GetSnapshotBlock requests per snapshot": 1000.0,
    "ListSnapshotBlocks requests per account": 50.0,
    "StartSnapshot requests per account": 10.0,
    "CompleteSnapshot requests per account": 10.0,
    "Pending snapshots per account": 100.0,
    "Concurrent snapshot copies per destination Region": 20.0,
}
_WORDS = ("snapshotblock", "changedblocks", "startsnapshot", "completesnapshot", "pending snapshots", "snapshot copies")


@dataclass(frozen=True, slots=True)
class Quota:
    """One quota. `read`: it is the account's; else the published default."""

    name: str
    value: float
    read: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return what `aws plan --json` shows."""
        return asdict(self)


def quotas(session: Session) -> list[Quota]:
    """Return the quotas that an export meets."""
    try:
        rows = list(session.pages("servicequotas:ListServiceQuotas", "Quotas", ServiceCode="ebs", patience=SHORT))
    except AwsError:
        rows = []
    found = [
        Quota(str(row["QuotaName"]), float(row["Value"]))
        for row in rows
        if any(word in str(row.get("QuotaName", "")).lower() for word in _WORDS)
    ]
    return found or [Quota(name, value, read=False) for name, value in DEFAULTS.items()]


def quota_of(session: Session, action: str) -> float:
    """Return how many calls of an action a second the account and one snapshot allow."""
    values = [row.value for row in quotas(session) if row.name.startswith(f"{action} ")]
    return min(values, default=1000.0)
