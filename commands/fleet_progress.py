"""How far a fleet is: rows and bytes, on a terminal's last line, or one JSON object a line, on standard error."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diskmorph.commands.output import printable
from diskmorph.commands.text import duration_text, size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.commands.output import Output
    from diskmorph.convert.fleet import FleetProgress, Result


class Show:
    """Says nothing; the others derive from it."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self.told: set[int] = set()
        """Rows whose failure a person has seen already."""

    def progress(self, now: FleetProgress) -> None:
        """Take note of how far the fleet is."""

    def result(self, result: Result) -> None:
        """Take note of a row that has ended; `-v` tells of each."""
        if self._out.verbose and not self._out.json:
            self._out.note(row_line(result))

    def close(self) -> None:
        """Take note that the fleet has ended, well or not."""


class _Lines(Show):
    def progress(self, now: FleetProgress) -> None:
        row = {
            "phase": "fleet",
            "done": now.bytes_done,
            "total": now.bytes_total,
            "rows": {"total": now.rows, "done": now.done, "failed": now.failed, "skipped": now.skipped},
            "workers": now.workers,
            "seconds": round(now.seconds, 3),
        }
        self._out.stderr.write(json.dumps(row) + "\n")
        self._out.stderr.flush()


class _Bar(Show):
    def progress(self, now: FleetProgress) -> None:
        width = shutil.get_terminal_size((80, 24)).columns - 1
        self._out.stderr.write("\r" + bar_text(now, width) + "\x1b[K")
        self._out.stderr.flush()

    def result(self, result: Result) -> None:
        if self._out.verbose or result.status == "failed":
            self._out.stderr.write(f"\r\x1b[K{printable(row_line(result))}\n")
            self.told.add(result.number)

    def close(self) -> None:
        self._out.stderr.write("\r\x1b[K")
        self._out.stderr.flush()


@contextmanager
def fleet_progress(out: Output) -> Iterator[Show]:
    """Yield what a run tells of its progress and its rows."""
    how = out.progress
    if how == "auto":
        how = "bar" if out.stderr.isatty() and not out.json else "none"
    if out.quiet and how == "bar":
        how = "none"
    show = {"bar": _Bar, "json": _Lines, "none": Show}[how](out)
    try:
        yield show
    finally:
        show.close()


def row_line(result: Result) -> str:
    """Return one line on a row that has ended."""
    if result.error is None:
        return f"row {result.number}: {result.source}: {result.status} in {result.seconds:.1f} s"
    message = str(result.error.get("message"))
    named = "" if message.startswith(result.source) else f"{result.source}: "
    return f"row {result.number}: failed: {named}{message}"


def bar_text(now: FleetProgress, width: int) -> str:
    """Return the last line of the terminal, at most `width` columns."""
    ended = now.done + now.failed + now.skipped
    share = ended / now.rows if now.rows else 1.0
    failed = f", {now.failed} failed" if now.failed else ""
    rate = now.bytes_done / now.seconds if now.seconds > 0 else 0.0
    left = "-:--" if not ended else duration_text(now.seconds / ended * (now.rows - ended))
    workers = f"{now.workers} worker{'' if now.workers == 1 else 's'}"
    head = f"rows {share:4.0%} "
    tail = (
        f" {ended} of {now.rows} rows{failed}  {size_text(now.bytes_done)}  {size_text(rate)}/s  {workers}  {left} left"
    )
    room = width - len(head) - len(tail) - 2
    if room < 5:
        return (head + tail.strip())[:width]
    full = int(share * room)
    return f"{head}[{'#' * full}{'.' * (room - full)}]{tail}"
