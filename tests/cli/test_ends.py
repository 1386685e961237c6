"""How a run ends: exit statuses, errors, signals, closed pipes, full disks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clikit import dm

from diskmorph import cli

from testkit import MIB, data

COMMAND = [sys.executable, "-m", "diskmorph"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(data("disk", 4 * MIB))
    return path


def test_statuses(disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(data("other", 4 * MIB))
    assert dm("info", disk).status == 0
    assert dm("info", tmp_path / "none").status == 1
    assert dm("info", "--nosuch", disk).status == 2
    assert dm("compare", disk, other).status == 3


def test_errors_are_one_line_that_names_the_file(disk: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.qcow2"
    bad.write_bytes(b"QFI\xfb" + (99).to_bytes(4, "big") + bytes(200))
    for words in (["info", bad], ["map", bad], ["digest", bad], ["check", bad], ["convert", bad, tmp_path / "x.raw"]):
        done = dm(*words)
        assert (done.status, done.out) == (1, "")
        (line,) = done.err.splitlines()
        assert line.startswith(f"diskmorph: {bad}: ") and "99" in line
    assert not (tmp_path / "x.raw").exists()


def test_a_traceback_only_when_asked_for(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    for words in (["info", missing], ["-v", "info", missing], ["info", missing, "-v"]):
        assert "Traceback" not in dm(*words).err
    for words in (
        ["-vv", "info", missing],
        ["info", "-vv", missing],
        ["-v", "info", "-v", missing],
        ["info", missing, "--verbose", "--verbose"],
    ):
        done = dm(*words)
        assert done.status == 1 and "Traceback" in done.err and done.err.startswith("diskmorph: ")


def test_unexpected_errors_ask_to_be_reported(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr("diskmorph.convert.inspect.inspect", broken)
    done = dm("info", disk, "--json")
    assert done.status == 1
    assert "fault in diskmorph: ZeroDivisionError: by chance" in done.err and len(done.err.splitlines()) == 1
    assert done.json["error"]["kind"] == "internal"


@pytest.mark.parametrize(
    ("raised", "kind", "status"),
    [
        (OSError(28, "No space left on device", "place"), "io", 1),
        (MemoryError(), "memory", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (cli.Terminated(), "terminated", 143),
    ],
)
def test_kinds(raised: BaseException, kind: str, status: int, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("diskmorph.convert.inspect.inspect", broken)
    done = dm("info", disk, "--json")
    assert (done.status, done.json["error"]["kind"]) == (status, kind)
    assert "Traceback" not in done.err


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    name = tmp_path / "evil\x1b]0;title\x07.raw"
    done = dm("info", name)
    assert done.status == 1 and "\x1b" not in done.err and "\\x1b" in done.err
    name.write_bytes(bytes(4096))
    for words in (["info", name], ["map", name]):
        assert "\x1b" not in dm(*words).ok().out


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe.raw"
    with open(name, "wb") as file:
        file.write(bytes(4096))
    for words in (["info"], ["info", "--json"], ["map", "-v"], ["digest"]):
        done = subprocess.run([*COMMAND, *words, name], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr


def slow(disk: Path, target: Path) -> subprocess.Popen[bytes]:
    """A conversion that takes its time, once it has begun."""
    with open(disk, "r+b") as file:
        file.write(data("slow", 32 * MIB))
    child = subprocess.Popen(
        [*COMMAND, "convert", "--rate", "2M", "--progress", "json", disk, target],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stderr is not None
    while json.loads(child.stderr.readline())["done"] == 0:
        pass
    return child


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_signals_leave_nothing(number: int, status: int, disk: Path, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    child = slow(disk, folder / "out.qcow2")
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    assert child.returncode == status
    assert list(folder.iterdir()) == []
    assert b"Traceback" not in err


def test_a_second_interrupt_does_not_disturb_the_cleaning_up(disk: Path, tmp_path: Path) -> None:
    child = slow(disk, tmp_path / "out.qcow2")
    for _ in range(5):
        child.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130 and b"Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]


def test_a_closed_pipe_is_quiet(disk: Path) -> None:
    for words in ("map -v {0}", "convert -O raw {0} -", "convert --help"):
        line = f"{' '.join(COMMAND)} {words.format(disk)} | true"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        assert done.stderr == ""


def test_a_full_standard_output_is_an_error(disk: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "info", disk], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr and "Traceback" not in done.stderr


def test_json_is_refused_where_the_image_goes(disk: Path) -> None:
    done = dm("convert", "--json", "-O", "raw", disk, "-")
    assert done.status == 2 and "standard output" in done.json["error"]["message"]


def test_quiet_says_nothing(disk: Path, tmp_path: Path) -> None:
    for words in (
        ["convert", "-q", disk, tmp_path / "a.vdi"],
        ["-q", "convert", disk, tmp_path / "b.vdi"],
        ["create", "-q", tmp_path / "c.vdi", "1M"],
    ):
        done = dm(*words).ok()
        assert (done.out, done.err) == ("", "")
    assert dm("digest", "-q", disk).ok().out.strip()


@pytest.mark.parametrize("verb", ["convert", "cat"])
def test_a_full_pipe_that_does_not_block_gets_all(disk: Path, tmp_path: Path, verb: str) -> None:
    """Unbuffered standard output is a raw stream, which takes a part of what it is given."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "file").write_bytes(disk.read_bytes())
    words = ["convert", "-O", "raw", disk, "-"] if verb == "convert" else ["cat", folder, "/file"]
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*COMMAND, *map(str, words)], stdout=sink, stderr=subprocess.PIPE, env=unbuffered) as child:
        os.close(sink)
        with open(source, "rb") as file:
            time.sleep(0.5)
            got = file.read()
        assert child.wait() == 0, child.stderr and child.stderr.read()
    assert got == disk.read_bytes()
