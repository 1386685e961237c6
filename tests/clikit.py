"""What the tests of the command line share: one run of it in this process, and the names of its verbs."""

import contextlib
import io
import json
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

from diskmorph.cli import main
from diskmorph.commands import VERBS

ROOT = Path(__file__).resolve().parent.parent
NAMES = [verb.name for verb in VERBS]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Run(NamedTuple):
    """Exit status and both streams."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def ok(self) -> "Run":
        assert self.status == 0, self.err
        return self


def dm(*argv: Any) -> Run:
    """Run the command line in this process."""
    kept = [(number, signal.getsignal(number)) for number in SIGNALS]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(word) for word in argv])
    finally:
        for number, handler in kept:
            signal.signal(number, handler)
    return Run(status, out.getvalue(), err.getvalue())


def documented() -> dict[str, dict[str, str]]:
    """The tables of docs/json.md: for each heading, each key's path and its type."""
    tables: dict[str, dict[str, str]] = {}
    heading = ""
    for line in (ROOT / "docs/json.md").read_text().splitlines():
        if line.startswith("## "):
            heading = line[3:].strip().lower()
        row = re.fullmatch(r"\| ([^|]+) \| ([^|]+) \| (.+) \|", line)
        if row and row[1] not in {"key", "---"}:
            tables.setdefault(heading, {})[row[1]] = row[2]
    return tables
