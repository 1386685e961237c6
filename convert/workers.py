"""Workers that share one ordered line of windows: they prepare and write at the same time, and settle in turn.

Each worker takes the next window, prepares it (reads, looks for zeroes, encodes), waits until all windows before have
been settled, settles its own (asks the allocator for places) and writes it. So a window's bytes stay with one
processor, memory is bounded by the number of workers, and the allocator sees one thread at a time, in order.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diskmorph.convert.windows import Window

B = TypeVar("B")
_TICK = 0.1


class Hand(Protocol[B]):
    """What one worker does; its buffers are its own."""

    done: int
    """Bytes of the disk dealt with so far."""

    def prepare(self, window: Window) -> B:
        """Do what needs no order."""

    def settle(self, batch: B) -> None:
        """Do what must happen in the order of windows."""

    def write(self, batch: B) -> None:
        """Do the rest."""


class Stopped(Exception):  # noqa: N818 - no error of its own: another worker's failure is told
    """Work was stopped because of another's failure."""


class Throttle:
    """At most `rate` bytes a second, over the whole run; None is no bound."""

    def __init__(self, rate: int | None, stop: threading.Event) -> None:
        self._rate, self._stop = rate, stop
        self._begun = time.monotonic()
        self._taken = 0

    def take(self, count: int) -> None:
        """Wait until `count` more bytes may be read. Called by one thread at a time."""
        if not self._rate or not count:
            return
        self._taken += count
        delay = self._begun + self._taken / self._rate - time.monotonic()
        if delay > 0 and self._stop.wait(delay):
            raise Stopped


class Crew(Generic[B]):
    """Runs hands over windows until all is done or one fails."""

    def __init__(self, hands: Sequence[Hand[B]], windows: Iterator[Window], rate: int | None) -> None:
        self._hands, self._windows = hands, windows
        self._stop = threading.Event()
        self._ended = [threading.Event() for _ in hands]
        self._throttle = Throttle(rate, self._stop)
        self._take = threading.Lock()
        self._turn = threading.Lock()  # free: the next window taken may settle at once
        self._failure: BaseException | None = None

    def halt(self) -> None:
        """Raise Stopped where work shall end early; for hands whose single step may take long."""
        if self._stop.is_set():
            raise Stopped

    def run(self, tick: Callable[[int], None] | None) -> None:
        """Work to the end; call `tick` (bytes done) now and then, in this thread. Raises what a worker raised."""
        if len(self._hands) == 1:
            self._alone(self._hands[0], tick)
            return
        pairs = zip(self._hands, self._ended, strict=True)
        threads = [threading.Thread(target=self._loop, args=pair, daemon=True) for pair in pairs]
        try:
            for thread in threads:
                thread.start()
            self._watch(tick)
        except BaseException:
            self._stop.set()
            raise
        finally:
            self._await_end(threads)
        if self._failure is not None:
            raise self._failure

    def _watch(self, tick: Callable[[int], None] | None) -> None:
        for ended in self._ended:
            while not ended.wait(_TICK):
                if self._stop.is_set():
                    return
                if tick is not None:
                    tick(sum(hand.done for hand in self._hands))

    def _await_end(self, threads: Sequence[threading.Thread]) -> None:
        """Wait until no worker is at work, whatever comes meanwhile: what they write to is closed next.

        Events are waited for: an interrupted `Thread.join` takes a thread for dead that is not.
        """
        interruption: BaseException | None = None
        while True:
            try:
                for thread, ended in zip(threads, self._ended, strict=True):
                    if thread.ident is not None:
                        ended.wait()
                        thread.join()
            except BaseException as error:  # noqa: BLE001 - raised when all have ended
                self._stop.set()
                interruption = error
            else:
                break
        if interruption is not None:
            raise interruption

    def _alone(self, hand: Hand[B], tick: Callable[[int], None] | None) -> None:
        told = time.monotonic()
        for window in self._windows:
            self._throttle.take(window.read)
            batch = hand.prepare(window)
            hand.settle(batch)
            hand.write(batch)
            if tick is not None and time.monotonic() - told > _TICK:
                told = time.monotonic()
                tick(hand.done)

    def _loop(self, hand: Hand[B], ended: threading.Event) -> None:
        try:
            while self._one(hand):
                pass
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by `run`
            self._failure = self._failure or error
            self._stop.set()
        finally:
            ended.set()

    def _one(self, hand: Hand[B]) -> bool:
        with self._take:
            if self._stop.is_set():
                return False
            window = next(self._windows, None)
            if window is None:
                return False
            mine, self._turn = self._turn, threading.Lock()
            following = self._turn
            following.acquire()
            try:
                self._throttle.take(window.read)
            except BaseException:
                self._stop.set()
                following.release()
                raise
        try:
            batch = hand.prepare(window)
            with mine:
                if self._stop.is_set():
                    raise Stopped
                hand.settle(batch)
        except BaseException:
            self._stop.set()
            raise
        finally:
            following.release()
        hand.write(batch)
        return True
