#!/usr/bin/env python3
"""What a fleet costs: seconds a row beside single conversions, 2 workers against 1, and how time falls with workers.

benchmarks/fleet.py --rows 5000 --images 16 --size 32 --to benchmarks/fleet.json; benchmarks/fleet_figure.py
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

OVERHEAD_GOAL, SPEED_GOAL = 0.010, 1.7
WORKERS = (1, 2, 4, 8)
RATED_ROWS, RATED_MIB, RATE_MIB = 32, 2, 2
"""Rows that take a second each whatever the processors do, so that more workers than processors can be measured."""


class Fleet(NamedTuple):
    """What a run took, in seconds: `span` from its first row's start to its last one's end, `work` in all rows."""

    span: float
    work: float
    whole: float
    processor: float


def fleet(plan: Path, workers: int, *words: str) -> Fleet:
    """Run a plan afresh."""
    ledger = plan.with_suffix(f".{time.monotonic_ns()}.jsonl")
    line = [sys.executable, "-m", "diskmorph", "fleet", "run", str(plan), "--ledger", str(ledger)]
    os.sync()  # else what lies in the way of the first row's fsync is counted
    begun, before = time.monotonic(), processor()
    subprocess.run([*line, "--workers", str(workers), "--json", *words], check=True, stdout=subprocess.DEVNULL)
    whole, used = time.monotonic() - begun, processor() - before
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    rows = [row for row in rows if "row" in row]
    span = max(row["started"] + row["seconds"] for row in rows) - min(row["started"] for row in rows)
    return Fleet(span, sum(row["seconds"] for row in rows), whole, used)


def processor() -> float:
    """Return the processor time of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def overhead(folder: Path, count: int) -> dict[str, float]:
    """Return seconds a row of `count` empty disks on one worker, and of the same conversions in one process."""
    for name in ("empty", "out", "single"):
        (folder / name).mkdir()
    for number in range(count):
        with (folder / f"empty/{number}.raw").open("wb") as file:
            file.truncate(1 << 20)
    plan = folder / "empty.toml"
    plan.write_text('rows = ["empty/*.raw -> out/{stem}.raw"]\n')
    few = min(count, 500)
    single = [singles(folder, few)]
    run = fleet(plan, 1)
    single.append(singles(folder, few))
    found = {"rows": count, "row": run.span / count, "single": statistics.mean(single)}
    found |= {"overhead": found["row"] - found["single"], "processor": run.processor / count}
    return {**found, "serial": serial(folder, few)}


def serial(folder: Path, count: int) -> float:
    """Return seconds a row that the client and the scheduler are busy, which workers cannot share: run in here."""
    from diskmorph.commands.fleet_words import rows_of
    from diskmorph.convert.fleet import ClusterOptions, Ledger, RunOptions, expand, read_plan, run_fleet

    (folder / "here").mkdir()
    path = folder / "here.toml"
    path.write_text('rows = ["empty/*.raw -> here/{stem}.raw"]\n')
    plan = read_plan(str(path))
    rows = rows_of(expand(plan), plan.folder)[:count]
    begun: list[float] = []

    def busy() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    with Ledger(folder / "here.jsonl") as ledger:
        options = ClusterOptions(workers=2)
        run_fleet(rows, RunOptions("serial"), options, ledger, on_connected=lambda _: begun.append(busy()))
    return (busy() - begun[0]) / count


def singles(folder: Path, count: int) -> float:
    """Return seconds a conversion, of some of the empty disks one after the other in this process."""
    import diskmorph

    options = diskmorph.ConvertOptions(digest=True, threads=1, force=True)
    begun = time.monotonic()
    for number in range(count):
        diskmorph.convert(folder / f"empty/{number}.raw", folder / f"single/{number}.raw", options=options)
    return (time.monotonic() - begun) / count


def real_bytes(size: int) -> bytes:
    """Return `size` bytes of files that compress as programs do."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*")):
        if len(found) >= size:
            break
        if path.is_file():
            found += path.read_bytes()
    return bytes((found * (size // len(found) + 1))[:size])


def throughput(folder: Path, images: int, size: int) -> dict[str, float]:
    """Return the seconds of one worker and of two, compressing images of `size` MiB with one thread each.

    No digest: it would be a second thread, and with one worker have the other processor for itself.
    """
    (folder / "in").mkdir()
    piece = real_bytes(size << 20)
    for number in range(images):
        at = number * 4099 % len(piece)
        (folder / f"in/{number}.raw").write_bytes(piece[at:] + piece[:at])
    found = {}
    for workers in (1, 2):
        (folder / f"c{workers}").mkdir()
        plan = folder / f"c{workers}.toml"
        options = 'options = "--compress zstd:9 --threads 1"'
        plan.write_text(f'[[row]]\nsource = "in/*.raw"\ntarget = "c{workers}/{{stem}}.qcow2"\n{options}\n')
        found[str(workers)] = fleet(plan, workers, "--no-digest").span
    return {**found, "images": images, "mib": size, "ratio": found["1"] / found["2"]}


def growth(folder: Path) -> list[dict[str, float]]:
    """Return how the seconds of a run fall with workers, whose rows take equally long on any number of them."""
    (folder / "rated").mkdir()
    for number in range(RATED_ROWS):
        (folder / f"rated/{number}.raw").write_bytes(os.urandom(RATED_MIB << 20))
    found = []
    for workers in WORKERS:
        out = folder / f"r{workers}"
        out.mkdir()
        plan = folder / f"r{workers}.toml"
        options = f'options = "--rate {RATE_MIB}M"'
        plan.write_text(f'[[row]]\nsource = "rated/*.raw"\ntarget = "{out}/{{stem}}.raw"\n{options}\n')
        run = fleet(plan, workers, "--no-digest")
        found.append({"workers": workers, "rows": RATED_ROWS, "span": run.span, "work": run.work, "whole": run.whole})
    return found


def judged(name: str, value: float, goal: float, good: bool, unit: str = "") -> str:
    return f"{name} {value:.2f}{unit} (goal {goal:g}{unit}): {'ok' if good else 'SLOW'}"


def show_overhead(cost: dict[str, float]) -> None:
    each = f"{cost['row'] * 1e3:.2f} ms, single {cost['single'] * 1e3:.2f} ms"
    used = f"{cost['processor'] * 1e3:.2f} ms of all processors"
    verdict = judged("overhead", cost["overhead"] * 1e3, OVERHEAD_GOAL * 1e3, cost["overhead"] < OVERHEAD_GOAL, " ms")
    print(f"empty rows: {each}, {used}; {verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000, help="empty rows")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="MiB of an image")
    parser.add_argument("--only", choices=("overhead", "throughput", "growth"), help="one of the parts")
    parser.add_argument("--to", type=Path, help="a file of what was measured, for fleet_figure.py")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="diskmorph-bench-") as name:
        if asked.only in {None, "overhead"}:
            found["overhead"] = overhead(Path(name), asked.rows)
            show_overhead(found["overhead"])
        if asked.only in {None, "throughput"}:
            found["throughput"] = speed = throughput(Path(name), asked.images, asked.size)
            verdict = judged("ratio", speed["ratio"], SPEED_GOAL, speed["ratio"] >= SPEED_GOAL)
            print(f"1 worker {speed['1']:.2f} s, 2 workers {speed['2']:.2f} s: {verdict}", flush=True)
        if asked.only in {None, "growth"}:
            found["growth"] = growth(Path(name))
            for run in found["growth"]:
                print(f"{run['workers']} workers: {run['span']:.2f} s, {run['whole']:.2f} s with start and end")
    if asked.to:
        asked.to.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
