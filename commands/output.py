"""Where a command's words go: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable

_AT_ONCE = 500  # lines


def printable(text: str) -> str:
    """Return the text with control characters escaped: names inside an image must not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


class Output:
    """The two streams of one run, and how much is to be said on them.

    `json`: the result is one JSON object; `quiet`: no reports, notes or progress; `verbose`: how often `-v` was said.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: int = 0, progress: str = "auto") -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self.progress = progress
        self.stdout: TextIO = sys.stdout
        self.stderr: TextIO = sys.stderr

    def result(self, report: dict[str, Any], lines: Iterable[str]) -> None:
        """Print a result: the object with `--json`, else its lines for people."""
        if self.json:
            self.write_json(report)
            return
        left = iter(lines)
        while some := [printable(line) + "\n" for line in islice(left, _AT_ONCE)]:
            self.stdout.write("".join(some))

    def report(self, report: dict[str, Any], lines: Iterable[str]) -> None:
        """Print what a verb that writes has done: as `result`, but nothing for people with `-q`."""
        self.result(report, () if self.quiet else lines)

    def write_json(self, report: dict[str, Any]) -> None:
        """Print one JSON object on standard output."""
        self.stdout.write(json.dumps(report, indent=2 if self.stdout.isatty() else None) + "\n")

    def line(self, text: str = "") -> None:
        """Print one line of a result."""
        self.stdout.write(printable(text) + "\n")

    def note(self, text: str) -> None:
        """Print something that the user should know on standard error, unless `-q` or `--json` was said."""
        if self.quiet or self.json:
            return
        if self.progress == "json":
            self.stderr.write(json.dumps({"note": text}) + "\n")
            return
        self.stderr.write(f"diskmorph: {printable(text)}\n")

    def detail(self, text: str) -> None:
        """Print a note that only `-v` asks for."""
        if self.verbose:
            self.note(text)

    def error(self, line: str, fault: dict[str, Any]) -> None:
        """Print an error: one line on standard error, and with `--json` the object on standard output."""
        self.stderr.write(f"diskmorph: {printable(' '.join(line.split()))}\n")
        if self.json:
            self.write_json({"error": fault})

    def flush(self) -> None:
        """Bring everything out; raises OSError where it does not get there."""
        self.stdout.flush()
        self.stderr.flush()

    @property
    def colour(self) -> bool:
        """Whether standard output is a terminal that may be coloured."""
        dull = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return self.stdout.isatty() and not dull

    @property
    def width(self) -> int:
        """Columns of the terminal; 100 where there is none."""
        import shutil

        return shutil.get_terminal_size((100, 24)).columns
