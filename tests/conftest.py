"""Shared set-up of all tests."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("quick", max_examples=60, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# What runs in the background of a shell, or by nohup, ignores these, and so would every child that a test interrupts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(number, usual)


@pytest.fixture(scope="module", autouse=True)
def no_server_is_left() -> Iterator[None]:
    """A server that outlives its tests goes on asking its descriptor, which is then another's, and takes its clients."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in set(threading.enumerate()) - before if "serve_forever" in thread.name]
    assert not left, "a test did not shut its server down"
