"""How fast to ask: a token bucket that all workers share, filled at a rate that AWS's own answers steer.

The quota is the bound. A throttled call cuts the rate to less than what was being accepted; calm raises it slowly
(additive increase, multiplicative decrease).
"""

from __future__ import annotations

import threading
import time

_CUT = 0.75
_CUT_PAUSE = 0.5
"""Seconds within which further refusals belong to the same cut."""
_GROWTH = 0.02
"""Share of the quota by which the rate grows in a second."""
_BURST = 0.05
"""Seconds of calls that may be made at once after a pause."""


class Stopped(Exception):  # noqa: N818 - no error of its own: another's failure is told
    """Work was stopped because of another's failure."""


class Rate:
    """At most `most` calls a second, fewer after refusals. Thread-safe."""

    def __init__(self, most: float) -> None:
        self.most = max(1.0, most)
        self._rate = self.most
        self._lock = threading.Lock()
        self._next = 0.0
        self._grown = self._window = time.monotonic()
        self._cut_at = self._grown - 60.0  # the first refusal counts
        self._accepted = 0

    @property
    def now(self) -> float:
        """The rate at present, in calls a second."""
        return self._rate

    def take(self, stop: threading.Event | None = None) -> None:
        """Wait for leave to make one call. Raises Stopped when `stop` is set."""
        with self._lock:
            at = time.monotonic()
            if at - self._cut_at > 1.0:
                self._rate = min(self.most, self._rate + _GROWTH * self.most * (at - self._grown))
            self._grown = at
            self._next = max(self._next, at - _BURST) + 1.0 / self._rate
            delay = self._next - at
        pause(delay, stop)

    def accepted(self) -> None:
        """Take note of a call that went through."""
        with self._lock:
            at = time.monotonic()
            if at - self._window > 1.0:
                self._window, self._accepted = at - 0.5, self._accepted // 2
            self._accepted += 1

    def refused(self) -> None:
        """Take note of a throttled call."""
        with self._lock:
            at = time.monotonic()
            if at - self._cut_at < _CUT_PAUSE:
                return
            seen = at - self._window
            measured = self._accepted / seen if seen > 0.2 and self._accepted else self._rate
            self._rate = max(1.0, min(self._rate, measured) * _CUT)
            self._cut_at = self._grown = self._window = at
            self._accepted = 0
            self._next = max(self._next, at)


def pause(seconds: float, stop: threading.Event | None) -> None:
    """Sleep; raise Stopped as soon as `stop` is set."""
    if stop is None:
        if seconds > 0:
            time.sleep(seconds)
        return
    if stop.is_set() or (seconds > 0 and stop.wait(seconds)):
        raise Stopped
