"""Byte sources: never fewer bytes than asked for, never a special file, never another file behind the same name."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys

import pytest

from diskmorph.formats.errors import FormatError, IntegrityError, PolicyError, SourceError
from diskmorph.formats.source import BytesSource, FilePool, FileSource, WindowSource


def test_reading_beyond_the_end_names_the_offset(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 100)
    with FileSource(path) as source, pytest.raises(FormatError) as caught:
        source.read_into(90, memoryview(bytearray(20)))
    assert caught.value.offset == 100
    assert str(path) in str(caught.value)
    with FileSource(path) as source, pytest.raises(FormatError):
        source.read(90, 20)


def test_a_huge_length_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    with FileSource(path) as source, pytest.raises(FormatError):
        source.read(0, 1 << 60)


def test_read_upto_is_short_at_the_end_and_empty_behind_it():
    source = BytesSource(b"0123456789")
    assert source.read_upto(8, 10) == b"89"
    assert source.read_upto(20, 4) == b""
    assert source.read_upto(-3, 2) == b"01"


@pytest.mark.parametrize("make", ["fifo", "socket", "directory", "device"])
def test_special_files_are_refused_at_once(tmp_path, make):
    path = tmp_path / "special"
    if make == "fifo":
        os.mkfifo(path)
    elif make == "socket":
        import socket

        socket.socket(socket.AF_UNIX).bind(str(path))
    elif make == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(SourceError, match="not a disk image"):
        FileSource(path)


def test_a_missing_file_is_one_line():
    with pytest.raises(SourceError, match="no such file") as caught:
        FileSource("/nonexistent/disk.raw")
    assert "\n" not in str(caught.value)


def test_windows_end_where_they_should(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)))
    with FileSource(path) as source:
        window = source.window(10, 20)
        assert window.read(0, 20) == bytes(range(10, 30))
        assert window.pread(15, memoryview(bytearray(50))) == 5
        with pytest.raises(FormatError):
            window.read(0, 21)
        with pytest.raises(FormatError):
            WindowSource(source, 250, 7)
        with window.descriptor() as lent:
            assert lent is not None
            assert lent[1] == 10


def test_holes_are_told_apart_from_data(tmp_path):
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(512 << 10)
        file.write(b"x" * 4096)
    with FileSource(path) as source:
        runs = list(source.runs(0, source.size))
        assert runs[0][0] == 0
        assert sum(length for _, length, _ in runs) == source.size
        assert [allocated for _, _, allocated in runs] == [False, True, False]
        assert list(source.runs(100, 200)) == [(100, 100, False)]
        window = source.window(4096, 1 << 19)
        assert sum(length for _, length, _ in window.runs(0, window.size)) == window.size


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 100)
    with FileSource(path) as source:
        source.verify_unchanged()
        path.write_bytes(b"y" * 101)
        with pytest.raises(IntegrityError, match="changed"):
            source.verify_unchanged()


def test_the_pool_reopens_and_checks_identity(tmp_path):
    pool = FilePool(2)
    sources = []
    for i in range(5):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(bytes([i]) * 10)
        sources.append(FileSource(path, pool=pool))
    before = len(os.listdir("/proc/self/fd"))
    for turn in range(3):
        for i, source in enumerate(sources):
            assert source.read(0, 10) == bytes([i]) * 10, turn
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    replacement = tmp_path / "new"
    replacement.write_bytes(b"z" * 10)
    os.replace(replacement, tmp_path / "0.bin")
    sources[1].read(0, 1), sources[2].read(0, 1)
    with pytest.raises(IntegrityError, match="changed"):
        sources[0].read(0, 10)


LOCKER = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, int(sys.argv[2]), 1, 0))   # F_OFD_SETLK, as QEMU does
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("byte", "refused"), [(101, True), (103, True), (100, False)])
def test_an_image_that_qemu_writes_to_is_refused(tmp_path, byte, refused):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(path), str(byte)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        if refused:
            with pytest.raises(PolicyError, match="-U") as caught:
                FileSource(path)
            assert caught.value.option == "-U"
        else:
            FileSource(path).close()
        FileSource(path, shared=True).close()
        assert child.stdin is not None
        child.stdin.close()


def test_the_lock_structure_has_the_size_of_struct_flock():
    assert struct.calcsize("hhqqi4x") == 32
    assert fcntl.F_RDLCK == 0


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_file_that_is_lent_is_closed_by_the_last_who_gives_it_back(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789")
    pool = FilePool(2)
    source = FileSource(path, pool=pool)
    with pool.borrow(source) as fd:
        with pool.borrow(source) as same:
            assert same == fd
            source.close()
        assert os.pread(fd, 10, 0) == b"0123456789"
    assert not is_open(fd)
    with pytest.raises(SourceError, match="was closed"):
        source.read(0, 1)


def test_a_closed_file_that_is_lent_does_not_count_twice(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789")
    source = FileSource(path)
    with source.descriptor():
        source.close()
        with pytest.raises(SourceError, match="was closed"):
            source.read(0, 1)
    source.close()
