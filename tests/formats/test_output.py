"""Targets appear whole or not at all."""

from __future__ import annotations

import io
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from diskmorph.formats.errors import IntegrityError, TargetError
from diskmorph.formats.output import FileMember, FileTarget, StreamTarget
from diskmorph.formats.output_in_place import DeviceTarget


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_nothing_shows_before_commit_and_all_after(tmp_path):
    with FileTarget(tmp_path, ["a.vmdk", "a-flat.vmdk"]) as target:
        target.members[0].write(0, b"descriptor")
        target.members[1].write(4096, b"data")
        assert not {n for n in names(tmp_path) if not n.startswith(".")}
        target.commit([10, 8192])
    assert names(tmp_path) == {"a.vmdk", "a-flat.vmdk"}
    assert (tmp_path / "a.vmdk").read_bytes() == b"descriptor"
    assert (tmp_path / "a-flat.vmdk").stat().st_size == 8192


def test_leaving_without_commit_leaves_nothing(tmp_path):
    with FileTarget(tmp_path, ["a", "b"]) as target:
        target.members[0].write(0, b"x")
    assert not names(tmp_path)


def test_an_existing_target_needs_force_and_keeps_mode(tmp_path):
    old = tmp_path / "a"
    old.write_bytes(b"old")
    old.chmod(0o640)
    with pytest.raises(TargetError, match="--force"):
        FileTarget(tmp_path, ["a"])
    assert old.read_bytes() == b"old"
    with FileTarget(tmp_path, ["a"], force=True) as target:
        target.members[0].write(0, b"new")
        assert old.read_bytes() == b"old"
        target.commit([3])
    assert old.read_bytes() == b"new"
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert names(tmp_path) == {"a"}


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with FileTarget(tmp_path, ["a", "b"]) as target:
        (tmp_path / "a").write_bytes(b"theirs")
        with pytest.raises(TargetError, match="exists already"):
            target.commit([0, 0])
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert names(tmp_path) == {"a"}


def test_a_link_as_target_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "a").symlink_to("precious")
    with FileTarget(tmp_path, ["a"], force=True) as target:
        target.members[0].write(0, b"new")
        target.commit([3])
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "a").is_symlink()


def test_special_files_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(TargetError, match="not a regular file"):
        FileTarget(tmp_path, ["a"], force=True)


def test_without_unnamed_files_a_temporary_name_is_used_and_removed(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *args, **kw):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *args, **kw)

    monkeypatch.setattr(os, "open", refuse)
    with FileTarget(tmp_path, ["a"]) as target:
        assert len(names(tmp_path)) == 1
        target.members[0].write(0, b"x")
    assert not names(tmp_path)
    for force in (False, True):
        with FileTarget(tmp_path, ["a"], force=force) as target:
            target.members[0].write(0, b"x")
            target.commit([1])
        assert names(tmp_path) == {"a"}


def test_a_failure_in_the_middle_of_naming_restores_all_old_files(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"old " + name.encode())
    real = FileMember.publish

    def fail_on_b(self, *, replace):
        if self.path.name == "b":
            raise TargetError("cannot be named", file=self.name)
        real(self, replace=replace)

    monkeypatch.setattr(FileMember, "publish", fail_on_b)
    with pytest.raises(TargetError), FileTarget(tmp_path, ["a", "b", "c"], force=True) as target:
        target.commit([0, 0, 0])
    assert {n: (tmp_path / n).read_bytes() for n in names(tmp_path)} == {"a": b"old a", "b": b"old b", "c": b"old c"}


