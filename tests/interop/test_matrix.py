"""Every subformat against the peers: what we write they read and find clean, what they write we read."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import diskmorph
from diskmorph.convert.options import ConvertOptions

from testkit import MIB, content, little_disk, run, write_image


@dataclass(frozen=True)
class Variant:
    name: str
    format: str
    peer: str
    options: dict[str, str] = field(default_factory=dict)
    compress: str | None = None
    peer_options: dict[str, str] = field(default_factory=dict)
    tool: str = ""
    checks: bool = True


def vmdk(subformat: str, *, checks: bool = True) -> Variant:
    return Variant(f"vmdk-{subformat}", "vmdk", "vmdk", {"subformat": subformat}, tool="vmdkinfo", checks=checks)


SIZED = {"force_size": "on"}
VARIANTS = [
    Variant("raw", "raw", "raw", checks=False),
    Variant("qcow2", "qcow2", "qcow2", {"compat": "1.1"}, tool="qcowinfo"),
    Variant("qcow2-v2", "qcow2", "qcow2", {"compat": "0.10"}, tool="qcowinfo"),
    Variant("qcow2-deflate", "qcow2", "qcow2", {}, "deflate", tool="qcowinfo"),
    Variant("qcow2-zstd", "qcow2", "qcow2", {}, "zstd", {"compression_type": "zstd"}),  # libqcow knows no zstd
    Variant("qcow2-extended", "qcow2", "qcow2", {"extended_l2": "on"}),
    Variant("qcow2-512", "qcow2", "qcow2", {"cluster_size": "512"}),
    Variant("qcow2-2M", "qcow2", "qcow2", {"cluster_size": "2M"}),
    vmdk("monolithicSparse"),
    vmdk("monolithicFlat", checks=False),
    vmdk("twoGbMaxExtentSparse"),
    vmdk("twoGbMaxExtentFlat", checks=False),
    vmdk("streamOptimized"),
    Variant("vdi", "vdi", "vdi"),
    Variant("vdi-static", "vdi", "vdi", {"static": "on"}),
    Variant("vhd", "vhd", "vpc", {"subformat": "dynamic"}, None, SIZED, tool="vhdiinfo", checks=False),
    Variant("vhd-fixed", "vhd", "vpc", {"subformat": "fixed"}, None, SIZED, tool="vhdiinfo", checks=False),
    Variant("vhdx", "vhdx", "vhdx", {"subformat": "dynamic"}, tool="vhdiinfo"),
    Variant("vhdx-fixed", "vhdx", "vhdx", {"subformat": "fixed"}, tool="vhdiinfo"),
]
IDS = [v.name for v in VARIANTS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "disk.raw"
    write_image("raw", little_disk(), path)
    return path


def ours(v: Variant) -> ConvertOptions:
    return ConvertOptions(target_format=v.format, format_options=v.options, compress=v.compress)


def theirs(v: Variant, source: Path, target: Path) -> None:
    words = {**v.options, **v.peer_options}
    flags = ["-o", ",".join(f"{k}={w}" for k, w in words.items())] if words else []
    run("qemu-img", "convert", "-f", "raw", "-O", v.peer, *flags, *(["-c"] if v.compress else []), source, target)


def peer_same(v: Variant, source: Path, image: Path) -> None:
    run("qemu-img", "compare", "-f", "raw", "-F", v.peer, source, image)
    if v.checks:
        run("qemu-img", "check", "-f", v.peer, image)


@pytest.mark.parametrize("v", VARIANTS, ids=IDS)
def test_written(v: Variant, source: Path, tmp_path: Path) -> None:
    image = tmp_path / f"disk.{v.format}"
    report = diskmorph.convert(source, image, options=ours(v))
    assert report.bytes.total() == report.virtual_size == source.stat().st_size
    assert report.stored_size == sum((tmp_path / name).stat().st_size for name in report.members)
    peer_same(v, source, image)
    if v.tool:
        run(v.tool, image)
    assert diskmorph.check(image).clean


@pytest.mark.parametrize("v", VARIANTS, ids=IDS)
def test_read(v: Variant, source: Path, tmp_path: Path) -> None:
    image = tmp_path / f"disk.{v.format}"
    theirs(v, source, image)
    with diskmorph.open_disk(image) as disk:
        assert content(disk) == source.read_bytes()


PAIRS = [(a, b) for a in VARIANTS for b in VARIANTS if a != b and "raw" not in {a.name, b.name}]


@pytest.mark.parametrize(("a", "b"), random.Random(3).sample(PAIRS, 30), ids=lambda v: v.name)
def test_pairs(a: Variant, b: Variant, source: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first, second = tmp_path / "a" / f"a.{a.format}", tmp_path / f"b.{b.format}"
    theirs(a, source, first)
    diskmorph.convert(first, second, options=ours(b))
    peer_same(b, source, second)


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda v: v.name)
def test_all_pairs(a: Variant, b: Variant, source: Path, tmp_path: Path) -> None:
    test_pairs(a, b, source, tmp_path)


@pytest.mark.parametrize("v", [v for v in VARIANTS if v.format == "vmdk" and "Sparse" in v.name], ids=lambda v: v.name)
def test_sevenzip(v: Variant, source: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.vmdk"
    diskmorph.convert(source, image, options=ours(v))
    run("7z", "t", image)


READ_BY_SEVENZIP = [
    v
    for v in VARIANTS
    if v.format in {"vdi", "vhd", "vhdx", "qcow2"} and v.name not in {"qcow2-zstd", "qcow2-extended"}
]


@pytest.mark.parametrize("v", READ_BY_SEVENZIP, ids=lambda v: v.name)
def test_sevenzip_content(v: Variant, tmp_path: Path) -> None:
    disk = little_disk(8 * MIB)  # 7-Zip refuses any VHDX, also qemu-img's, whose size is not whole MiB
    image = tmp_path / f"disk.{v.format}"
    diskmorph.convert(disk, image, options=ours(v))
    run("7z", "x", f"-o{tmp_path / 'out'}", image)
    (found,) = list((tmp_path / "out").iterdir())
    assert found.read_bytes() == content(disk)
