"""Threads end before the call that began them does, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import diskmorph
from diskmorph.convert.windows import Grid, windows
from diskmorph.convert.workers import Crew
from diskmorph.formats.errors import TargetError
from diskmorph.formats.views import Zero

from testkit import MIB, TIB


def test_the_digest_ends_when_the_conversion_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has 4 TiB of zeroes to be hashed: hours."""

    def fail(*_: object, **__: object) -> None:
        time.sleep(0.5)
        raise TargetError("no")

    monkeypatch.setattr("diskmorph.convert.job.run", fail)
    threads, begun = threading.active_count(), time.monotonic()
    with pytest.raises(TargetError, match="no"):
        diskmorph.convert(Zero(4 * TIB), tmp_path / "a.raw", options=diskmorph.ConvertOptions(digest=True))
    assert time.monotonic() - begun < 30
    assert threading.active_count() <= threads


class Busy:
    """A hand that writes for a second, and says when it is done."""

    done = 0
    written = False

    def prepare(self, window: object) -> object:
        return window

    def settle(self, batch: object) -> None:
        pass

    def write(self, batch: object) -> None:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            time.sleep(0.01)
        self.written = True


def test_no_worker_outlives_its_crew_however_often_that_is_interrupted() -> None:
    """One window for two hands: the one has ended, the other writes, when Ctrl-C is pressed again and again."""
    grid = Grid(MIB, 4096, 4096, MIB, 4096)
    hands = [Busy(), Busy()]

    def press() -> None:
        for _ in range(4):
            time.sleep(0.15)
            os.kill(os.getpid(), signal.SIGINT)

    threads = threading.active_count()
    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        Crew(hands, windows(Zero(MIB), grid), None).run(None)
    written = [hand.written for hand in hands]
    with contextlib.suppress(KeyboardInterrupt):
        presser.join()
    assert sorted(written) == [False, True]
    assert threading.active_count() <= threads