@pytest.mark.parametrize("fail", ["fsync", "rename", "ftruncate", "pwrite"])
def test_a_failure_keeps_the_old_files(tmp_path, monkeypatch, fail):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"old " + name.encode())
    with pytest.raises(TargetError), FileTarget(tmp_path, ["a", "b"], force=True) as target:
        monkeypatch.setattr(os, fail, lambda *_a, **_k: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        target.members[0].write(0, b"new")
        target.commit([3, 3])
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"old a"
    assert names(tmp_path) == {"a", "b"}


def test_the_old_descriptor_never_meets_new_members(tmp_path, monkeypatch):
    (tmp_path / "a.vmdk").write_bytes(b"old descriptor")
    (tmp_path / "a-flat.vmdk").write_bytes(b"old data")
    seen = []
    real = FileMember.publish

    def watch(self, *, replace):
        seen.append((self.path.name, (tmp_path / "a.vmdk").exists()))
        real(self, replace=replace)

    monkeypatch.setattr(FileMember, "publish", watch)
    with FileTarget(tmp_path, ["a.vmdk", "a-flat.vmdk"], force=True) as target:
        target.commit([0, 0])
    assert seen == [("a-flat.vmdk", False), ("a.vmdk", False)]
    assert names(tmp_path) == {"a.vmdk", "a-flat.vmdk"}


def test_a_stream_is_written_forwards_with_gaps_as_zeroes(tmp_path):
    path = tmp_path / "out"
    with path.open("wb") as file, StreamTarget(file) as target:
        target.members[0].write(4, b"ab")
        with pytest.raises(IntegrityError):
            target.members[0].write(2, b"x")
        target.commit([10])
    assert path.read_bytes() == b"\0\0\0\0ab\0\0\0\0"


class Short(io.RawIOBase):
    """A raw stream that takes three bytes at a time."""

    def __init__(self) -> None:
        self.taken = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.taken += bytes(data)[:3]
        return min(3, len(data))


def test_a_stream_that_takes_less_than_it_is_given_gets_the_rest():
    stream = Short()
    with StreamTarget(stream) as target:
        target.members[0].write(4, b"abcdefgh")
        target.commit([16])
    assert bytes(stream.taken) == b"\0\0\0\0abcdefgh\0\0\0\0"


@pytest.mark.parametrize("answer", [None, 0])
def test_a_stream_that_takes_nothing_fails(answer):
    class Full(Short):
        def write(self, data):
            return answer

    with pytest.raises(TargetError), StreamTarget(Full()) as target:
        target.members[0].write(0, b"abc")


@pytest.mark.parametrize("buffering", [0, 1 << 13])
def test_a_pipe_that_does_not_block_gets_all(buffering):
    """A reader that sleeps first: the pipe is full long before it begins."""
    content = os.urandom(1 << 20)
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    got = bytearray()

    def drain():
        time.sleep(0.1)
        while data := os.read(source, 1 << 16):
            got.extend(data)

    thread = threading.Thread(target=drain)
    thread.start()
    with open(sink, "wb", buffering=buffering) as file, StreamTarget(file) as target:
        target.members[0].write(0, content)
        target.commit([len(content)])
    thread.join()
    os.close(source)
    assert bytes(got) == content


class Keeping:
    """A keeper that wants what is unfinished."""

    suffix = "resume"
    fresh = True

    def kept(self):
        return True


def failing(*_words, **_more):
    raise OSError(5, "Input/output error")


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def test_a_device_that_is_refused_is_closed(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(4096))
    before = descriptors()
    with pytest.raises(TargetError, match="not a block device"):
        DeviceTarget(tmp_path / "a", 0)
    monkeypatch.setattr(stat, "S_ISBLK", lambda _: True)
    with pytest.raises(TargetError, match="too small"):
        DeviceTarget(tmp_path / "a", 8192)
    monkeypatch.setattr(os, "lseek", failing)
    with pytest.raises(TargetError, match="Input/output error"):
        DeviceTarget(tmp_path / "a", 0)
    assert descriptors() == before


@pytest.mark.parametrize("call", ["fstat", "ftruncate"])
def test_an_unfinished_file_that_fails_is_closed(tmp_path, monkeypatch, call):
    before = descriptors()
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(TargetError, match="Input/output error"):
        FileTarget(tmp_path, ["a"], keeper=Keeping())
    monkeypatch.undo()
    assert descriptors() == before


def test_a_mode_that_cannot_be_kept_fails(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    with FileTarget(tmp_path, ["a"], force=True) as target:
        monkeypatch.setattr(os, "fchmod", failing)
        with pytest.raises(TargetError, match="mode of the old file"):
            target.commit([0])
    assert (tmp_path / "a").read_bytes() == b"old"
