#!/usr/bin/env python3
"""Each conversion beside `qemu-img convert` with its best flags, in alternation: medians and ratios.

    benchmarks/bench.py                      # all pairs, on the temporary directory's file system, XFS and tmpfs
    benchmarks/bench.py -k 'raw-*' --runs 5  # some pairs
    benchmarks/bench.py --peer PATH --fs here

Whole processes are timed, start-up included, warm cache, synced and not. The disk holds real files of this machine
(`--data` bytes of them in an ext4). XFS needs root (a loop mount). The peer's flags are `-W -m 16`. "of limit" is the
time that the kernel alone takes to copy the disk's data (cp), as a share of ours.

A virtual machine may give its free memory back to its host, and gets it again page by page, which takes longer than the
conversions themselves. So before each run as much memory as it needs is touched and freed; `--warm 0` leaves that out.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB, GIB = 1 << 20, 1 << 30
ROOTS = ("/usr/lib/python3", "/usr/share", "/usr/lib/x86_64-linux-gnu", "/usr/lib", "/usr")
BIN = Path(sys.executable).parent / "diskmorph"


@dataclass(frozen=True)
class Pair:
    """One conversion: the source's shape, our words and the peer's for the target, and the goal for the ratio."""

    name: str
    source: str
    ours: tuple[str, ...]
    peer: tuple[str, ...]
    suffix: str
    goal: dict[str, float] = field(default_factory=dict)


def pair(name: str, source: str, target: str, ext4: float, *, ours: str = "", peer: str = "") -> Pair:
    theirs = {"vhd": "vpc"}.get(target, target)
    goal = {"ext4": ext4, "tmpfs": 1.0}
    return Pair(name, source, ("-O", target, *ours.split()), ("-O", theirs, *peer.split()), target, goal)


_WARM = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)
"""
STREAM = "-o subformat=streamOptimized"
PAIRS = (
    pair("raw-qcow2", "raw", "qcow2", 0.6),
    pair("raw-vmdk", "raw", "vmdk", 0.22),
    pair("raw-vdi", "raw", "vdi", 0.65),
    pair("raw-vhd", "raw", "vhd", 0.8, peer="-o force_size=on"),
    pair("raw-vhdx", "raw", "vhdx", 0.8),
    pair("qcow2-raw", "qcow2", "raw", 0.5),
    pair("vmdk-raw", "vmdk", "raw", 0.5),
    pair("raw-raw", "raw", "raw", 1.0),
    pair("raw-qcow2-deflate", "raw", "qcow2", 0.13, ours="--compress deflate", peer="-c"),
    pair("raw-qcow2-zstd", "raw", "qcow2", 0.65, ours="--compress zstd", peer="-c -o compression_type=zstd"),
    pair("raw-deflate-level", "raw", "qcow2", 0.25, ours="--compress deflate:2 -o deflate_window=32K", peer="-c"),
    pair("raw-stream", "raw", "vmdk", 0.1, ours=STREAM, peer=STREAM),
    pair("deflate-raw", "deflate", "raw", 0.37),
    pair("zstd-raw", "zstd", "raw", 0.6),
    pair("stream-raw", "stream", "raw", 0.6),
    pair("pass-deflate", "deflate", "qcow2", 0.06, ours="--compress deflate", peer="-c"),
    pair("pass-zstd", "zstd", "qcow2", 0.06, ours="--compress zstd", peer="-c -o compression_type=zstd"),
    pair("pass-stream", "deflate", "vmdk", 0.06, ours=STREAM, peer=STREAM),
    pair("shuffled-raw", "shuffled", "raw", 0.7),
    pair("fragmented-qcow2", "fragmented", "qcow2", 0.7),
)


LONG = {"raw-qcow2-deflate", "raw-deflate-level", "raw-stream", "pass-deflate", "pass-stream", "fragmented-qcow2"}
"""Of which the peer takes half a minute a run, steadily: two runs, and no second series with the write-back."""

MOVED = {"raw-qcow2", "raw-vmdk", "raw-vdi", "raw-vhd", "raw-vhdx", "raw-raw", "qcow2-raw", "vmdk-raw"}
"""What depends on the file system; the others are measured on one, their codecs being what takes the time."""

PLAIN = {"raw-qcow2", "raw-vmdk", "raw-vdi", "raw-vhd", "raw-vhdx", "raw-raw"}
"""Whose time has a physical limit that `limit` measures in the same run."""


def make_disk(path: Path, data: int) -> None:
    """Make a raw disk of about four times `data` bytes, holding an ext4 with `data` bytes of this machine's files."""
    tree = path.with_suffix(".tree")
    shutil.rmtree(tree, ignore_errors=True)
    total = 0
    seen: set[int] = set()
    for file in (Path(folder, name) for root in ROOTS for folder, _, names in os.walk(root) for name in sorted(names)):
        status = file.lstat()
        if file.is_symlink() or not file.is_file() or status.st_size > 64 * MIB or status.st_ino in seen:
            continue
        seen.add(status.st_ino)
        to = tree / str(file).lstrip("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
        total += status.st_size
        if total >= data:
            break
    with path.open("wb") as disk:
        disk.truncate(4 * data)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, path], check=True)
    shutil.rmtree(tree)


