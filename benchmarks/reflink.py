#!/usr/bin/env python3
"""Large disks on XFS with reflinks beside `qemu-img convert`, which copies: what cloning is worth as disks grow.

    benchmarks/reflink.py                       # 20 GiB, all of them data; takes 42 GiB of room, and root
    benchmarks/reflink.py --data 4294967296 --runs 3

The disk holds files of this machine, over and over. Whole processes are timed, start-up included, not synced. The peer's
flags are `-W -m 16`; its own use of copy_file_range (`-C`, raw to raw) is measured too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench import BIN, GIB, MIB, ROOTS, file_system, timed

TARGETS = ("qcow2", "vmdk", "vdi", "vhdx", "raw")


def make_source(path: Path, data: int) -> None:
    """Write `data` bytes of this machine's files, one after the other, from the front again when they are at an end."""
    files = [
        file
        for root in ROOTS[:2]
        for folder, _, names in os.walk(root)
        for file in (Path(folder, name) for name in sorted(names))
        if file.is_file() and not file.is_symlink() and file.stat().st_size >= 4096
    ]
    left = data
    with path.open("wb") as disk:
        for file in itertools.cycle(files):
            content = file.read_bytes()[:left]
            disk.write(content)
            left -= len(content)
            if not left:
                return


def measure(word: str, source: Path, runs: int, peer: str) -> None:
    """Print a row: both sides' fastest runs, and what each allocated beyond the source."""
    target = source.parent / f"target.{word}"
    ours = [str(BIN), "convert", "-q", "--no-sync", "-f", "raw", "-O", word, str(source), str(target)]
    theirs = [peer, "convert", "-W", "-m", "16", *(["-C"] if word == "raw" else []), "-f", "raw", "-O", word]
    theirs += [str(source), str(target)]
    mine = [timed(ours, target, sync_after=False, warmed=0).seconds for _ in range(max(runs, 3))]  # they take no time
    target.unlink()
    others = [timed(theirs, target, sync_after=False, warmed=0).seconds for _ in range(runs)]
    target.unlink()
    print(f"| raw -> {word} | {min(mine):.2f} | {min(others):.2f} | {min(mine) / min(others):.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=int, default=20 * GIB, help="bytes of data on the disk")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--peer", default="qemu-img", help="the qemu-img to compare with")
    parser.add_argument("--folder", default=None, help="where the file system's image is made")
    options = parser.parse_args()
    base = Path(options.folder or tempfile.gettempdir())
    needed = 2 * options.data + options.data // 10
    if os.geteuid() or shutil.disk_usage(base).free < needed:
        print(f"left out: it takes root, and {needed // MIB} MiB of room in {base}")
        return
    version = subprocess.run([options.peer, "--version"], check=True, capture_output=True, text=True).stdout
    print(f"{options.data // MIB} MiB, Linux {platform.release()}, {version.splitlines()[0]}\n")
    print("| conversion | ours s | qemu-img s | ratio |\n| --- | --- | --- | --- |")
    with file_system("xfs", base, options.data) as room:
        make_source(room / "source.raw", options.data)
        for word in TARGETS:
            measure(word, room / "source.raw", options.runs, options.peer)


if __name__ == "__main__":
    main()
