"""The N-th call of every kind of input and output fails, for every N: an error, and the old target or none."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import diskmorph
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import DiskmorphError

from testkit import MIB, content, little_disk, write_image

TARGETS = [
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
CALLS = ["preadv", "pwrite", "fsync", "ftruncate", "link", "rename", "open"]
OLD = b"the old target"


@contextmanager
def failing(name: str, nth: int, error: int = errno.EIO) -> Iterator[list[int]]:
    """The nth call (from 0) of os.NAME raises; yields a counter of the calls."""
    real: Callable[..., Any] = getattr(os, name)
    count = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == nth + 1:
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, call)
        yield count


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "in.qcow2"
    write_image("qcow2", little_disk(5 * MIB + 512), path)
    return path


def attempt(source: Path, folder: Path, format: str, options: dict[str, str], compress: str | None) -> Path:
    target = folder / f"out.{format}"
    diskmorph.convert(
        source,
        target,
        options=ConvertOptions(format_options=options, compress=compress, force=True, threads=1),
    )
    return target


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("format", "options", "compress"), TARGETS, ids=IDS)
def test_nth_call_fails(
    call: str, format: str, options: dict[str, str], compress: str | None, source: Path, tmp_path: Path
) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    want = content(little_disk(5 * MIB + 512))
    with failing(call, -1) as count:
        attempt(source, reference, format, options, compress)
    total = count[0]
    for old in (None, OLD):
        for nth in places(total):
            folder = tmp_path / f"{nth}-{old is None}"
            folder.mkdir()
            target = folder / f"out.{format}"
            if old is not None:
                target.write_bytes(old)
            with failing(call, nth):
                try:
                    attempt(source, folder, format, options, compress)
                except DiskmorphError as error:
                    assert "\n" not in str(error)
                    assert_nothing_happened(folder, target, old, want, call)
                except OSError as error:  # pragma: no cover - the message names the leak
                    raise AssertionError(f"{call} {nth}: a bare OSError: {error}") from error
                else:
                    assert call in {"open", "fsync", "link", "rename", "ftruncate"}, "an error was swallowed"
                    assert_complete(target, want)


def places(total: int) -> list[int]:
    """Every place where there are few, else the first and the last ones and some between."""
    if total <= 24:
        return list(range(total))
    return [*range(8), *range(8, total - 8, max((total - 16) // 8, 1)), *range(total - 8, total)]


def assert_nothing_happened(folder: Path, target: Path, old: bytes | None, want: bytes, call: str) -> None:
    left = sorted(p.name for p in folder.iterdir())
    if call == "fsync" and target.exists() and target.read_bytes() != old:
        assert_complete(target, want)  # only the directory's sync failed: the target is complete, the error says so
        return
    if old is None:
        assert not left, left
    else:
        assert left == [target.name]
        assert target.read_bytes() == old


def assert_complete(target: Path, want: bytes) -> None:
    with diskmorph.open_disk(target) as disk:
        got = content(disk)
    assert got[: len(want)] == want
    assert not any(p.name.startswith(".") for p in target.parent.iterdir())


@pytest.mark.parametrize("nth", [0, 1, 3])
def test_no_room_is_named(nth: int, source: Path, tmp_path: Path) -> None:
    with failing("pwrite", nth, errno.ENOSPC), pytest.raises(diskmorph.errors.TargetError, match="No space left"):
        attempt(source, tmp_path, "vdi", {}, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_several_workers(call: str, source: Path, tmp_path: Path) -> None:
    for nth in range(0, 12, 3):
        with failing(call, nth), pytest.raises(DiskmorphError):
            diskmorph.convert(source, tmp_path / "out.qcow2", options=ConvertOptions(threads=3))
        assert not list(tmp_path.iterdir())
