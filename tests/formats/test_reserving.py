"""Room is reserved before it is written, where that is faster, and never more than is written."""

from __future__ import annotations

import errno
import os

import pytest

from diskmorph.formats import output
from diskmorph.formats.output import FileTarget
from diskmorph.formats.reserving import LEAST, gains, kind_of

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard
28 27 254:16 / /srv/with\\040space rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("device", "kind"), [((254, 0), "ext4"), ((254, 16), "xfs"), ((0, 21), "proc"), ((9, 9), None)]
)
def test_the_kind_of_a_file_system_is_read_from_the_mounts(tmp_path, device, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert kind_of(os.makedev(*device), str(mounts)) == kind


def test_nothing_is_gained_where_nothing_is_known():
    reading, writing = os.pipe()
    try:
        assert not gains(reading)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.fixture
def reserved(monkeypatch):
    """Make every file system one that gains; return what is reserved."""
    calls: list[tuple[int, int]] = []
    real = os.posix_fallocate

    def reserve(fd: int, offset: int, length: int) -> None:
        calls.append((offset, length))
        real(fd, offset, length)

    monkeypatch.setattr(output, "gains", lambda fd: True)
    monkeypatch.setattr(os, "posix_fallocate", reserve)
    return calls


def test_only_what_is_written_is_reserved(tmp_path, reserved):
    with FileTarget(tmp_path, ["a"]) as target:
        target.members[0].write(0, b"x" * 4096)
        target.members[0].write(64 << 20, b"y" * LEAST)
        target.commit([128 << 20])
    assert reserved == [(64 << 20, LEAST)]
    status = (tmp_path / "a").stat()
    assert status.st_size == 128 << 20
    assert status.st_blocks * 512 <= LEAST + (64 << 10)


@pytest.mark.parametrize("problem", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC])
def test_a_refused_reservation_is_no_failure(tmp_path, monkeypatch, problem):
    asked = []

    def refuse(fd: int, offset: int, length: int) -> None:
        asked.append(offset)
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(output, "gains", lambda fd: True)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with FileTarget(tmp_path, ["a"]) as target:
        target.members[0].write(0, b"x" * LEAST)
        target.members[0].write(LEAST, b"y" * LEAST)
        target.commit([2 * LEAST])
    assert asked == [0], "what was refused once is not asked for again"
    assert (tmp_path / "a").read_bytes() == b"x" * LEAST + b"y" * LEAST
