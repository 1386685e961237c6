"""Overlays on a base, empty images, other sizes: what shows through, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

import diskmorph
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import (
    OptionError,
    TargetError,
    UnsupportedError,
)
from diskmorph.formats.extents import ZERO
from diskmorph.formats.registry import open_disk
from diskmorph.formats.views import Memory

from testkit import GIB, KIB, MIB, content, data, pattern_disk, reads_as, run


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi", "vhd", "vhdx"])
def test_overlay(format: str, tmp_path: Path) -> None:
    size = 40 * MIB
    base = bytearray(data("base", size))
    base[30 * MIB : 32 * MIB] = bytes(2 * MIB)
    now = bytearray(base)
    now[3 * MIB + 5 : 3 * MIB + 70005] = data("new", 70000)
    now[20 * MIB : 20 * MIB + 256 * KIB] = bytes(256 * KIB)
    now[-1] ^= 1
    diskmorph.convert(Memory(base), tmp_path / f"base.{format}")
    (tmp_path / "now.raw").write_bytes(now)
    (tmp_path / "sub").mkdir()
    over = tmp_path / "sub" / f"over.{format}"
    report = diskmorph.convert(
        tmp_path / "now.raw", over, options=ConvertOptions(base=tmp_path / f"base.{format}", verify=True)
    )
    assert report.verified
    limit = {"vhdx": 30, "vdi": 5, "vhd": 9}.get(format, 2) * MIB
    assert over.stat().st_blocks * 512 < limit
    parents = diskmorph.Parents(allow=(tmp_path,), backing=tmp_path / "base.vdi" if format == "vdi" else None)
    reads_as(over, bytes(now), parents=parents)
    if format in {"qcow2", "vmdk"}:
        run("qemu-img", "compare", "-f", "raw", "-F", format, tmp_path / "now.raw", over)


def test_overlay_compressed_and_over_a_longer_and_a_shorter_base(tmp_path: Path) -> None:
    diskmorph.convert(Memory(b"base" * MIB), tmp_path / "base.qcow2")
    for size in (3 * MIB, 4 * MIB, 6 * MIB):
        now = bytearray((b"base" * 2 * MIB)[:size])
        now[MIB : MIB + 5000] = bytes(5000)
        over = tmp_path / f"{size}.qcow2"
        diskmorph.convert(
            Memory(now), over, options=ConvertOptions(base=tmp_path / "base.qcow2", compress="deflate", verify=True)
        )
        reads_as(over, bytes(now), parents=tmp_path)


@pytest.mark.parametrize("compress", ["deflate", "zstd"])
def test_zeroes_among_compressed_clusters_stay_where_they_are(compress: str, tmp_path: Path) -> None:
    """Zero clusters with data between them: over a base, in a map, and with subclusters, each at its own place."""
    cluster = 65536
    base = Memory(data(1, 8 * cluster))
    over = bytearray(data(1, 8 * cluster))
    over[:cluster], over[2 * cluster : 3 * cluster] = bytes(cluster), bytes(cluster)
    over[cluster : 2 * cluster] = data(2, cluster)
    diskmorph.convert(base, tmp_path / "base.qcow2")
    options = ConvertOptions(base=tmp_path / "base.qcow2", compress=compress)
    diskmorph.convert(Memory(over), tmp_path / "over.qcow2", options=options)
    with diskmorph.open_disk(tmp_path / "over.qcow2", parents=tmp_path) as disk:
        assert content(disk) == over
    for words in ({}, {"extended_l2": "on"}):
        target = tmp_path / f"whole{len(words)}.qcow2"
        diskmorph.convert(Memory(over), target, options=ConvertOptions(compress=compress, format_options=words))
        with diskmorph.open_disk(target) as disk:
            kinds = [(int(e["start"]) // cluster, int(e["kind"])) for rows in disk.extents() for e in rows]
            assert content(disk) == over
        assert [start for start, kind in kinds if kind == ZERO] == [0, 2]
        run("qemu-img", "check", "-q", target)


def test_overlay_of_a_chain_reads_little(tmp_path: Path) -> None:
    diskmorph.convert(Memory(data(1, 32 * MIB)), tmp_path / "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 5M 64k", tmp_path / "top.qcow2")
    report = diskmorph.convert(
        tmp_path / "top.qcow2",
        tmp_path / "new.qcow2",
        options=ConvertOptions(base=tmp_path / "base.qcow2", parents=diskmorph.Parents.of(tmp_path)),
    )
    assert report.bytes.copied == 64 * KIB


def test_create(tmp_path: Path) -> None:
    report = diskmorph.create(tmp_path / "a.qcow2", 3 * GIB)
    assert report.virtual_size == 3 * GIB
    diskmorph.create(tmp_path / "b.qcow2", options=ConvertOptions(base=tmp_path / "a.qcow2"))
    with open_disk(tmp_path / "b.qcow2", parents=tmp_path) as disk:
        assert disk.size == 3 * GIB
    with pytest.raises(OptionError, match="size"):
        diskmorph.create(tmp_path / "c.qcow2")
    with pytest.raises(TargetError, match="exists"):
        diskmorph.create(tmp_path / "a.qcow2", MIB)


def test_create_over_data_shows_the_base(tmp_path: Path) -> None:
    diskmorph.convert(Memory(b"base" * MIB), tmp_path / "a.qcow2")
    diskmorph.create(tmp_path / "b.qcow2", options=ConvertOptions(base=tmp_path / "a.qcow2"))
    reads_as(tmp_path / "b.qcow2", b"base" * MIB, parents=tmp_path)


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx"])
def test_resize(format: str, tmp_path: Path) -> None:
    disk = pattern_disk(8 * MIB, [(0, 5 * MIB, b"abc")])
    image = tmp_path / f"a.{format}"
    diskmorph.convert(disk, image)
    diskmorph.resize(image, 20 * MIB)
    reads_as(image, content(disk) + bytes(12 * MIB))
    diskmorph.resize(image, 6 * MIB)
    reads_as(image, content(disk)[: 6 * MIB])
    with pytest.raises(TargetError, match="--shrink"):
        diskmorph.resize(image, 3 * MIB)
    diskmorph.resize(image, 3 * MIB, shrink=True, output=tmp_path / f"b.{format}")
    reads_as(tmp_path / f"b.{format}", content(disk)[: 3 * MIB])
    reads_as(image, content(disk)[: 6 * MIB])
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a.{format}", f"b.{format}"]


def test_resize_keeps_snapshots_by_refusing(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "4M")
    run("qemu-img", "snapshot", "-c", "monday", tmp_path / "a.qcow2")
    with pytest.raises(UnsupportedError, match="snapshots"):
        diskmorph.resize(tmp_path / "a.qcow2", 2 * MIB)
