"""What is asked of a conversion and what is told of it: plain, frozen data that can be sent elsewhere."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from diskmorph.formats.errors import OptionError
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Parents

if TYPE_CHECKING:
    from collections.abc import Mapping


_MOST_BYTES = 1 << 63  # as a file's size can be


class Progress(NamedTuple):
    """How far a job is: bytes of the disk done, of how many, in which phase."""

    phase: str
    done: int
    total: int


OnProgress = "Callable[[Progress], None]"


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert. Sizes in bytes; defaults are the command line's.

    - `source_format`, `target_format`: else by content, and by the target's suffix.
    - `format_options`: the `-o` words of the target's format.
    - `compress`: None, "default", or CODEC[:LEVEL] such as "zstd" or "deflate:9".
    - `base`: write an overlay on this image, only what differs from it (`-B`).
    - `snapshot`: an internal snapshot as the source.
    - `disk`: the number, from 1, of a package's disk as the source; needed where it has several.
    - `size`: another virtual size; data is never cut.
    - `zero_unit`: unit of zero detection (`-S`); 0 writes everything, holes included.
    - `profile`: a target's name (`--for azure`).
    - `digest`, `verify`, `reproducible`, `sync`, `force`, `dry_run`, `device`: as on the command line.
    - `target_passphrase`: what an encrypted target (`encrypt.format=luks`) is opened with; else the source's.
    - `resume`: keep a journal beside the target, and go on where one that is there stops.
    - `keep_chain`: each layer of a chain becomes a file of its own, instead of one disk of all.
    - `also`: further targets of the same read; their formats are said by their suffixes.
    - `label`: the volume's label, of an ISO.
    - `rate`: bytes a second at most; `threads`: workers (None: one a core).
    - `parents`, `limits`: what the source may open (anything that `Parents.of` takes) and cost.

    Raises OptionError for values of another kind: words are strings (format options also numbers and bools).
    """

    source_format: str | None = None
    target_format: str | None = None
    format_options: Mapping[str, str] = field(default_factory=dict)
    compress: str | None = None
    base: Path | str | None = None
    base_format: str | None = None
    snapshot: str | None = None
    disk: int | None = None
    size: int | None = None
    zero_unit: int = 4096
    profile: str | None = None
    digest: bool = False
    verify: bool = False
    reproducible: bool = False
    rate: int | None = None
    sync: bool = True
    force: bool = False
    dry_run: bool = False
    device: bool = False
    resume: bool = False
    target_passphrase: bytes | None = field(default=None, repr=False)
    keep_chain: bool = False
    also: tuple[str, ...] = ()
    label: str | None = None
    threads: int | None = None
    parents: Parents = field(default_factory=Parents)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Bring words into their form. Raises OptionError for what is none."""
        object.__setattr__(self, "parents", Parents.of(self.parents))
        object.__setattr__(self, "format_options", {name: _word(name, it) for name, it in self.format_options.items()})
        if self.compress is not None and not isinstance(self.compress, str):
            raise OptionError(f"compress is a word, not {self.compress!r}", hint='"default", or one such as "zstd:3"')
        for name in ("size", "zero_unit", "rate"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else whole_bytes(value, name))


def _word(name: str, value: object) -> str:
    """Return an option's value as it is said on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str | int):
        return str(value)
    raise OptionError(f"option {name}={value!r} is neither a word nor a number")


def whole_bytes(value: object, name: str) -> int:
    """Return a size in bytes that a caller gave. Raises OptionError."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise OptionError(f"{name} is a number of bytes, not {value!r}", hint="10 << 30 is 10 GiB")
    number = operator.index(value)
    if not 0 <= number < _MOST_BYTES:
        raise OptionError(f"{name} of {number} bytes is no size", hint=f"from 0 to {_MOST_BYTES - 1}")
    return number


@dataclass(slots=True)
class Moved:
    """Bytes of the disk by how they were moved; they sum to the virtual size."""

    cloned: int = 0
    copied: int = 0
    encoded: int = 0
    passed: int = 0
    skipped: int = 0

    def total(self) -> int:
        """Return the sum."""
        return self.cloned + self.copied + self.encoded + self.passed + self.skipped


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was done (or with `dry_run` would be). Sizes in bytes; `lost` names what the target cannot hold."""

    source: str
    target: str
    format: str
    virtual_size: int
    stored_size: int
    bytes: Moved
    seconds: float
    verified: bool
    lost: tuple[str, ...]
    notes: tuple[str, ...] = ()
    digest: str | None = None
    members: tuple[str, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)
    """What the importer must be told of the image (`--for openstack`)."""
    also: tuple[ConvertReport, ...] = ()
    """Of the further targets (`--also`)."""
    resumed: int = 0
    """Bytes of the disk that an earlier try had done (`--resume`)."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of docs/json.md."""
        report = asdict(self)
        report["lost"] = list(self.lost)
        report["notes"] = list(self.notes)
        report["members"] = list(self.members)
        report["properties"] = dict(self.properties)
        report["also"] = [other.as_dict() for other in self.also]
        for key in ("properties", "also", "resumed"):
            if not report[key]:
                del report[key]
        return report


@dataclass(frozen=True, slots=True)
class Measurement:
    """The size that a target would have: `required` bytes now, `fully_allocated` with every unit stored."""

    format: str
    required: int
    fully_allocated: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether two disks hold the same bytes; `ranges` are (start, length) of what differs, the first `max` of them."""

    identical: bool
    first_difference: int | None
    ranges: tuple[tuple[int, int], ...]
    sizes: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Digest:
    """The hash of a disk's content as the guest sees it."""

    file: str
    algorithm: str
    digest: str
    virtual_size: int


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found and, with repair, mended; see formats/check.py for findings."""

    file: str
    format: str
    clean: bool
    corruptions: int
    leaks: int
    repaired: int
    findings: tuple[dict[str, Any], ...]
    journal: str | None = None
