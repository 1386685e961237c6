"""What the tests of fleets share: small real images, plans, ledgers, and clusters of processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clikit import dm

from testkit import KIB, data, run

FORMATS = ("qcow2", "vmdk", "vdi", "vpc", "vhdx", "raw")


def images(folder: Path, count: int) -> Path:
    """Small real images in several formats, each with an ext2 file system of its own and data behind it."""
    folder.mkdir()
    for number in range(count):
        raw = folder.parent / "one.raw"
        raw.unlink(missing_ok=True)
        run("mke2fs", "-q", "-t", "ext2", "-L", f"n{number}", raw, "512k")
        with raw.open("r+b") as file:
            file.seek(300 * KIB)
            file.write(data(number, 40 * KIB))
        form = FORMATS[number % len(FORMATS)]
        run("qemu-img", "convert", "-f", "raw", "-O", form, raw, folder / f"vm{number:03}.{form}")
    return folder


def plan(folder: Path, source: str, target: str, **options: Any) -> Path:
    path = folder / "plan.jsonl"
    path.write_text(json.dumps({"source": source, "target": target, **options}) + "\n")
    return path


def ledger_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_equal(vms: Path, out: Path) -> None:
    """Every target holds what a single conversion of its source holds, and nothing else lies beside them."""
    sources = {path.stem: path for path in vms.iterdir()}
    assert sorted(path.stem for path in out.iterdir()) == sorted(sources)
    for target in out.iterdir():
        single = out.parent / "single.qcow2"
        dm("convert", "-q", "--force", sources[target.stem], single).ok()
        dm("compare", "--strict", single, target).ok()


class Cluster:
    """A scheduler and workers as an operator starts them; whatever dies is started again."""

    def __init__(self, folder: Path) -> None:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"tcp://127.0.0.1:{self.port}"
        self.folder = folder
        self.scheduler = self.start_scheduler()
        self.workers = [self.start_worker() for _ in range(2)]

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "8"}
        return subprocess.Popen([sys.executable, "-m", *words], env=env, cwd=self.folder, stderr=subprocess.DEVNULL)

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        here = ("--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        return self._start("distributed.cli.dask_scheduler", *here)

    def start_worker(self) -> subprocess.Popen[bytes]:
        return self._start("distributed.cli.dask_worker", self.url, "--nthreads", "1", "--no-nanny", "--no-dashboard")

    def kill_worker(self, number: int) -> None:
        self.workers[number].kill()
        self.workers[number].wait()
        self.workers[number] = self.start_worker()

    def kill_scheduler(self) -> None:
        self.scheduler.kill()
        self.scheduler.wait()
        self.scheduler = self.start_scheduler()
        for number, worker in enumerate(self.workers):
            worker.kill()
            worker.wait()
            self.workers[number] = self.start_worker()

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


def start(*words: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "diskmorph", "fleet", "run", *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(path: Path) -> int:
    return path.read_text().count('"row"') if path.exists() else 0


def wait_for(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.01)


def slow(vms: Path, folder: Path) -> Path:
    """A plan whose rows take long enough to be killed in."""
    (folder / "out").mkdir()
    return plan(folder, f"{vms}/*", "out/{stem}.qcow2", rate="2M")


def once_each(ledger: Path, rows: int) -> None:
    lines = [line for line in ledger_lines(ledger) if "row" in line]
    assert sorted(line["row"] for line in lines if line["status"] == "done") == list(range(1, rows + 1))
    assert all(line["digest"] for line in lines)
