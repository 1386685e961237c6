"""`--resume`: a conversion that was killed goes on, and comes to the same bytes as one that was not."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from clikit import dm

import diskmorph
from diskmorph.convert import resume
from diskmorph.formats.errors import OptionError, PolicyError, TargetError

from testkit import MIB, data, pattern_disk, run, write_image

SIZE = 48 * MIB
CASES = [
    ("out.raw", {}),
    ("out.qcow2", {}),
    ("out.vdi", {}),
    ("out.vhd", {}),
    ("out.vhdx", {}),
    ("out.vmdk", {}),
    ("packed.qcow2", {"compress": "deflate"}),
    ("stream.vmdk", {"format_options": {"subformat": "streamOptimized"}}),
    ("split.vmdk", {"format_options": {"subformat": "twoGbMaxExtentSparse"}}),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    pieces = [(at * MIB, MIB, data(at, MIB)) for at in range(0, 47, 2)]
    path = tmp_path_factory.mktemp("source") / "disk.qcow2"
    return write_image("qcow2", pattern_disk(SIZE, pieces), path)[0]


def options(**words):
    return diskmorph.ConvertOptions(resume=True, reproducible=True, **words)


class Stop(Exception):
    pass


def stop_after(share, monkeypatch):
    """Fail when so much of the disk was written; every window is a checkpoint."""
    monkeypatch.setattr(resume, "_BYTES", 1)
    count = 0
    written = resume.Journal.written

    def failing(journal, number, moved):
        nonlocal count
        written(journal, number, moved)
        count += moved.total()
        if count >= share * SIZE:
            raise Stop

    monkeypatch.setattr(resume.Journal, "written", failing)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("name", "words"), CASES, ids=[case[0] for case in CASES])
def test_what_was_stopped_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, name, words):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    diskmorph.convert(source, whole / name, options=options(**words))
    for share in (0.3, 0.2):
        with monkeypatch.context() as patch:
            stop_after(share, patch)
            with pytest.raises(Stop):
                diskmorph.convert(source, parts / name, options=options(**words))
        assert f".{name}.resume" in names(parts)
        assert name not in names(parts)
    report = diskmorph.convert(source, parts / name, options=options(**words))
    assert 0.4 * SIZE < report.resumed < SIZE
    assert report.bytes.total() == report.virtual_size
    assert names(parts) == names(whole)
    for member in names(whole):
        assert (parts / member).read_bytes() == (whole / member).read_bytes(), member
    assert diskmorph.compare(source, parts / name).identical


_CHILD = """
import sys, time
from diskmorph.convert import resume
resume._BYTES = 1
written = resume.Journal.written
def slowly(*words):
    time.sleep(0.05)
    written(*words)
