#!/usr/bin/env python3
"""Throughput of `diskmorph aws upload` over TLS beside plain boto3 with the same workers, against a sink on loopback.

    benchmarks/aws.py --blocks 1024 --workers 16 --runs 3

The sink answers and forgets. Both sides read the same file, hash each block and put it; both start a process of their
own, in alternation. Told: MiB a second while blocks flow, processor time a block, and the ratio (goal: 0.8).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BLOCK = 512 << 10
GOAL = 0.8

PLAIN = """
import base64, hashlib, os, sys, threading
import boto3
from botocore.config import Config
path, workers = sys.argv[1], int(sys.argv[2])
blocks = os.path.getsize(path) // 524288
ebs = boto3.client("ebs", config=Config(max_pool_connections=workers, retries={"total_max_attempts": 1}))
snapshot = ebs.start_snapshot(VolumeSize=64)["SnapshotId"]
line, lock, fd = iter(range(blocks)), threading.Lock(), os.open(path, os.O_RDONLY)
def work():
    while True:
        with lock:
            index = next(line, None)
        if index is None:
            return
        data = os.pread(fd, 524288, index * 524288)
        sum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        ebs.put_snapshot_block(SnapshotId=snapshot, BlockIndex=index, BlockData=data, DataLength=524288,
                               Checksum=sum, ChecksumAlgorithm="SHA256")
threads = [threading.Thread(target=work) for _ in range(workers)]
[t.start() for t in threads]
[t.join() for t in threads]
ebs.complete_snapshot(SnapshotId=snapshot, ChangedBlocksCount=blocks)
"""


class Sink:
    """A TLS server that takes blocks; `first` and `last` are when blocks came."""

    def __init__(self, folder: Path) -> None:
        key, cert = folder / "key.pem", folder / "cert.pem"
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert]
        subprocess.run(words, check=True, capture_output=True)
        self.cert = cert
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(cert, key)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"https://localhost:{self._listener.getsockname()[1]}"
        self.first = self.last = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            raw, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            with self._context.wrap_socket(raw, server_side=True) as link:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while self._one(link):
                    pass
        except OSError:
            return

    def _one(self, link: ssl.SSLSocket) -> bool:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = link.recv(65536)
            if not piece:
                return False
            head += piece
        top, _, body = head.partition(b"\r\n\r\n")
        text = top.decode("latin-1")
        length = re.search(r"(?im)^content-length: *(\d+)", text)
        if re.search(r"(?im)^expect: *100-continue", text):
            link.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        left = (int(length[1]) if length else 0) - len(body)
        buffer = bytearray(1 << 18)
        while left > 0:
            count = link.recv_into(buffer, min(left, len(buffer)))
            if not count:
                return False
            left -= count
            if len(body) < 65536:
                body += buffer[:count]
        method, target, _ = text.split(" ", 2)
        self._answer(link, method, target, text, body)
        return True

    def _answer(self, link: ssl.SSLSocket, method: str, target: str, text: str, body: bytes) -> None:
        kind, status, extra = "application/json", 200, ""
        if method == "PUT":
            self.last = time.monotonic()
            self.first = self.first or self.last
            checksum = re.search(r"(?im)^x-amz-checksum: *(\S+)", text)
            answer, status = "{}", 201
            extra = f"x-amz-Checksum: {checksum[1]}\r\n" if checksum else ""
        elif target == "/snapshots":
            answer, status = (
                json.dumps({"SnapshotId": "snap-0123456789abcdef0", "SseType": "none", "VolumeSize": 64}),
                201,
            )
        elif target.startswith("/snapshots/completion"):
            answer, status = json.dumps({"Status": "completed"}), 202
        elif b"Action=" in body:
            kind, answer = "text/xml", _XML
        else:
            row = {"QuotaName": "PutSnapshotBlock requests per account", "Value": 1e6}
            answer = json.dumps({"Quotas": [row]})
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(answer)}\r\n{extra}\r\n"
        link.sendall(head.encode() + answer.encode())


_XML = (
    '<R xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>1</requestId><snapshotSet><item>'
    "<snapshotId>snap-0123456789abcdef0</snapshotId><status>completed</status><progress>100%</progress>"
    "</item></snapshotSet><return>true</return></R>"
)


def measure(sink: Sink, words: list[str], env: dict[str, str], blocks: int) -> tuple[float, float]:
    """Run one side; return MiB a second while blocks flow, and seconds of processor time a block, start-up included."""
    sink.first = sink.last = 0.0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, env=env, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (blocks - 1) * BLOCK / (1 << 20) / (sink.last - sink.first), used / blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="diskmorph-bench-") as name:
        folder = Path(name)
        sink = Sink(folder)
        disk = folder / "disk.raw"
        with disk.open("wb") as file:
            for _ in range(asked.blocks):
                file.write(os.urandom(BLOCK))
        env = {**os.environ, "AWS_ENDPOINT_URL": sink.url, "AWS_CA_BUNDLE": str(sink.cert), "AWS_REGION": "us-east-1"}
        env |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "XDG_STATE_HOME": str(folder / "state")}
        env |= {"NO_PROXY": "localhost", "no_proxy": "localhost", "AWS_DEFAULT_REGION": "us-east-1"}
        ours = [sys.executable, "-m", "diskmorph", "aws", "upload", str(disk), "--workers", str(asked.workers)]
        plain = [sys.executable, "-c", PLAIN, str(disk), str(asked.workers)]
        results: dict[str, list[tuple[float, float]]] = {"diskmorph": [], "boto3": []}
        for _ in range(asked.runs):
            results["boto3"].append(measure(sink, plain, env, asked.blocks))
            results["diskmorph"].append(measure(sink, ours, env, asked.blocks))
    speeds = {side: statistics.median(speed for speed, _ in rows) for side, rows in results.items()}
    for side, rows in results.items():
        cost = statistics.median(used for _, used in rows) * 1000
        print(f"{side:<10} {speeds[side]:7.1f} MiB/s  {cost:5.2f} ms of processor a block")
    ratio = speeds["diskmorph"] / speeds["boto3"]
    print(f"ratio {ratio:.2f} (goal {GOAL}): {'ok' if ratio >= GOAL else 'TOO SLOW'}")


if __name__ == "__main__":
    main()