def shuffled(target: Path, size: int, peer: str) -> None:
    """Write a qcow2 of `size` bytes, all of them stored, whose 64 KiB clusters lie in random order."""
    import random

    chunk = 64 * 1024
    order = list(range(size // chunk))
    random.Random(1).shuffle(order)
    lines = "\n".join(f"write -q -P {1 + i % 250} {i * chunk} {chunk}" for i in order)
    subprocess.run([peer, "create", "-q", "-f", "qcow2", target, str(size)], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", target], input=lines.encode(), check=True, stdout=subprocess.DEVNULL)


def fragmented(target: Path) -> None:
    """Write a sparse raw disk of 100,000 extents of 4 to 64 KiB."""
    import random

    rng = random.Random(2)
    block = os.urandom(64 * 1024)
    with target.open("wb") as disk:
        at = 0
        for _ in range(100_000):
            length = rng.choice((4, 4, 8, 16, 32, 64)) * 1024
            at += rng.choice((4, 8, 64)) * 1024
            os.pwrite(disk.fileno(), block[:length], at)
            at += length
        disk.truncate(at + 4096)


class Sources:
    """The images that pairs start from, made when first asked for."""

    def __init__(self, folder: Path, data: int, peer: str) -> None:
        self.folder, self.data, self.peer = folder, data, peer

    def get(self, name: str) -> tuple[Path, str]:
        """Return path and the peer's format word of a source."""
        word = {"qcow2": "qcow2", "vmdk": "vmdk", "deflate": "qcow2", "zstd": "qcow2", "stream": "vmdk"}.get(
            name, "raw"
        )
        word = "qcow2" if name == "shuffled" else word
        path = self.folder / f"{name}.img"
        if not path.exists():
            self._make(name, path)
        return path, word

    def _make(self, name: str, path: Path) -> None:
        if name == "raw":
            make_disk(path, self.data)
            return
        if name == "fragmented":
            fragmented(path)
            return
        if name == "shuffled":
            shuffled(path, self.data, self.peer)
            return
        raw, _ = self.get("raw")
        words = {
            "qcow2": ["-O", "qcow2"],
            "vmdk": ["-O", "vmdk"],
            "deflate": ["-c", "-O", "qcow2"],
            "zstd": ["-c", "-O", "qcow2", "-o", "compression_type=zstd"],
            "stream": ["-O", "vmdk", "-o", "subformat=streamOptimized"],
        }[name]
        subprocess.run([self.peer, "convert", "-f", "raw", *words, raw, path], check=True)


@dataclass
class Run:
    """What one process took: seconds, seconds with the write-back, peak resident bytes, bytes of output."""

    seconds: float
    synced: float
    peak: int
    size: int


def warm(size: int) -> None:
    """Touch and free `size` bytes of memory, in a process of its own."""
    if size:
        subprocess.run([sys.executable, "-c", _WARM, str(size)], check=True)


def timed(argv: list[str], target: Path, *, sync_after: bool, warmed: int) -> Run:
    """Run a command; `sync_after` adds an fsync of the target, as its own measure."""
    for left in target.parent.glob(target.stem + "*"):
        left.unlink()
    os.sync()
    warm(warmed)
    begun = time.monotonic()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit {child.returncode}")
    if sync_after:
        fd = os.open(target, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
    synced = time.monotonic() - begun
    size = sum(path.stat().st_blocks * 512 for path in target.parent.glob(target.stem + "*"))
    return Run(seconds, synced, usage.ru_maxrss * 1024, size)


def measure(
    pair: Pair, sources: Sources, out: Path, runs: int, peer: str, *, sync: bool, blocks: bool, warmed: int
) -> tuple[list[Run], list[Run]]:
    """Run ours and the peer's in alternation."""
    path, word = sources.get(pair.source)
    target = out / f"target.{pair.suffix}"
    ours = [str(BIN), "convert", "-q", "-f", "vhd" if word == "vpc" else word, *pair.ours]
    ours += [*([] if sync else ["--no-sync"]), str(path), str(target)]
    theirs = [peer, "convert", "-W", "-m", "16", "-f", word, *pair.peer, str(path), str(target)]
    for source in (path,):
        with source.open("rb") as file:
            while file.read(8 * MIB):
                pass
    mine, others = [], []
    for side in order(runs, blocks=blocks):
        if side == 0:
            mine.append(timed(ours, target, sync_after=False, warmed=warmed))
        else:
            others.append(timed(theirs, target, sync_after=sync, warmed=warmed))
    for left in out.glob(target.stem + "*"):
        left.unlink()
    return mine, others


def order(runs: int, *, blocks: bool) -> list[int]:
    """Return whose turn it is: in alternation, or each side's runs in a row, where memory is warm for all but the first."""
    if blocks:
        return [0] * runs + [1] * runs
    return [side for turn in range(runs) for side in ((0, 1) if turn % 2 == 0 else (1, 0))]


@contextlib.contextmanager
def file_system(kind: str, base: Path, data: int) -> Iterator[Path]:
    """Lend a folder on a file system of that kind."""
    with contextlib.ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=base, prefix=f"bench-{kind}-")))
        if kind in {"here", "ext4"}:
            yield room
            return
        where = room / "mnt"
        where.mkdir()
        if kind == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={8 * data}", "none", where], check=True)
        else:
            disk = room / "fs.img"
            with disk.open("wb") as file:
                file.truncate(16 * data)
            subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", disk], check=True)
            subprocess.run(["mount", "-o", "loop", disk, where], check=True)
        stack.callback(subprocess.run, ["umount", where], check=True)
        yield where


def limit(raw: Path, room: Path, warmed: int) -> float:
    """Return the seconds that the kernel alone takes for the disk's data: cp's copy_file_range, or its clone."""
    target = room / "limit.raw"
    taken = []
    for _ in range(3):
        argv = ["cp", "--sparse=auto", "--reflink=auto", str(raw), str(target)]
        taken.append(timed(argv, target, sync_after=False, warmed=warmed))
        target.unlink()
    return statistics.median(run.seconds for run in taken)


def report(pair: Pair, kind: str, mine: list[Run], others: list[Run], bare: float | None, *, sync: bool) -> None:
    ours = statistics.median(run.synced for run in mine)
    theirs = statistics.median(run.synced for run in others)
    best = [min(run.synced for run in side) for side in (mine, others)]
    ratio = statistics.median(a.synced / b.synced for a, b in zip(mine, others, strict=True))
    goal = pair.goal.get("ext4" if kind == "here" else kind)
    print(
        f"| {kind} | {pair.name} | {'synced' if sync else 'cached'} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} | "
        f"{best[0]:.2f} | {best[1]:.2f} | "
        f"{goal if goal is not None else '-'} | {'-' if bare is None else f'{bare / ours:.0%}'} | {max(run.peak for run in mine) // MIB} | "
        f"{mine[0].size / MIB:.0f} | {others[0].size / MIB:.0f} |",
        flush=True,
    )


def _available() -> int:
    """Return the bytes of memory that programs can have now."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-k", default="*", metavar="GLOB", help="only pairs whose name matches")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer", default="qemu-img", help="the qemu-img to compare with")
    parser.add_argument("--fs", default="here,xfs,tmpfs", help="here, ext4, tmpfs, xfs: a list with commas")
    parser.add_argument("--data", type=int, default=2 * GIB, help="bytes of real files on the disk")
    parser.add_argument("--folder", default=None, help="where sources are kept between runs")
    parser.add_argument("--blocks", action="store_true", help="each side's runs in a row instead of in alternation")
    parser.add_argument("--sync", default="cached,synced")
    parser.add_argument("--warm", type=int, default=None, help="bytes of memory touched before each run")
    options = parser.parse_args()
    warmed = min(2 * options.data, _available() // 4) if options.warm is None else options.warm
    base = Path(options.folder or tempfile.gettempdir())
    kept = base / f"bench-sources-{options.data}"
    kept.mkdir(parents=True, exist_ok=True)
    version = subprocess.run([options.peer, "--version"], check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )[0]
    print(f"{platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}, {version}\n")
    print(
        "| fs | pair | | ours s | qemu-img s | ratio | fastest | qemu-img's | goal | of limit | MiB | stored MiB | qemu-img's |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in options.fs.split(","):
        if kind in {"xfs", "tmpfs"} and os.geteuid():
            print(f"| {kind} | left out: mounting it takes root |")
            continue
        with file_system(kind, base, options.data) as room:
            here = kept if kind in {"here", "ext4"} else room / "sources"
            here.mkdir(exist_ok=True)
            if here != kept:
                raw = Sources(kept, options.data, options.peer).get("raw")[0]
                subprocess.run(["cp", "--sparse=always", raw, here / "raw.img"], check=True)
            sources = Sources(here, options.data, options.peer)
            bare = limit(sources.get("raw")[0], room, warmed)
            for pair in PAIRS:
                if not fnmatch.fnmatch(pair.name, options.k) or (here != kept and pair.name not in MOVED):
                    continue
                long = pair.name in LONG
                for mode in options.sync.split(",")[: 1 if long else None]:
                    mine, others = measure(
                        pair,
                        sources,
                        room,
                        min(options.runs, 2) if long else options.runs,
                        options.peer,
                        sync=mode == "synced",
                        blocks=options.blocks,
                        warmed=warmed,
                    )
                    plain = bare if pair.source == "raw" and pair.name in PLAIN and mode == "cached" else None
                    report(pair, kind, mine, others, plain, sync=mode == "synced")


if __name__ == "__main__":
    main()
