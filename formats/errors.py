"""The closed set of errors that diskmorph raises, each with the place it concerns.

A caller of the library catches `DiskmorphError`; its attributes say where the fault lies, so that a program need not
parse the message. The message is composed once, in `__str__`.
"""

from __future__ import annotations

from typing import Any, Self


class DiskmorphError(Exception):
    """Something that diskmorph refuses or cannot do.

    `problem` is what is wrong in plain words; `file`, `format`, `structure`, `field`, `offset` (bytes from the start
    of `file`), `expected` and `found` say where, as far as known; `hint` says what to do about it.
    """

    kind = "error"

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        format: str | None = None,
        structure: str | None = None,
        field: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.file = file
        self.format = format
        self.structure = structure
        self.field = field
        self.offset = None if offset is None else int(offset)
        self.expected = expected
        self.found = found
        self.hint = hint

    def located(self, *, file: str | None = None, format: str | None = None, offset: int | None = None) -> Self:
        """Return self with the places that are still unknown filled in; for callers that know more than the raiser."""
        if self.file is None:
            self.file = file
        if self.format is None:
            self.format = format
        if self.offset is None and offset is not None:
            self.offset = int(offset)
        return self

    def place(self) -> str:
        """Return `structure.field at offset N: expected X, found Y`, as far as known."""
        where = ".".join(word for word in (self.structure, self.field) if word)
        if self.offset is not None:
            where = f"{where} at offset {self.offset}".strip()
        values = [
            f"{word} {value}"
            for word, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        return ": ".join(part for part in (where, ", ".join(values)) if part)

    def __str__(self) -> str:
        text = f"{self.file}: {self.problem}" if self.file else self.problem
        place = self.place()
        if place:
            text += f" ({place})"
        if self.hint:
            text += f"; {self.hint}"
        return " ".join(text.split())

    def as_dict(self) -> dict[str, Any]:
        """Return the error object of the command line's `--json` (docs/json.md)."""
        return {
            "kind": self.kind,
            "file": self.file,
            "format": self.format,
            "structure": self.structure,
            "field": self.field,
            "offset": self.offset,
            "expected": None if self.expected is None else str(self.expected),
            "found": None if self.found is None else str(self.found),
            "message": str(self),
            "hint": self.hint,
        }


class FormatError(DiskmorphError):
    """An image is damaged, truncated or contradicts its specification."""

    kind = "format"


class UnsupportedError(DiskmorphError):
    """An image or a request uses a feature that diskmorph does not have; `feature` names it."""

    kind = "unsupported"

    def __init__(self, problem: str, *, feature: str = "", **place: Any) -> None:
        super().__init__(problem, **place)
        self.feature = feature


class PolicyError(DiskmorphError):
    """Something was refused that an option would allow; `option` names it and stands in the hint."""

    kind = "policy"

    def __init__(self, problem: str, *, option: str = "", **place: Any) -> None:
        super().__init__(problem, **place)
        self.option = option


class TargetError(DiskmorphError):
    """A target cannot be written: it exists, has no room, or cannot hold what it should."""

    kind = "target"


class SourceError(DiskmorphError):
    """A source cannot be opened or read: missing, a special file, an input/output error."""

    kind = "source"


class IntegrityError(DiskmorphError):
    """What was moved is not what was planned, or a digest does not agree."""

    kind = "integrity"


class OptionError(DiskmorphError):
    """An option has a name or a value that the format does not know."""

    kind = "option"
