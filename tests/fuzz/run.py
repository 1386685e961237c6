"""`make fuzz`: mutants of every format, judged here and by qemu-img: `run.py [--count N] [--format F] [--report FILE]`.

Exit status 1 if any mutant gave a traceback, took more than 10 s or more than 256 MiB, or was read as other content although
its file was cut. Findings are kept under build/fuzz/.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import judge
from mutants import FIXTURES, Subject, mutant, subject

QEMU = {
    "qcow2": "qcow2",
    "vmdk": "vmdk",
    "vdi": "vdi",
    "vhd": "vpc",
    "vhdx": "vhdx",
    "parallels": "parallels",
    "qcow": "qcow",
}
KEEP = Path(__file__).parents[2] / "build/fuzz"
BAD = ("traceback", "timeout", "memory", "crash")


def subjects(format: str) -> list[Subject]:
    found = [
        subject(path, format)
        for path in sorted((FIXTURES / format).iterdir())
        if path.suffix not in {".toml", ".sh"} and not path.stem.endswith(("-flat", "-s001"))
    ]
    return [it for it in found if it.name not in {"flat.vmdk", "split.vmdk"}]


def peer(path: Path, format: str) -> dict[str, object]:
    """What qemu-img makes of a mutant: exit status, content; killed after 10 s or at 1 GiB of memory."""
    target = path.with_suffix(".peer")
    words = f"ulimit -v 1048576; exec timeout -s KILL {judge.TIME} qemu-img convert -f {format} -O raw {path} {target}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, check=False)
    answer: dict[str, object] = {"status": done.returncode}
    if done.returncode == 0 and target.stat().st_size <= judge.READ:
        answer["sha256"] = hashlib.sha256(target.read_bytes()).hexdigest()
    target.unlink(missing_ok=True)
    return answer


def outcome_of_peer(answer: dict[str, object], it: Subject) -> str:
    status = answer["status"]
    if status in (137, -9):
        return "timeout"
    if status == 0:
        return "same" if answer.get("sha256") == hashlib.sha256(it.content).hexdigest() else "other content"
    return "refused" if status == 1 else "crash"


def fuzz(
    format: str, count: int, *, with_peer: bool
) -> tuple[collections.Counter[str], collections.Counter[str], list[str]]:
    ours: collections.Counter[str] = collections.Counter()
    theirs: collections.Counter[str] = collections.Counter()
    findings: list[str] = []
    group = subjects(format)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            it = group[number % len(group)]
            path = Path(folder, f"{number}{it.suffix}")
            path.write_bytes(mutant(it, number))
            answer = judge.judged(str(path), format)
            word = str(answer["outcome"])
            if word == "read":
                word = "same" if answer["sha256"] == hashlib.sha256(it.content).hexdigest() else "other content"
                word += "" if word == "same" else (", check clean" if answer["clean"] else ", check finds it")
            ours[word] += 1
            if answer["outcome"] in BAD:
                KEEP.mkdir(parents=True, exist_ok=True)
                (KEEP / f"{it.name}-{number}{it.suffix}").write_bytes(path.read_bytes())
                findings.append(f"{it.name} mutant {number}: {json.dumps(answer)}")
            if with_peer:
                theirs[outcome_of_peer(peer(path, QEMU[format]), it)] += 1
            path.unlink()
    return ours, theirs, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="mutants a format")
    parser.add_argument("--format", action="append", choices=sorted(QEMU))
    parser.add_argument("--no-peer", action="store_true", help="do not run qemu-img on the same mutants")
    parser.add_argument("--report", type=Path, help="write the counts as JSON")
    words = parser.parse_args()
    report = {}
    failed = 0
    for name in words.format or QEMU:
        ours, theirs, findings = fuzz(name, words.count, with_peer=not words.no_peer)
        report[name] = {"diskmorph": dict(ours), "qemu-img": dict(theirs)}
        print(f"{name}: diskmorph {dict(ours)}; qemu-img {dict(theirs)}", flush=True)
        for finding in findings:
            print(f"  {finding}")
        failed += len(findings)
    if words.report:
        words.report.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    print(f"{failed} findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
