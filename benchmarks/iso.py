#!/usr/bin/env python3
"""ISOs beside xorriso, genisoimage, bsdtar and pycdlib: listing, extracting and writing many files; medians and ratios.

    benchmarks/iso.py --entries 55000 --runs 3

Whole processes in alternation, warm cache. Ratios are ours over the peer's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
BIN = str(Path(sys.executable).parent / "diskmorph")
LISTING = "import pycdlib,sys; i=pycdlib.PyCdlib(); i.open(sys.argv[1]); print(sum(1 for _,d,f in i.walk(rr_path='/') for _ in d+f))"


@dataclass(frozen=True)
class Job:
    """One thing to do: our words and each peer's; `out` is removed before each run."""

    name: str
    ours: list[str]
    peers: dict[str, list[str]]
    out: Path | None = None


def make_tree(folder: Path, entries: int) -> None:
    """Make `entries` names: directories of 500 files of 0 to 6 KiB."""
    noise = os.urandom(8192)
    for number in range(entries):
        where = folder / f"folder-{number // 500:04d}"
        if not number % 500:
            where.mkdir(parents=True)
        (where / f"a file with a longer name {number:06d}.txt").write_bytes(noise[: number * 37 % 6144])


def took(argv: list[str], out: Path | None) -> tuple[float, int]:
    """Run a command; return its seconds and its peak in bytes."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        if argv[0] == "bsdtar":
            out.mkdir()
    begun = time.monotonic()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit {child.returncode}")
    return time.monotonic() - begun, usage.ru_maxrss * 1024


def jobs(folder: Path) -> tuple[Job, ...]:
    tree, iso, out = str(folder / "tree"), str(folder / "peer.iso"), folder / "out"
    made = folder / "made.iso"
    return (
        Job(
            "list",
            [BIN, "ls", "-R", iso],
            {
                "bsdtar": ["bsdtar", "-tf", iso],
                "xorriso": ["xorriso", "-indev", iso, "-find", "/"],
                "isoinfo": ["isoinfo", "-R", "-f", "-i", iso],
                "pycdlib": [sys.executable, "-c", LISTING, iso],
            },
        ),
        Job("extract", [BIN, "extract", "-q", iso, str(out)], {"bsdtar": ["bsdtar", "-xf", iso, "-C", str(out)]}, out),
        Job(
            "write",
            [BIN, "convert", "-q", "--no-sync", tree, str(made)],
            {
                "genisoimage": ["genisoimage", "-quiet", "-R", "-J", "-joliet-long", "-o", str(made), tree],
                "xorriso": ["xorrisofs", "-quiet", "-R", "-J", "-joliet-long", "-o", str(made), tree],
            },
            made,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=55_000)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="diskmorph-bench-") as name:
        folder = Path(name)
        make_tree(folder / "tree", asked.entries)
        words = ["genisoimage", "-quiet", "-R", "-J", "-joliet-long", "-o", folder / "peer.iso", folder / "tree"]
        subprocess.run(words, check=True)
        print(
            f"{asked.entries} entries\n\n| job | peer | ours s | peer s | ratio | ours MiB | peer MiB |\n"
            + "| --- " * 7
            + "|"
        )
        for job in jobs(folder):
            for peer, line in job.peers.items():
                mine, others = [], []
                for _ in range(asked.runs):
                    mine.append(took(job.ours, job.out))
                    others.append(took(line, job.out))
                ours, theirs = (statistics.median(seconds for seconds, _ in side) for side in (mine, others))
                peaks = [max(peak for _, peak in side) // MIB for side in (mine, others)]
                print(
                    f"| {job.name} | {peer} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | {peaks[0]} | {peaks[1]} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
