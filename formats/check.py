"""What a format's check reports and how a repair changes an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

ERROR, WARNING, LEAK = "error", "warning", "leak"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: in which structure, at which byte of the file, in words, how severe.

    `severity` is "error" (data is or may become wrong), "leak" (room is lost) or "warning" (harmless, but not by the
    specification).
    """

    structure: str
    offset: int | None
    message: str
    severity: str = ERROR


class Patch(NamedTuple):
    """Bytes to be written at `offset` of the image file as a repair; `why` stands in the journal.

    `sync`: what comes before must be on stable storage first.
    """

    offset: int
    data: bytes
    why: str
    sync: bool = False


@dataclass(slots=True)
class CheckReport:
    """The outcome of a check. `patches` mend what `repairs` asked for; writing them is the caller's."""

    format: str
    findings: list[Finding] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)
    omitted: int = 0
    """Findings beyond the first few thousand, counted but not listed."""
    corruptions: int = 0
    leaks: int = 0

    LIMIT: ClassVar[int] = 1000

    def add(self, structure: str, offset: int | None, message: str, severity: str = ERROR, count: int = 1) -> None:
        """Note a finding that stands for `count` like it."""
        self.corruptions += count if severity == ERROR else 0
        self.leaks += count if severity == LEAK else 0
        if len(self.findings) < self.LIMIT:
            self.findings.append(Finding(structure, None if offset is None else int(offset), message, severity))
        else:
            self.omitted += 1

    @property
    def clean(self) -> bool:
        """Whether nothing was found but warnings."""
        return not any(f.severity != WARNING for f in self.findings)
