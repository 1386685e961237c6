"""Killed at random times, and before and after each call that makes a target real: the old target, none, or all of it."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diskmorph
from diskmorph.convert.options import ConvertOptions

from testkit import MIB, content, data

SIZE = 3 * MIB
OLD = b"the old target"
TARGETS: list[tuple[str, dict[str, str], str | None]] = [
    ("raw", {}, None),
    ("qcow2", {}, None),
    ("qcow2", {}, "deflate"),
    ("vmdk", {}, None),
    ("vmdk", {"subformat": "twoGbMaxExtentFlat"}, None),
    ("vmdk", {"subformat": "streamOptimized"}, None),
    ("vdi", {}, None),
    ("vhd", {}, None),
    ("vhdx", {}, None),
]
IDS = [" ".join([f, *o.values(), c or ""]).strip() for f, o, c in TARGETS]
QUICK, OFTEN = 8, 200
CALLS = ["fsync", "ftruncate", "link", "rename", "unlink"]
TIMES: dict[str, float] = {}


def convert(folder: Path, target: tuple[str, dict[str, str], str | None], rate: int | None) -> None:
    word, options, compress = target
    diskmorph.convert(
        folder / "in.raw",
        folder / f"out.{word}",
        options=ConvertOptions(
            format_options=options, compress=compress, force=True, threads=2, rate=rate, source_format="raw"
        ),
    )


def forked(work: Callable[[], None]) -> int:
    """Run in a child; 0 if it ended, 1 if it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - a child of a test tells, and ends
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def prepare(folder: Path, target: tuple[str, dict[str, str], str | None], *, old: bool) -> dict[str, bytes]:
    """Write the source, and an old target by another content; return the files that there are."""
    (folder / "in.raw").write_bytes(data("kill", SIZE))
    if old:
        (folder / f"out.{target[0]}").write_bytes(OLD)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def judge(folder: Path, name: str, before: dict[str, bytes], *, ended: bool) -> str:
    """Demand the old target, none, or the complete new one; say which."""
    path = folder / name
    left = [p.name for p in folder.iterdir() if p.name.startswith(".") and not p.name.endswith((".part", ".old"))]
    assert not left
    if not path.exists():
        assert not ended, "exit status 0 without a target"
        return "none"
    if path.read_bytes() == before.get(name):
        assert not ended, "exit status 0, but the old target"
        return "old"
    with diskmorph.open_disk(path) as disk:
        assert content(disk)[:SIZE] == data("kill", SIZE)
    return "complete"


def killed_at_random(folder: Path, target: tuple[str, dict[str, str], str | None], rng: random.Random) -> str:
    before = prepare(folder, target, old=rng.random() < 0.5)
    whole = TIMES.setdefault(str(target), timed(folder / "timed", target))
    child = forked(lambda: convert(folder, target, 24 * MIB))
    time.sleep(rng.uniform(0, whole * 1.15))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    assert ended or os.WIFSIGNALED(status)
    word = judge(folder, f"out.{target[0]}", before, ended=ended)
    left = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert not left or (not ended and word != "complete") or left[0].endswith(".old"), left
    return word


def timed(folder: Path, target: tuple[str, dict[str, str], str | None]) -> float:
    folder.mkdir()
    prepare(folder, target, old=False)
    begun = time.monotonic()
    assert os.waitpid(forked(lambda: convert(folder, target, 24 * MIB)), 0)[1] == 0
    return time.monotonic() - begun


@pytest.mark.parametrize("target", TARGETS, ids=IDS)
def test_kill(target: Any, tmp_path: Path) -> None:
    rng = random.Random(str(target))
    for turn in range(QUICK):
        folder = tmp_path / str(turn)
        folder.mkdir()
        killed_at_random(folder, target, rng)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=IDS)
def test_kill_often(target: Any, tmp_path: Path) -> None:
    rng = random.Random(f"often {target}")
    words = []
    for turn in range(OFTEN):
        folder = tmp_path / str(turn)
        folder.mkdir()
        words.append(killed_at_random(folder, target, rng))
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
    assert len(set(words)) == 3, "not every outcome was met: the times are not spread"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[1], TARGETS[4]], ids=["raw", "qcow2", "several files"])
def test_kill_around_every_call_that_commits(target: Any, call: str, tmp_path: Path) -> None:
    for old in (False, True):
        nth = 0
        while kill_around(target, call, nth, old, tmp_path):
            nth += 1
            assert nth < 100


def kill_around(target: Any, call: str, nth: int, old: bool, where: Path) -> bool:
    """Kill before and after the nth call; whether there was one."""
    for after in (False, True):
        folder = where / f"{old} {nth} {after}"
        folder.mkdir()
        before = prepare(folder, target, old=old)
        child = forked(functools.partial(dying, folder, target, call, nth, after=after))
        _, status = os.waitpid(child, 0)
        ended = os.WIFEXITED(status)
        assert not ended or os.WEXITSTATUS(status) == 0
        judge(folder, f"out.{target[0]}", before, ended=ended)
        if ended:
            return False
    return True


def dying(folder: Path, target: Any, call: str, nth: int, *, after: bool) -> None:
    """Convert, and die at the nth call (from 0) of os.CALL."""
    real = getattr(os, call)
    count = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == nth + 1 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if count[0] == nth + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(os, call, wrapped)
    convert(folder, target, None)


def writes_into(pid: int, folder: Path) -> bool:
    """Whether a process has a file without a name, or a hidden one, open in a folder."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            name = os.readlink(link)
            if name.startswith((f"{folder}/.", f"{folder}/#")):
                return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(number: int, tmp_path: Path) -> None:
    (tmp_path / "in.raw").write_bytes(data("kill", 16 * MIB))
    words = ["convert", "-q", "-f", "raw", "--rate", "16M", tmp_path / "in.raw", tmp_path / "out.qcow2"]
    child = subprocess.Popen([sys.executable, "-m", "diskmorph", *words])
    end = time.monotonic() + 60
    while time.monotonic() < end and not writes_into(child.pid, tmp_path):
        time.sleep(0.01)
    child.send_signal(number)
    assert child.wait(10) == {signal.SIGINT: 130, signal.SIGTERM: 143}[signal.Signals(number)]
    assert [p.name for p in tmp_path.iterdir()] == ["in.raw"]
