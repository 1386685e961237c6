"""Killed at random times: the old target or none, or the complete new one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diskmorph

from testkit import MIB, content, data

SCRIPT = """
import sys, diskmorph
options = diskmorph.ConvertOptions(rate=16 << 20, force=True)
print("begun", flush=True)
diskmorph.convert(sys.argv[1], sys.argv[2], options=options)
"""
FORMATS = ["raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx"]


def killed(source: Path, target: Path, after: float, number: int) -> int:
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, source, target], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(after)
    child.send_signal(number)
    child.stdout.close()
    return child.wait(10)


def run_once(format: str, folder: Path, rng: random.Random) -> None:
    want = data("kill", 8 * MIB)
    (folder / "in.raw").write_bytes(want)
    target = folder / f"out.{format}"
    old = rng.choice((None, b"the old target"))
    if old is not None:
        target.write_bytes(old)
    killed(folder / "in.raw", target, rng.uniform(0, 0.6), signal.SIGKILL)
    if target.exists() and target.read_bytes() != old:
        with diskmorph.open_disk(target) as disk:
            assert content(disk) == want
    else:
        assert target.exists() == (old is not None)


@pytest.mark.parametrize("format", FORMATS)
def test_kill(format: str, tmp_path: Path) -> None:
    run_once(format, tmp_path, random.Random(format))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("turn", range(200))
def test_kill_often(format: str, turn: int, tmp_path: Path) -> None:
    run_once(format, tmp_path, random.Random(f"{format}/{turn}"))


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.raw").write_bytes(data("kill", 16 * MIB))
    code = killed(tmp_path / "in.raw", tmp_path / "out.qcow2", 0.4, signal.SIGINT)
    assert code != 0
    assert [p.name for p in tmp_path.iterdir()] == ["in.raw"]
