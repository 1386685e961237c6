"""Images that QEMU has open are neither replaced nor changed."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

import diskmorph
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import PolicyError
from diskmorph.formats.views import Memory

from testkit import data, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["write", "read"])
def busy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An image that qemu-io has open, for writing or for reading."""
    image = tmp_path / "busy.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    words = ["-r"] if request.param == "read" else []
    with subprocess.Popen(
        ["qemu-io", *words, "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"read 0 512\n")
        user.stdin.flush()
        user.stdout.readline()
        yield image
        user.stdin.close()
        user.stdout.read()


def test_an_image_in_use_is_not_replaced(busy: Path) -> None:
    before = busy.stat().st_ino
    with pytest.raises(PolicyError, match="in use"):
        diskmorph.convert(Memory(data(1, 4096)), busy, options=ConvertOptions(force=True))
    with pytest.raises(PolicyError, match="in use"):
        diskmorph.create(busy, 4096, options=ConvertOptions(force=True))
    assert busy.stat().st_ino == before


def test_an_image_that_nobody_uses_is_replaced(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "1M")
    diskmorph.convert(Memory(data(1, 4096)), tmp_path / "a.qcow2", options=ConvertOptions(force=True))
