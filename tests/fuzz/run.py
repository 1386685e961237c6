"""`make fuzz`: mutants of every format, judged here and by qemu-img: `run.py [--count N] [--format F] [--report FILE]`.

Exit status 1 if any mutant gave a traceback, took more than 10 s or more than 256 MiB. Findings are kept, as the bytes in
which they differ from their subject, under build/fuzz/.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import judge
import parsers
from mutants import Places, mutant, patches
from subjects import TABLE, Subject, subjects

QEMU = {
    "qcow2": "qcow2",
    "vmdk": "vmdk",
    "vdi": "vdi",
    "vhd": "vpc",
    "vhdx": "vhdx",
    "parallels": "parallels",
    "qcow": "qcow",
    "bochs": "bochs",
    "cloop": "cloop",
    "dmg": "dmg",
}
KEEP = Path(__file__).parents[2] / "build/fuzz"
BAD = ("traceback", "timeout", "memory", "crash")
Counts = collections.Counter[str]


def group_of(format: str) -> list[Subject]:
    if format in TABLE:
        return subjects(format)
    found = []
    for name, make in parsers.MAKERS[format].items():
        with tempfile.TemporaryDirectory() as where:
            folder = Path(where)
            main = make(folder)
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            mend = parsers.MENDERS.get(format, lambda _: None)
            seen = parsers.look(format, folder / main)
            found.append(Subject(name, format, files, main, main, ((0, len(files[main])),), mend, {}, seen))
    return found


def peer(it: Subject, path: Path) -> str:
    """What qemu-img makes of a mutant; killed after 10 s, held to 2 GiB of memory."""
    target = path.with_name("peer.raw")
    argv = ["qemu-img", "convert", "-f", QEMU[it.format], "-O", "raw"]
    argv += ["-l", f"snapshot.name={it.open['snapshot']}"] if "snapshot" in it.open else []
    words = f"ulimit -v 2097152; exec timeout -s KILL {judge.TIME} /usr/bin/env time -f %M " + '"$@"'
    done = subprocess.run(
        ["sh", "-c", words, "sh", *argv, path, target], capture_output=True, check=False, cwd=path.parent
    )
    size = target.stat().st_size if target.exists() else 0
    sha = None
    if done.returncode == 0 and size <= judge.READ:
        sha = hashlib.sha256(target.read_bytes()).hexdigest()
    target.unlink(missing_ok=True)
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    peak = int(last[0]) * 1024 if last and last[0].isdigit() else 0
    if done.returncode in (137, -9):
        return "timeout"
    if done.returncode not in (0, 1):
        return "crash"
    if peak > judge.MEMORY:
        return "memory"
    if done.returncode == 1:
        return "refused"
    return "same" if sha == it.content else "other content"


def _word(answer: dict[str, Any], it: Subject, known: set[str]) -> str:
    if answer["outcome"] != "read":
        return str(answer["outcome"])
    if answer["sha256"] == it.content:
        return "same"
    new = [text for text in answer["found"] if text not in known]
    return "other content, check tells" if new else "other content, check silent"


def fuzz(format: str, count: int, *, with_peer: bool, seconds: float, show: bool) -> tuple[Counts, Counts, list[str]]:
    ours: Counts = collections.Counter()
    theirs: Counts = collections.Counter()
    findings: list[str] = []
    group = group_of(format)
    places = [Places(it) for it in group]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        known = [set(judge.look(it, it.write(folder))["found"]) for it in group]  # type: ignore[call-overload]
        # What qemu-img does not read as it is tells nothing of how it takes damage.
        fair = [with_peer and format in QEMU and peer(it, it.write(folder)) == "same" for it in group]
        for number in range(count):
            if seconds and time.monotonic() - begun > seconds:
                break
            index = number % len(group)
            it = group[index]
            blob = mutant(it, places[index], number)
            path = it.write(folder, blob)
            answer = judge.judged(it, path)
            word = _word(answer, it, known[index])
            ours[word] += 1
            what = f"{format} {it.name} {number}: {_shown(it, blob)}"
            if answer["outcome"] in BAD:
                KEEP.mkdir(parents=True, exist_ok=True)
                (KEEP / f"{format}-{it.name}-{number}.json").write_text(json.dumps(_shown(it, blob)))
                findings.append(f"{what}: {json.dumps(answer)}")
            elif show and word.endswith("silent"):
                print(f"  {what}", flush=True)
            if fair[index]:
                theirs[peer(it, path)] += 1
    return ours, theirs, findings


def _shown(it: Subject, blob: bytes) -> list[tuple[int, str]]:
    return [(offset, piece.hex()) for offset, piece in patches(it.blob, blob)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="mutants a format")
    parser.add_argument("--format", action="append", choices=[*TABLE, *parsers.MAKERS])
    parser.add_argument("--seconds", type=float, default=0, help="at most so long a format; 0: as long as it takes")
    parser.add_argument("--no-peer", action="store_true", help="do not run qemu-img on the same mutants")
    parser.add_argument("--show", action="store_true", help="show what reads as something else, the check being silent")
    parser.add_argument("--report", type=Path, help="write the counts as JSON")
    words = parser.parse_args()
    report = {}
    failed = 0
    for name in words.format or [*TABLE, *parsers.MAKERS]:
        ours, theirs, findings = fuzz(
            name, words.count, with_peer=not words.no_peer, seconds=words.seconds, show=words.show
        )
        report[name] = {"diskmorph": dict(ours), "qemu-img": dict(theirs)}
        print(f"{name}: diskmorph {dict(ours)}; qemu-img {dict(theirs)}", flush=True)
        for finding in findings:
            print(f"  {finding[:2000]}")
        failed += len(findings)
    if words.report:
        words.report.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    print(f"{failed} findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
