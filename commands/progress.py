"""How far a job is, told on standard error: a bar on a terminal, or one JSON object a line."""

from __future__ import annotations

import json
import shutil
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diskmorph.commands.text import duration_text, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.commands.output import Output
    from diskmorph.convert.options import Progress

_PATIENCE = 0.3
"""Seconds before a bar appears: what is over sooner needs none."""
_PAUSE = 0.1
"""Seconds between two pictures of the bar, or two lines of JSON."""


@contextmanager
def progress(out: Output, doing: str) -> Iterator[Callable[[Progress], None]]:
    """Yield what a job calls with its Progress; `doing` is the bar's first word where the job names no phase."""
    teller = _teller(out, doing)
    try:
        yield teller.tell
    finally:
        teller.close()


def _teller(out: Output, doing: str) -> _Teller:
    how = out.progress
    if how == "auto":
        how = "bar" if out.stderr.isatty() and not out.quiet and not out.json else "none"
    if out.quiet and how == "bar":
        how = "none"
    return {"bar": _Bar, "json": _Lines, "none": _Teller}[how](out, doing)


class _Teller:
    """Says nothing; the others derive from it."""

    def __init__(self, out: Output, doing: str) -> None:
        self._out = out
        self._doing = doing
        self._lock = threading.Lock()
        self._next = 0.0

    def tell(self, now: Progress) -> None:
        """Take note of how far the job is; may be called from any thread, and often."""

    def close(self) -> None:
        """Take note that the job is over, well or not."""

    def _due(self) -> bool:
        at = time.monotonic()
        if at < self._next:
            return False
        self._next = at + _PAUSE
        return True


class _Lines(_Teller):
    """One JSON object a line: `phase`, `done` and `total` in bytes, `seconds` since the start."""

    def __init__(self, out: Output, doing: str) -> None:
        super().__init__(out, doing)
        self._start = time.monotonic()
        self._last: Progress | None = None

    def tell(self, now: Progress) -> None:
        with self._lock:
            if self._last is not None and self._last.phase != now.phase:
                self._put(self._last)  # how a phase ended is always told
            self._last = now
            if self._due():
                self._put(now)

    def close(self) -> None:
        if self._last is not None:
            self._put(self._last)

    def _put(self, now: Progress) -> None:
        seconds = round(time.monotonic() - self._start, 3)
        row = {"phase": now.phase or self._doing, "done": now.done, "total": now.total, "seconds": seconds}
        self._out.stderr.write(json.dumps(row) + "\n")
        self._out.stderr.flush()
        self._last = None


class _Bar(_Teller):
    """One line that is drawn anew: share, bar, bytes, rate, time left."""

    def __init__(self, out: Output, doing: str) -> None:
        super().__init__(out, doing)
        self._start = time.monotonic()
        self._next = self._start + _PATIENCE
        self._phase = ""
        self._phase_start = self._start
        self._phase_done = 0
        self._drawn = False

    def tell(self, now: Progress) -> None:
        with self._lock:
            if now.phase != self._phase:
                self._phase, self._phase_start, self._phase_done = now.phase, time.monotonic(), now.done
            if self._due():
                self._draw(now)

    def close(self) -> None:
        if self._drawn:
            self._out.stderr.write("\r\x1b[K")
            self._out.stderr.flush()

    def _draw(self, now: Progress) -> None:
        width = shutil.get_terminal_size((80, 24)).columns - 1
        text = bar_text(
            now,
            _DOING.get(now.phase, now.phase or self._doing),
            time.monotonic() - self._phase_start,
            self._phase_done,
            width,
        )
        self._out.stderr.write("\r" + text + "\x1b[K")
        self._out.stderr.flush()
        self._drawn = True


_DOING = {
    "fetch": "fetching",
    "convert": "converting",
    "verify": "verifying",
    "compare": "comparing",
    "digest": "hashing",
}
"""What a phase is called on the bar; in JSON it keeps its own name."""


def bar_text(now: Progress, doing: str, seconds: float, first: int, width: int) -> str:
    """Return the bar's line, at most `width` columns; `first` bytes were done before these `seconds` began."""
    share = now.done / now.total if now.total else 1.0
    rate = (now.done - first) / seconds if seconds > 0 else 0.0
    left = duration_text((now.total - now.done) / rate) if rate > 0 else "-:--"
    head = f"{doing} {share:4.0%} "
    tail = f" {size_text(now.done)} of {size_text(now.total)}  {size_text(rate)}/s  {left} left"
    room = width - len(head) - len(tail) - 2
    if room < 5:
        return (head + tail.strip())[:width]
    full = int(share * room)
    return f"{head}[{'#' * full}{'.' * (room - full)}]{tail}"
