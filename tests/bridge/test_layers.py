"""`build --layers`: one overlay a layer, small, on a base that images with the same lower layers share."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from clikit import dm
from ocikit import folder, oci_layout, sha256
from treekit import same, tar_entry, tar_file, told

from diskmorph.convert.bridge import BuildOptions, build
from diskmorph.convert.bridge.options import Size
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import DiskmorphError, OptionError, TargetError
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import open_disk
from diskmorph.formats.roots import open_root

from testkit import data, run

MIB = 1 << 20


def image(path: Path, last: bytes) -> Path:
    base = tar_file(
        folder("opt"), tar_entry("opt/base.bin", data("base", 8 * MIB)), tar_entry("etc/os-release", b"ID=x\n")
    )
    middle = tar_file(tar_entry("opt/middle", data("middle", 300_000)), tar_entry("etc/.wh.os-release"))
    top = tar_file(tar_entry("opt/top", last), tar_entry("bin/marker", b"#!/bin/sh\n", mode=0o755))
    return oci_layout(path, [base, middle, top])


def options(*, layers: bool = True, **more: object) -> BuildOptions:
    convert = ConvertOptions(sync=False, reproducible=True, **more)  # type: ignore[arg-type]
    return BuildOptions(boot=(), size=Size(total=200 * MIB), layers=layers, convert=convert)


def test_a_chain_is_small_and_its_base_shared(tmp_path: Path) -> None:
    bases = []
    for name, last in (("one", b"1" * 1000), ("two", b"2" * 50_000)):
        source = image(tmp_path / f"{name}-oci", last)
        place = tmp_path / name
        place.mkdir()
        report = build(source, place / "top.qcow2", options=options())
        assert [Path(member).name for member in report.members] == ["top.qcow2", "top.1.qcow2", "top.0.qcow2"]
        assert {p.name for p in place.iterdir()} == {"top.qcow2", "top.1.qcow2", "top.0.qcow2"}
        chain = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", place / "top.qcow2").stdout)
        assert [one.get("backing-filename") for one in chain] == ["top.1.qcow2", "top.0.qcow2", None]
        sizes = [os.path.getsize(member) for member in report.members]
        assert sizes[2] > 8 * MIB
        assert max(sizes[:2]) < 3 * MIB
        for member in report.members:
            run("qemu-img", "check", "-q", member)
        bases.append(sha256((place / "top.0.qcow2").read_bytes()))
        build(source, place / "flat.raw", options=options(layers=False))
        disk = open_disk(place / "top.qcow2", parents=Parents(allow=(place,)))
        with open_root(disk) as layered, open_root(open_disk(place / "flat.raw")) as flat:
            same(told(flat), told(layered))
            assert layered.find("opt/top").read() == last  # type: ignore[union-attr]
            assert layered.find("etc/os-release") is None
        run("qemu-img", "convert", place / "top.qcow2", tmp_path / "flat.img")
    assert bases[0] == bases[1]


@pytest.mark.parametrize("form", ["vhd", "vmdk", "vhdx"])
def test_other_formats_with_differencing_disks(tmp_path: Path, form: str) -> None:
    source = image(tmp_path / "oci", b"x")
    (tmp_path / "w").mkdir()
    build(source, tmp_path / f"w/top.{form}", options=options())
    disk = open_disk(tmp_path / f"w/top.{form}", parents=Parents(allow=(tmp_path / "w",)))
    with open_root(disk) as tree:
        assert tree.find("opt/top").read() == b"x"  # type: ignore[union-attr]
        want = hashlib.sha256(data("base", 8 * MIB)).digest()
        assert hashlib.sha256(tree.find("opt/base.bin").read()).digest() == want  # type: ignore[union-attr]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    source = image(tmp_path / "oci", b"x")
    (tmp_path / "w").mkdir()
    with pytest.raises(OptionError):
        build(source, tmp_path / "w/top.raw", options=options())  # raw has no overlays
    (tmp_path / "w/top.0.qcow2").write_bytes(b"mine")
    with pytest.raises(TargetError, match="exists"):
        build(source, tmp_path / "w/top.qcow2", options=options())
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["top.0.qcow2"]
    (tmp_path / "plain.tar").write_bytes(tar_file(tar_entry("a")))
    with pytest.raises(OptionError, match="container image"):
        build(tmp_path / "plain.tar", tmp_path / "w/x.qcow2", options=options())
    small = BuildOptions(boot=(), size=Size(total=12 * MIB), layers=True, convert=ConvertOptions(sync=False))
    with pytest.raises(DiskmorphError, match="too small"):
        build(source, tmp_path / "w/y.qcow2", options=small)
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["top.0.qcow2"]


def test_the_command_line(tmp_path: Path) -> None:
    source = image(tmp_path / "oci", b"x")
    words = ("--layers", "--boot", "none", "--size", "min", "--no-sync", "--json")
    report = dm("build", source, tmp_path / "top.qcow2", *words).ok().json
    assert len(report["members"]) == 3
