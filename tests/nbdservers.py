"""NBD servers of others for tests: ready when they are lent, gone when they are given back."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def nbd_server(sock: Path, *words: object) -> Iterator[str]:
    """Run a server that listens on a Unix socket until the block ends; yields its URL."""
    with subprocess.Popen([str(word) for word in words]) as child:
        try:
            _wait_until_it_listens(sock, child)
            yield f"nbd+unix:///?socket={sock}"
        finally:
            _end(child)


def _wait_until_it_listens(sock: Path, child: subprocess.Popen[bytes]) -> None:
    """A name in the folder is not enough: between bind and listen it refuses whoever comes."""
    deadline = time.monotonic() + 60
    while True:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(str(sock))
            return
        assert child.poll() is None, f"{child.args} ended with {child.returncode}"
        assert time.monotonic() < deadline, f"{child.args} does not listen"
        time.sleep(0.02)


def _end(child: subprocess.Popen[bytes]) -> None:
    """qemu-nbd forgets a SIGTERM that comes while it begins (it sets its state to RUNNING afterwards)."""
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
