"""Clones, on a file system that is told to have reflinks: what is cloned lies as the kernel demands, the rest is copied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import diskmorph
from diskmorph.convert import clone, moves
from diskmorph.convert.options import ConvertOptions

from testkit import KIB, MIB, content, data, pattern_disk, write_image

SIZE = 24 * MIB + 1536
FORMATS = [
    ("raw", {}),
    ("qcow2", {}),
    ("qcow2", {"cluster_size": "2M"}),
    ("qcow2", {"extended_l2": "on"}),
    ("vmdk", {}),
    ("vmdk", {"subformat": "twoGbMaxExtentFlat"}),
    ("vdi", {}),
    ("vhd", {}),
    ("vhd", {"subformat": "fixed"}),
    ("vhdx", {}),
    ("vhdx", {"subformat": "fixed"}),
]
IDS = [" ".join([f, *o.values()]) for f, o in FORMATS]


def emulated(source: int, offset: int, target: int, at: int, length: int) -> None:
    """What FICLONERANGE does on XFS, with its demands."""
    assert not offset % 4096
    assert not at % 4096
    assert not length % 4096
    assert length
    piece = os.pread(source, length, offset)
    assert len(piece) == length, "beyond the source's end"
    os.pwrite(target, piece, at)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    disk = pattern_disk(
        SIZE,
        [
            (0, 300 * KIB, data(1, 300 * KIB)),
            (MIB, 5000, data(2, 5000)),
            (2 * MIB, 7 * MIB + 4096, data(3, 7 * MIB + 4096)),
            (10 * MIB + 8192, 256 * KIB, data(4, 256 * KIB)),
            (12 * MIB, 9 * MIB, data(5, 9 * MIB)),
            (SIZE - 400 * KIB - 512, 400 * KIB + 512, data(6, 400 * KIB + 512)),
        ],
    )
    write_image("raw", disk, tmp_path / "in.raw")
    return tmp_path / "in.raw"


@pytest.mark.parametrize(("format", "options"), FORMATS, ids=IDS)
@pytest.mark.parametrize("works", [True, False])
def test_clones(
    format: str, options: dict[str, str], works: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(22, "refused")

    monkeypatch.setattr(clone, "can_clone", lambda *_: True)
    monkeypatch.setattr(moves, "clone_range", emulated if works else refuse)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / f"disk.{format}"
    report = diskmorph.convert(source, target, options=ConvertOptions(format_options=options))
    assert (report.bytes.cloned > 10 * MIB) == works
    assert report.bytes.total() == report.virtual_size
    with diskmorph.open_disk(target) as disk:
        got = content(disk)
    assert got[:SIZE] == source.read_bytes()


def test_compressed_and_rated_targets_are_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clone, "can_clone", lambda *_: True)
    for options in (ConvertOptions(compress="deflate"), ConvertOptions(zero_unit=0), ConvertOptions(reproducible=True)):
        assert not diskmorph.convert(source, tmp_path / f"{id(options)}.qcow2", options=options).bytes.cloned


def test_a_file_system_without_reflinks_says_so(source: Path) -> None:
    with source.open("rb") as file:
        assert not clone.can_clone(file.fileno(), 0, Path("/dev/shm"))