resume.Journal.written = slowly
from diskmorph.cli import main
sys.exit(main(sys.argv[1:]))
"""


def await_growth(child, journal, before):
    """Wait until a conversion tells its journal something new, or ends: start-up takes any time on a busy machine."""
    end = time.monotonic() + 60
    while time.monotonic() < end and child.poll() is None:
        if journal.exists() and journal.stat().st_size > before:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["out.raw", "out.vhdx", "packed.qcow2"])
def test_killed_at_random(source, tmp_path, name):
    rng = random.Random(name)
    words = ["-c"] if name.startswith("packed") else []
    line = ["convert", *words, "--reproducible", "--resume", "-q", str(source)]
    dm(*line, tmp_path / f"whole-{name}").ok()
    target, kills = tmp_path / name, 0
    journal = tmp_path / f".{name}.resume"
    for _ in range(8):
        before = journal.stat().st_size if journal.exists() else 0
        child = subprocess.Popen([sys.executable, "-c", _CHILD, *line, str(target)], stderr=subprocess.PIPE)
        await_growth(child, journal, before)
        try:
            child.wait(rng.uniform(0, 0.3))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
        child.stderr.close()
        if target.exists():
            break
    assert kills
    if not target.exists():
        dm(*line, target).ok()
    assert target.read_bytes() == (tmp_path / f"whole-{name}").read_bytes()


def test_uuids_and_times_stay_the_same(source, tmp_path, monkeypatch):
    words = diskmorph.ConvertOptions(resume=True)
    with monkeypatch.context() as patch:
        stop_after(0.5, patch)
        with pytest.raises(Stop):
            diskmorph.convert(source, tmp_path / "out.vdi", options=words)
    with resume_journal(tmp_path / ".out.vdi.resume") as first:
        seed = first
    diskmorph.convert(source, tmp_path / "out.vdi", options=words)
    diskmorph.convert(source, tmp_path / "other.vdi", options=words)
    assert len(seed) == 64
    assert (tmp_path / "out.vdi").read_bytes() != (tmp_path / "other.vdi").read_bytes()  # UUIDs are by chance
    run("qemu-img", "compare", tmp_path / "out.vdi", tmp_path / "other.vdi")


def resume_journal(path):
    import contextlib
    import json

    return contextlib.nullcontext(json.loads(path.read_text().splitlines()[0])["seed"])


def interrupted(source, target, monkeypatch, **words):
    with monkeypatch.context() as patch:
        stop_after(0.5, patch)
        with pytest.raises(Stop):
            diskmorph.convert(source, target, options=options(**words))
    return target.with_name(f".{target.name}.resume")


def test_a_changed_source_is_refused(source, tmp_path, monkeypatch):
    own = tmp_path / "disk.qcow2"
    own.write_bytes(source.read_bytes())
    journal = interrupted(own, tmp_path / "out.raw", monkeypatch)
    os.utime(own, (1, 1))
    with pytest.raises(TargetError, match=r"cannot be gone on with: source.*remove it"):
        diskmorph.convert(own, tmp_path / "out.raw", options=options())
    assert journal.exists()
    journal.unlink()
    assert diskmorph.convert(own, tmp_path / "out.raw", options=options()).resumed == 0


def test_other_options_are_refused(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "out.qcow2", monkeypatch)
    with pytest.raises(TargetError, match="-o"):
        diskmorph.convert(source, tmp_path / "out.qcow2", options=options(format_options={"cluster_size": "128K"}))


def test_a_torn_journal_costs_what_was_torn_off(source, tmp_path, monkeypatch):
    journal = interrupted(source, tmp_path / "out.raw", monkeypatch)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:-9])
    report = diskmorph.convert(source, tmp_path / "out.raw", options=options())
    assert 0 < report.resumed < 0.4 * SIZE
    assert diskmorph.compare(source, tmp_path / "out.raw").identical
    assert names(tmp_path) == ["out.raw"]


def test_rubbish_beyond_the_checkpoint_does_not_show(source, tmp_path, monkeypatch):
    journal = interrupted(source, tmp_path / "out.raw", monkeypatch)
    part = journal.with_name(".out.raw.resume.part")
    with part.open("r+b") as file:
        file.seek(int(0.9 * SIZE))
        file.write(b"\xff" * 4096)
    diskmorph.convert(source, tmp_path / "out.raw", options=options())
    assert diskmorph.compare(source, tmp_path / "out.raw").identical


def test_a_failure_before_the_first_checkpoint_leaves_nothing(source, tmp_path):
    (tmp_path / "out.raw").write_bytes(b"old")
    with pytest.raises(TargetError, match="exists already"):
        diskmorph.convert(source, tmp_path / "out.raw", options=options())
    assert names(tmp_path) == ["out.raw"]


def no_space(*_words, **_more):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["out.raw", "split.vmdk"])
@pytest.mark.parametrize("force", [False, True])
def test_a_name_that_cannot_be_had_costs_nothing(source, tmp_path, monkeypatch, name, force):
    """What is complete stays, and the next try gives it its name."""
    words = {"force": force, "format_options": {"subformat": "twoGbMaxExtentSparse"} if name == "split.vmdk" else {}}
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename" if force else "link", no_space)
        with pytest.raises(TargetError, match="No space"):
            diskmorph.convert(source, tmp_path / name, options=options(**words))
    assert f".{name}.resume" in names(tmp_path)
    assert name not in names(tmp_path)
    assert diskmorph.convert(source, tmp_path / name, options=options(**words)).resumed == SIZE
    assert diskmorph.compare(source, tmp_path / name).identical
    assert not [left for left in names(tmp_path) if left.startswith(".")]


@pytest.mark.parametrize("lost", ["split.vmdk", "split-s001.vmdk"])
def test_unfinished_files_that_are_gone_are_made_anew(source, tmp_path, monkeypatch, lost):
    words = {"format_options": {"subformat": "twoGbMaxExtentSparse"}}
    interrupted(source, tmp_path / "split.vmdk", monkeypatch, **words)
    (tmp_path / f".{lost}.resume.part").unlink()
    assert diskmorph.convert(source, tmp_path / "split.vmdk", options=options(**words)).resumed == 0
    assert diskmorph.compare(source, tmp_path / "split.vmdk").identical


def without(key):
    return lambda row: {name: value for name, value in row.items() if name != key}


DAMAGES = [
    *(without(key) for key in ("start", "runs", "moved")),
    *(lambda row, runs=runs: row | {"runs": runs} for runs in ("AA", "!!!", "QUJD", 7)),
    lambda row: row | {"moved": [1]},
    lambda row: row | {"start": "one"},
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_costs_what_follows(source, tmp_path, monkeypatch, damage):
    journal = interrupted(source, tmp_path / "out.raw", monkeypatch)
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = json.dumps(damage(json.loads(lines[3]))).encode() + b"\n"
    journal.write_bytes(b"".join(lines))
    report = diskmorph.convert(source, tmp_path / "out.raw", options=options())
    assert 0 < report.resumed < 0.4 * SIZE
    assert diskmorph.compare(source, tmp_path / "out.raw").identical


@pytest.mark.parametrize(
    "damage", [*(without(key) for key in ("facts", "seed", "time")), lambda row: row | {"seed": 7}]
)
def test_a_damaged_first_line_costs_all(source, tmp_path, monkeypatch, damage):
    journal = interrupted(source, tmp_path / "out.raw", monkeypatch)
    first, _, rest = journal.read_bytes().partition(b"\n")
    journal.write_bytes(json.dumps(damage(json.loads(first))).encode() + b"\n" + rest)
    assert diskmorph.convert(source, tmp_path / "out.raw", options=options()).resumed == 0
    assert diskmorph.compare(source, tmp_path / "out.raw").identical


def test_the_first_failure_is_told(source, tmp_path, monkeypatch):
    def fail(*_words):
        raise TargetError("cannot be synced")

    stop_after(0.3, monkeypatch)
    monkeypatch.setattr(resume, "_BYTES", 1 << 60)
    monkeypatch.setattr(resume.Journal, "checkpoint", fail)
    with pytest.raises(Stop):
        diskmorph.convert(source, tmp_path / "out.raw", options=options())


@pytest.mark.parametrize(("module", "call"), [(fcntl, "flock"), (os, "fstat"), (os, "ftruncate"), (os, "fsync")])
def test_a_journal_that_cannot_be_kept_says_so(source, tmp_path, monkeypatch, module, call):
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(module, call, no_space)
    with pytest.raises(TargetError, match="No space"):
        resume.Journal(tmp_path / "out.raw", {})
    monkeypatch.undo()
    assert os.listdir("/proc/self/fd") == before


def test_one_at_a_time(source, tmp_path, monkeypatch):
    journal = interrupted(source, tmp_path / "out.raw", monkeypatch)
    import fcntl

    with journal.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TargetError, match="another process"):
            diskmorph.convert(source, tmp_path / "out.raw", options=options())


def test_files_that_someone_else_put_there_are_not_trusted(source, tmp_path, monkeypatch):
    journal = interrupted(source, tmp_path / "out.raw", monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PolicyError, match="not a file of yours"):
        diskmorph.convert(source, tmp_path / "out.raw", options=options())
    assert journal.exists()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("-", {"target_format": "raw"}),
        ("out.ova", {}),
        ("out.raw.gz", {}),
        ("s3://bucket/out.raw", {}),
        ("out.vmdk", {"keep_chain": True}),
        ("out.raw", {"device": True}),
        ("out.raw", {"also": ("b.raw",)}),
    ],
)
def test_what_cannot_be_resumed_says_so(source, tmp_path, target, words):
    name = target if target == "-" or "://" in target else tmp_path / target
    with pytest.raises(OptionError, match="--resume"):
        diskmorph.convert(source, name, options=options(**words))
    assert not names(tmp_path)
