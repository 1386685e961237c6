#!/usr/bin/env python3
"""Remote conversions beside `qemu-img convert` (over curl for http) and `nbdcopy`, in alternation: medians.

    benchmarks/remote.py                     # http -> raw, NBD -> raw, raw -> NBD
    benchmarks/remote.py --data 268435456 --runs 3

Whole processes are timed, the servers being on this machine: http by a threading server with range requests, NBD by
nbdkit. The disk holds real files of this machine in an ext4, a quarter of it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import BIN, GIB, MIB, make_disk

if TYPE_CHECKING:
    from collections.abc import Callable

_SERVERS: list[int] = []
PATIENCE = 60.0
"""Seconds for one run, which takes a few; qemu-img's curl driver waits for ever now and then."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # qemu-img 7.2 waits for ever now and then on connections that stay
    path_of_file: Path

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        size = self.path_of_file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2] or size - 1)) if asked else (0, size - 1)
        last = min(last, size - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(last - first + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if body:
            self.wfile.flush()
            with self.path_of_file.open("rb") as file:
                self.connection.setblocking(True)
                while first <= last:
                    first += os.sendfile(self.connection.fileno(), file.fileno(), first, last - first + 1)


def serve_http(path: Path) -> str:
    """Serve one file from a process of its own; return its URL."""
    handler = type("Handler", (_Handler,), {"path_of_file": path})
    http.server.ThreadingHTTPServer.request_queue_size = 64
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    sys.stdout.flush()  # or the child would hold a copy
    child = os.fork()
    if child == 0:
        server.serve_forever()
    _SERVERS.append(child)
    port = server.server_address[1]
    server.socket.close()
    return f"http://127.0.0.1:{port}/{path.name}"


def serve_nbd(sock: Path, *words: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(["nbdkit", "-f", "-U", str(sock), *words])
    while True:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(str(sock))
            return child
        time.sleep(0.02)


def seconds(argv: list[str], before: Callable[[], None]) -> float:
    """Return what a run took; infinity where it does not end."""
    before()
    begun = time.monotonic()
    try:
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return math.inf
    return time.monotonic() - begun


def row(name: str, ours: list[str], peers: dict[str, list[str]], runs: int, before: Callable[[], None]) -> None:
    """Time ours and the peers in alternation; print one line for each peer. Exits where ours does not end."""
    took: dict[str, list[float]] = {"ours": [], **{peer: [] for peer in peers}}
    for turn in range(runs):
        sides = [("ours", ours), *peers.items()]
        for side, argv in sides if turn % 2 == 0 else reversed(sides):
            took[side].append(seconds(argv, before))
    if math.inf in took["ours"]:
        sys.exit(f"{' '.join(ours)}: does not end")
    for peer in peers:
        ended = [one for one in took[peer] if one != math.inf]
        stuck = "" if len(ended) == runs else f" ({runs - len(ended)} of {runs} runs did not end)"
        mine, theirs = statistics.median(took["ours"]), statistics.median(ended or [math.inf])
        print(f"| {name} | {peer}{stuck} | {mine:.2f} | {theirs:.2f} | {mine / theirs:.2f} |", flush=True)


def compare(folder: Path, runs: int) -> None:
    disk, sock, out = folder / "disk.raw", folder / "sock", folder / "out.raw"
    packed = folder / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", disk, packed], check=True)

    def clear() -> None:
        out.unlink(missing_ok=True)

    convert = [str(BIN), "convert", "-q", "--no-sync"]
    peer = ["qemu-img", "convert", "-W", "-m", "16"]
    for name, path, word in (("http raw -> raw", disk, "raw"), ("http qcow2 -> raw", packed, "qcow2")):
        url = serve_http(path)
        # Without -W -m 16, with which its curl driver waits for ever more often.
        words = {"qemu-img over curl": ["qemu-img", "convert", "-f", word, "-O", "raw", url, str(out)]}
        row(name, [*convert, "-f", word, "-O", "raw", url, str(out)], words, runs, clear)
    url = f"nbd+unix:///?socket={sock}"
    server = serve_nbd(sock, "-r", "file", str(disk))
    words = {
        "qemu-img": [*peer, "-f", "raw", "-O", "raw", url, str(out)],
        "nbdcopy": ["nbdcopy", url, str(out)],
    }
    row("nbd -> raw", [*convert, "-f", "raw", "-O", "raw", url, str(out)], words, runs, clear)
    server.terminate()
    server.wait()
    sock.unlink(missing_ok=True)
    server = serve_nbd(sock, "memory", f"size={disk.stat().st_size}")
    words = {
        "qemu-img": [*peer, "-n", "-f", "raw", "-O", "raw", str(disk), url],
        "nbdcopy": ["nbdcopy", str(disk), url],
    }
    row("raw -> nbd", [*convert, "-f", "raw", str(disk), url], words, runs, clear)
    server.terminate()
    server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--data", type=int, default=GIB // 2, help="bytes of real files on the disk")
    options = parser.parse_args()
    missing = [name for name in ("qemu-img", "nbdkit", "nbdcopy") if shutil.which(name) is None]
    if missing:
        sys.exit(f"missing: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="bench-remote-") as folder:
        make_disk(Path(folder) / "disk.raw", options.data)
        size = (Path(folder) / "disk.raw").stat().st_size
        print(f"a disk of {size // MIB} MiB, {os.cpu_count()} processors; seconds, medians of {options.runs}\n")
        print("| what | peer | ours s | peer s | ratio |\n| --- | --- | --- | --- | --- |")
        try:
            compare(Path(folder), options.runs)
        finally:
            stop_servers()


def stop_servers() -> None:
    """End the http servers, which are processes of this one."""
    for pid in _SERVERS:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
