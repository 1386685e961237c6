"""What a fleet is told to do and what it tells: plain, frozen data that is sent to workers and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import DiskmorphError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.convert.aws.upload import UploadOptions
    from diskmorph.convert.bridge.options import BuildOptions, ExtractOptions
    from diskmorph.convert.options import ConvertOptions
    from diskmorph.formats.policy import Parents

DONE, FAILED, SKIPPED = "done", "failed", "skipped"


class FleetError(DiskmorphError):
    """The cluster cannot be reached, was lost, or gave a row up."""

    kind = "fleet"


@dataclass(frozen=True, slots=True)
class SnapshotOptions:
    """How a row of `aws upload` is done: how its source is read (or built from a tree), how the snapshot is made."""

    upload: UploadOptions
    parents: Parents
    format: str | None = None
    snapshot: str | None = None
    disk: int | None = None
    build: BuildOptions | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One conversion: `number` from 1 in the plan, names that mean the same on every worker, the verb's own options.

    `words`: the options as they were said, for people. `error`: the row cannot be done, whatever a worker finds.
    """

    number: int
    verb: str
    source: str
    target: str | None
    options: ConvertOptions | BuildOptions | ExtractOptions | SnapshotOptions | None
    words: tuple[str, ...] = ()
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What holds for all rows of one run.

    `run`: its name. `digest`: every row tells the SHA-256 of what it converted. `split`: disks of so many bytes and
    more are converted by ranges of `part` bytes, where the target takes ranges; None: never. `per_host`: rows and
    ranges at once on one machine; None: as many as its workers have threads.
    """

    run: str
    digest: bool = True
    split: int | None = None
    part: int = 1 << 30
    per_host: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """How a row ended. Sizes in bytes, times in seconds since 1970; what is not known is None.

    `token` names the row's work: its source's identity, its target and its options. `digest` is that of the disk's
    content, or, with `digest_of` "file", of the target's bytes. `error` is the error object of `--json`.
    """

    number: int
    verb: str
    source: str
    target: str | None
    status: str
    token: str | None = None
    format: str | None = None
    digest: str | None = None
    digest_of: str | None = None
    virtual_size: int | None = None
    stored_size: int | None = None
    seconds: float = 0.0
    started: float | None = None
    worker: str | None = None
    ranges: int | None = None
    snapshot_id: str | None = None
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the object of the ledger and of `--json`; `row` is the number."""
        said = asdict(self)
        return {"row": said.pop("number"), **said, "lost": list(self.lost), "notes": list(self.notes)}


def failed(row: Row, error: Mapping[str, Any], *, seconds: float = 0.0, worker: str | None = None) -> Result:
    """Return the result of a row that failed."""
    return Result(
        row.number, row.verb, row.source, row.target, FAILED, seconds=seconds, worker=worker, error=dict(error)
    )


def fault_of(error: BaseException) -> dict[str, Any]:
    """Return the error object of any exception, as the command line would show it."""
    if isinstance(error, DiskmorphError):
        return error.as_dict()
    if isinstance(error, OSError):
        file = None if error.filename is None else str(error.filename)
        words = str(error.strerror or error)
        return _fault("io", f"{file}: {words}" if file else words, file)
    if isinstance(error, MemoryError):
        return _fault("memory", "there is not enough memory; free some, or run fewer workers")
    if type(error).__name__ == "KilledWorker":
        return _fault("fleet", "every worker that took this row died; see the cluster's log for why")
    return _fault("internal", f"this is a fault in diskmorph: {type(error).__name__}: {error}".rstrip(": "))


def _fault(kind: str, message: str, file: str | None = None) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(("format", "structure", "field", "offset", "expected", "found"))
    return {"kind": kind, "file": file, **empty, "message": message, "hint": None}
