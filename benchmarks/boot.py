#!/usr/bin/env python3
"""Seconds from power-on under emulation (TCG, 2 processors): a container's first line, and Debian's login.

    benchmarks/boot.py                 # both, SeaBIOS
    benchmarks/boot.py --uefi --runs 3

The kernel is Debian's for virtual machines and the distribution Debian 12, both from its archive. Told: the fastest and
the median of the runs, and the goal. The machine must be quiet: an emulated processor has no other clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bootkit import debian, kernel_package, machine, tiny_image

from diskmorph.convert.bridge import BuildOptions, build
from diskmorph.convert.bridge.options import Size
from diskmorph.convert.options import ConvertOptions

GOALS = {"container": 8.0, "Debian": 45.0}
SLACK = 128 << 20


def disks(folder: Path) -> dict[str, tuple[Path, str]]:
    """Build both disks; return each with the words that end the measurement."""
    options = BuildOptions(convert=ConvertOptions(sync=False), size=Size(slack=SLACK), kernel=kernel_package())
    build(tiny_image(folder / "tiny.tar"), folder / "container.raw", options=options)
    plain = BuildOptions(convert=ConvertOptions(sync=False), size=Size(slack=SLACK))
    build(debian(), folder / "debian.raw", options=plain)
    return {"container": (folder / "container.raw", "MARKER"), "Debian": (folder / "debian.raw", "login:")}


def main() -> None:
    """Measure and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--uefi", action="store_true")
    asked = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, {'OVMF' if asked.uefi else 'SeaBIOS'}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (disk, until) in disks(Path(folder)).items():
            taken = []
            for _ in range(asked.runs):
                begun = time.monotonic()
                machine(disk, "raw", until=until, seconds=300, uefi=asked.uefi)
                taken.append(time.monotonic() - begun)
            goal = GOALS[name]
            verdict = "met" if statistics.median(taken) <= goal else "NOT met"
            print(
                f"{name:10} fastest {min(taken):5.1f} s  median {statistics.median(taken):5.1f} s  goal {goal:.0f} s: {verdict}"
            )


if __name__ == "__main__":
    main()
