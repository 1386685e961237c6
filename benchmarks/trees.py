#!/usr/bin/env python3
"""ext4 beside e2fsprogs, in alternation: out to a tar (debugfs rdump), in from a tar (mke2fs -d), lookups of names.

    benchmarks/trees.py                       # a Debian (mmdebstrap), and 100,000 small files
    benchmarks/trees.py --tree debian --runs 5

debugfs and mke2fs know directories only, so tar's part is told with theirs: packing what rdump wrote, unpacking what
mke2fs reads. Whole processes are measured, on tmpfs unless --room says where; run as root, so that owners are kept.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bench import BIN, MIB
from bootkit import debian
from treekit import mounted

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL = 0.25
"""Of debugfs's wall time, tar's included, that reading may take."""
LARGE = 24_000
"""Names of the largest directory."""


class Cost(NamedTuple):
    """Seconds: of the clock, and of processors."""

    wall: float
    processor: float


def taken(*commands: list[str | Path]) -> Cost:
    """Run commands one after the other."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    for command in commands:
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode:
            sys.exit(f"{command}: {done.stderr.decode(errors='replace')}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Cost(time.monotonic() - begun, used)


def many(path: Path) -> Path:
    """Write a tar of 2,000 directories, 86,000 files of up to 2 KB, and a directory of LARGE names."""
    rng = random.Random(1)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, content: bytes | None) -> None:
            info = tarfile.TarInfo(name)
            info.mtime = 1_700_000_000
            info.type, info.mode = (tarfile.DIRTYPE, 0o755) if content is None else (tarfile.REGTYPE, 0o644)
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))

        for number in range(50):
            add(f"d{number:02}", None)
        for number in range(1950):
            folder = f"d{number % 50:02}/directory-{number:04}"
            add(folder, None)
            for file in range(44):
                add(f"{folder}/file-{file:04}.some-name.txt", rng.randbytes(rng.randrange(2000)))
        add("large", None)
        for number in range(LARGE):
            add(f"large/entry-{number:05}-with-a-name", b"%d" % number)
    return path


def compare(name: str, runs: int, ours: Callable[[], Cost], peers: dict[str, Callable[[], Cost]]) -> dict[str, float]:
    """Print a line for ours and each of the peers; return the medians of the clock as shares of the peers'."""
    found: dict[str, list[Cost]] = {key: [] for key in ("ours", *peers)}
    for _ in range(runs):
        found["ours"].append(ours())
        for key, peer in peers.items():
            found[key].append(peer())
    own = statistics.median(cost.wall for cost in found["ours"])
    shares = {}
    for key, costs in found.items():
        wall = statistics.median(cost.wall for cost in costs)
        processor = statistics.median(cost.processor for cost in costs)
        shares[key] = own / wall
        print(f"{name:24} {key:24} {wall:7.2f} s  {processor:7.2f} s processor  ours is {own / wall:5.2f} of it")
    return shares


def measure(name: str, archive: Path, room: Path, runs: int) -> None:
    """Measure one tree both ways."""
    folder, image, out = room / "tree", room / "mke2fs.img", room / "out.tar"
    entries = int(subprocess.run(["tar", "-tf", archive], capture_output=True, check=True).stdout.count(b"\n"))
    print(f"{name}: {entries} names, {archive.stat().st_size / MIB:.0f} MiB")
    size = archive.stat().st_size * 2 + 256 * MIB
    unpack: list[str | Path] = ["tar", "--numeric-owner", "-C", folder, "-xf", archive]
    make: list[str | Path] = ["mke2fs", "-q", "-t", "ext4", "-N", str(entries + 1000), "-d", folder, image]

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def build() -> Cost:
        (room / "disk.raw").unlink(missing_ok=True)
        words = ["build", archive, room / "disk.raw", "--boot", "none", "--size", "min", "--no-sync"]
        return taken([BIN, *words])

    def mke2fs(*before: list[str | Path]) -> Cost:
        if before:
            fresh()
        image.unlink(missing_ok=True)
        with image.open("wb") as file:
            file.truncate(size)
        return taken(*before, make)

    def extract() -> Cost:
        out.unlink(missing_ok=True)
        return taken([BIN, "extract", image, out, "--no-sync"])

    def rdump(*behind: list[str | Path]) -> Cost:
        fresh()
        out.unlink(missing_ok=True)
        return taken(["debugfs", "-R", f"rdump / {folder}", image], *behind)

    compare(
        "tar -> ext4",
        runs,
        build,
        {"mke2fs -d after tar -x": lambda: mke2fs(unpack), "mke2fs -d alone": mke2fs},
    )
    pack: list[str | Path] = ["tar", "--numeric-owner", "-C", folder, "-cf", out, "."]
    shares = compare("ext4 -> tar", runs, extract, {"debugfs rdump, tar -c": lambda: rdump(pack), "rdump alone": rdump})
    verdict = "met" if shares["debugfs rdump, tar -c"] <= GOAL else "NOT met"
    print(f"ext4 -> tar: goal {GOAL} of debugfs with tar: {verdict}\n")


def lookups(archive: Path, room: Path) -> None:
    """Measure how long the kernel takes to look up all names of a large directory that nothing has read yet."""
    folder, image = room / "tree", room / "mke2fs.img"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(["tar", "-C", folder, "-xf", archive], check=True)
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-N", "150000", "-d", folder, image], check=True)
    (room / "disk.raw").unlink(missing_ok=True)
    subprocess.run([BIN, "build", archive, room / "disk.raw", "--boot", "none", "--no-sync", "-q"], check=True)
    names = [f"large/entry-{number:05}-with-a-name" for number in range(LARGE)]
    random.Random(2).shuffle(names)
    for key, path, at in (("ours", room / "disk.raw", MIB), ("mke2fs -d", image, 0)):
        with mounted(path, "ro", f"offset={at}") as point:
            begun = time.monotonic()
            for name in names:
                (point / name).lstat()
            print(f"{LARGE} lookups, cold      {key:24} {time.monotonic() - begun:7.2f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tree", choices=("debian", "many", "both"), default="both")
    parser.add_argument(
        "--room", type=Path, default=Path("/dev/shm"), help="where everything lies; on a disk, the disk is measured too"
    )
    asked = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    with tempfile.TemporaryDirectory(dir=asked.room) as scratch:
        room = Path(scratch)
        if asked.tree != "many":
            measure("Debian", debian(), room, asked.runs)
        if asked.tree != "debian":
            archive = many(room / "many.tar")
            measure("many", archive, room, asked.runs)
            lookups(archive, room)


if __name__ == "__main__":
    main()
