"""Words shared by verbs, qemu-img's words, progress on a terminal."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clikit import dm

from diskmorph.commands.common import asks_for_help, format_options
from diskmorph.commands.progress import bar_text
from diskmorph.commands.text import duration_text, exact_size_text, size_text, table
from diskmorph.convert.options import Progress
from diskmorph.formats.errors import OptionError

from testkit import MIB, data, run

COMMAND = [sys.executable, "-m", "diskmorph"]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.raw"
    path.write_bytes(data("words", 3 * MIB) + bytes(MIB))
    return path


def test_format_options() -> None:
    assert format_options([]) == {}
    assert format_options(["a=1,b=x", "c"]) == {"a": "1", "b": "x", "c": "on"}
    assert format_options(["a=1", "a=2"]) == {"a": "2"}
    assert format_options(["name=with,,comma,b=2"]) == {"name": "with,comma", "b": "2"}
    with pytest.raises(OptionError):
        format_options(["=x"])
    assert asks_for_help(["a=1,help"]) and asks_for_help(["?"]) and not asks_for_help(["a=help"])


def test_text() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 10 * 1024, 1 << 20, 3 << 29, 5 << 60)] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "10 KiB", "1 MiB", "1.5 GiB", "5 EiB",
    ]  # fmt: skip
    assert size_text(1 << 41) == "2 TiB" and size_text(12345678) == "11.8 MiB"
    assert exact_size_text(1536) == "1.5 KiB (1536 bytes)" and exact_size_text(7) == "7 bytes"
    assert [duration_text(n) for n in (0, 5.9, 61, 3725)] == ["0:00", "0:05", "1:01", "1:02:05"]
    assert list(table(("a", "number"), [("xx", "1")], right=(1,), indent=0)) == ["a   number", "xx       1"]


def test_bar_fits_and_tells() -> None:
    line = bar_text(Progress("convert", 3 << 30, 4 << 30), "converting", 3.0, 0, 80)
    assert len(line) <= 80
    for word in ("75%", "3 GiB of 4 GiB", "1 GiB/s", "0:01 left", "#"):
        assert word in line
    for width in (10, 30, 50, 200):
        assert len(bar_text(Progress("convert", 0, 0), "converting", 0.0, 0, width)) <= width


QEMU_WORDS = [
    ["-f", "raw", "-O", "qcow2", "-W", "-m", "2", "-t", "none", "-T", "none"],
    ["-f", "raw", "-O", "vpc", "-p", "-q"],
    ["-O", "qcow2", "-c", "-o", "compat=v3,lazy_refcounts=off", "-o", "cluster_size=128k"],
    ["-O", "qcow2", "-t", "writeback", "-U", "-C", "-r", "1G", "-S", "64k"],
]


@pytest.mark.parametrize("words", QEMU_WORDS)
def test_qemu_words_are_taken(words: list[str], disk: Path) -> None:
    dm("convert", *words, disk, "out").ok()
    form = words[words.index("-O") + 1]
    run("qemu-img", "compare", "-f", "raw", "-F", form, disk, "out")


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["convert", "-n", "disk.raw", "out.qcow2"], "--force"),
        (["convert", "--salvage", "disk.raw", "out.qcow2"], "check --repair"),
        (["convert", "--image-opts", "disk.raw", "out.qcow2"], "--backing"),
        (["convert", "--object", "secret,id=a", "disk.raw", "out.qcow2"], "encrypted"),
        (["create", "-u", "-b", "x", "out.qcow2"], "base"),
        (["snapshot", "-c", "new", "disk.raw"], "qemu-img snapshot"),
    ],
)
def test_qemu_words_that_are_refused_name_ours(words: list[str], instead: str, disk: Path) -> None:
    done = dm(*words)
    assert done.status == 2 and instead in done.err
    assert not Path("out.qcow2").exists()


def test_other_verbs_take_qemu_words(disk: Path) -> None:
    run("qemu-img", "convert", "-O", "qcow2", disk, "a.qcow2")
    assert dm("info", "--output=json", "a.qcow2").ok().json["format"] == "qcow2"
    dm("info", "-U", "--backing-chain", "a.qcow2").ok()
    dm("compare", "-s", "-f", "raw", "-F", "qcow2", disk, "a.qcow2").ok()
    dm("check", "-r", "leaks", "a.qcow2").ok()
    dm("create", "-f", "qcow2", "b.qcow2", "1G").ok()
    dm("resize", "b.qcow2", "+1G").ok()
    dm("resize", "b.qcow2", "-512M").ok()
    assert dm("info", "--json", "b.qcow2").ok().json["virtual_size"] == 3 << 29
    run("qemu-img", "snapshot", "-c", "one", "a.qcow2")
    assert "one" in dm("snapshot", "-l", "a.qcow2").ok().out
    dm("convert", "-l", "snapshot.name=one", "a.qcow2", "one.raw").ok()
    assert Path("one.raw").read_bytes() == disk.read_bytes()


def test_suffixes_choose(disk: Path) -> None:
    for suffix, form in (
        ("img", "raw"),
        ("raw", "raw"),
        ("vhd", "vpc"),
        ("vpc", "vpc"),
        ("vhdx", "vhdx"),
        ("vdi", "vdi"),
        ("vmdk", "vmdk"),
        ("qcow2", "qcow2"),
    ):
        dm("convert", "disk.raw", f"out.{suffix}").ok()
        run("qemu-img", "compare", "-f", "raw", "-F", form, disk, f"out.{suffix}")
    done = dm("convert", "disk.raw", "out.unknown")
    assert done.status == 2 and "-O" in done.err


def test_options_may_stand_anywhere(disk: Path) -> None:
    dm("convert", "disk.raw", "--force", "out.qcow2", "-O", "qcow2").ok()
    dm("-q", "convert", "--force", "disk.raw", "out.qcow2").ok()
    assert Path("out.qcow2").exists()


def test_option_help(disk: Path) -> None:
    for words in (
        ["convert", "-O", "vmdk", "-o", "help"],
        ["convert", "-o", "help", "disk.raw", "x.vmdk"],
        ["convert", "-O", "vmdk", "-o", "?", "a", "b"],
    ):
        done = dm(*words).ok()
        assert "subformat" in done.out and "streamOptimized" in done.out
    assert dm("convert", "-o", "help", "a", "b").status == 2
    names = [option["name"] for option in dm("convert", "--json", "-O", "qcow2", "-o", "help").ok().json["options"]]
    assert "cluster_size" in names and "preallocation" in names


def test_formats_that_compress_are_those_that_say_so(disk: Path) -> None:
    """`formats` tells which codecs -c takes; converting with each is the proof."""
    for entry in dm("formats", "--json").ok().json["formats"]:
        if (
            not entry["writes"]
            or not entry["suffixes"]
            or entry["name"] not in {"raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx"}
        ):
            continue
        for codec in ("deflate", "zstd"):
            done = dm("convert", "--force", "--compress", codec, "-O", entry["name"], "disk.raw", "out")
            assert (done.status == 0) == (codec in entry["compression"]), (entry["name"], codec, done.err)


def on_terminal(*words: str, **env: str) -> str:
    """What a command shows on a terminal of 90 columns."""
    master, slave = pty.openpty()
    settings = {**os.environ, "COLUMNS": "90", "TERM": "xterm-256color", **env}
    child = subprocess.Popen([*COMMAND, *words], stdin=slave, stdout=slave, stderr=slave, env=settings)
    os.close(slave)
    shown, end = b"", time.monotonic() + 60
    ready = select.poll()
    ready.register(master, select.POLLIN)
    while time.monotonic() < end:
        if ready.poll(100):
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            shown += piece
        elif child.poll() is not None:
            break
    os.close(master)
    assert child.wait() == 0, shown
    return shown.decode()


def test_a_bar_on_a_terminal(disk: Path) -> None:
    shown = on_terminal("convert", "--rate", "3M", "disk.raw", "out.vdi")
    assert "%" in shown and "/s" in shown and "left" in shown
    pictures = re.split(r"\r", shown)
    assert all(len(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", p).strip("\n")) <= 90 for p in pictures if "%" in p)
    assert "written in" in pictures[-2] + pictures[-1]


def test_what_is_over_soon_needs_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from diskmorph.commands import progress as module
    from diskmorph.commands.output import Output

    clock = iter((0.0, *(at / 10 for at in range(100) for _ in range(2))))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    out = Output(progress="bar")
    out.stderr = io.StringIO()
    seen = []
    with module.progress(out, "converting") as tell:
        for done in range(8):
            tell(Progress("convert", done, 10))
            seen.append("%" in out.stderr.getvalue())
    assert seen[0] is False and seen[-1] is True
    assert out.stderr.getvalue().endswith("\r\x1b[K"), "the bar is wiped when the job is over"


def test_colours_and_no_color(disk: Path) -> None:
    assert "\x1b[32m" in on_terminal("map", "disk.raw")
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b[" not in on_terminal("map", "disk.raw", **env)


def test_no_bar_off_a_terminal(disk: Path) -> None:
    done = dm("convert", "-f", "raw", "--rate", "6M", disk, "out.vdi").ok()
    assert done.err == ""
    assert "\r" in dm("convert", "-p", "--force", "--rate", "4M", disk, "out.vdi").ok().err


@pytest.mark.parametrize("size", ["+6M", " 6M", "6 M", "6M ", "1_000", "\u0666M", "1e6", "6M+"], ids=ascii)
def test_a_size_is_digits_and_a_suffix(size: str, disk: Path) -> None:
    for words in (["convert", f"--size={size}", disk, "b.qcow2"], ["create", "--", "b.qcow2", size]):
        refused = dm(*words)
        assert refused.status == 2 and "is not a size" in refused.err
    assert not Path("b.qcow2").exists()


def test_sizes_of_resize_may_be_relative(disk: Path) -> None:
    del disk
    dm("create", "b.qcow2", "6.5MiB").ok()
    assert dm("resize", "--json", "b.qcow2", "+512K").ok().json["virtual_size"] == 7 * MIB
    assert dm("resize", "--json", "b.qcow2", "-512K").ok().json["virtual_size"] == 13 * MIB // 2
    for size in ("++1M", "+-1M", "+ 1M", "-", "+", "-9M"):
        assert dm("resize", "b.qcow2", size).status == 2
    assert "+SIZE" in dm("resize", "--help").out


def test_create_and_resize_tell_their_progress(disk: Path) -> None:
    del disk
    told = dm("create", "--progress", "json", "b.qcow2", "6M").ok().err
    assert [json.loads(line)["total"] for line in told.splitlines()][-1] == 6 * MIB
    told = dm("resize", "--progress", "json", "disk.raw", "8M").ok().err
    rows = [json.loads(line) for line in told.splitlines() if "phase" in line]
    assert (rows[-1]["done"], rows[-1]["total"]) == (8 * MIB, 8 * MIB)
    dm("resize", "-p", "disk.raw", "9M").ok()


@pytest.mark.parametrize("size", ["1K", "+1K"])
def test_a_pipe_is_not_resized(size: str, disk: Path) -> None:
    with disk.open("rb") as file:
        done = subprocess.run([*COMMAND, "resize", "-", size], stdin=file, capture_output=True, check=False)
    assert done.returncode == 2
    assert not done.stdout
    assert b"convert --size" in done.stderr
