"""`info` of packages, kernels and ramdisks, as objects and as text."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from ovfkit import entry, envelope, hardware, ova, system

from diskmorph.cli import main
from diskmorph.convert.describe import describe
from diskmorph.formats.errors import IntegrityError

from testkit import MIB, data, little_disk, write_image

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))

from test_ami_kernel import BANNER, arm64, bzimage
from test_ami_ramdisk import BODY, FIRST


def told(capsys, *words: object) -> dict:
    assert main(["info", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys, *words: object) -> str:
    assert main(["info", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_package(tmp_path, capsys):
    (disk,) = write_image("vdi", little_disk(2 * MIB), tmp_path / "d.vdi")
    text = envelope(
        '<File ovf:id="f1" ovf:href="d.vdi"/>', f'<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="{2 * MIB}"/>'
    )
    path = ova(tmp_path / "x.ova", ("x.ovf", text), ("d.vdi", disk.read_bytes()))
    said = told(capsys, path)
    assert (said["format"], said["virtual_size"], said["manifest"]) == ("ova", 2 * MIB, True)
    (machine,) = said["machines"]
    assert (machine["name"], machine["cpus"], machine["memory"], machine["firmware"]) == ("box", 2, 512 * MIB, "bios")
    assert [(d["file"], d["virtual_size"], d["number"]) for d in machine["disks"]] == [("d.vdi", 2 * MIB, 1)]
    text = shown(capsys, path)
    assert "box" in text
    assert "d.vdi" in text
    assert "verified" in text


def test_a_size_that_only_the_disk_knows(tmp_path, capsys):
    (disk,) = write_image("vdi", little_disk(2 * MIB), tmp_path / "d.vdi")
    text = envelope(
        '<File ovf:id="f1" ovf:href="d.vdi"/>', '<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="${x}"/>'
    )
    path = ova(tmp_path / "x.ova", ("x.ovf", text), ("d.vdi", disk.read_bytes()))
    assert told(capsys, path)["machines"][0]["disks"][0]["virtual_size"] == 2 * MIB
    path = ova(tmp_path / "y.ova", ("x.ovf", text), ("d.vdi", b"damaged"))
    said = told(capsys, path)
    assert said["machines"][0]["disks"][0]["virtual_size"] is None
    assert "size of disk 1" in said["warnings"][0]


def test_many_machines(tmp_path, capsys):
    many = "".join(system(f"vm{i}", hardware(0, cpus=i % 4 + 1, memory=256 + i)) for i in range(22))
    body = f'<VirtualSystemCollection ovf:id="all"><Info>i</Info>{many}</VirtualSystemCollection>'
    path = tmp_path / "many.ovf"
    path.write_bytes(envelope("", "", body))
    said = told(capsys, path)["machines"]
    assert [(m["name"], m["cpus"], m["memory"]) for m in said] == [
        (f"vm{i}", i % 4 + 1, (256 + i) * MIB) for i in range(22)
    ]


def test_a_false_digest_is_refused(tmp_path, capsys):
    path = tmp_path / "x.ova"
    text = envelope("", "", system("m", ""))
    path.write_bytes(entry("x.ovf", text) + entry("x.mf", b"SHA1(x.ovf)= " + b"0" * 40) + bytes(1024))
    assert main(["info", str(path)]) == 1
    assert "x.ovf is not what the manifest says" in capsys.readouterr().err
    with pytest.raises(IntegrityError):
        describe(path)


def test_a_kernel(tmp_path, capsys):
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage())
    said = told(capsys, path)
    assert (said["format"], said["kernel"]["architecture"]) == ("aki", "x86_64")
    assert said["kernel"]["header"]["version"] == 0x20F
    assert BANNER in shown(capsys, path)
    assert "kernel_alignment" in shown(capsys, "-v", path)
    path.write_bytes(gzip.compress(arm64()))
    assert told(capsys, path)["kernel"]["compression"] == "gzip"


def test_a_ramdisk(tmp_path, capsys):
    path = tmp_path / "initrd.img"
    start = len(FIRST) + -len(FIRST) % 512
    path.write_bytes(FIRST.ljust(start, b"\0") + gzip.compress(BODY))
    said = told(capsys, path)
    assert said["format"] == "ari"
    assert [(s["offset"], s["compression"]) for s in said["segments"]] == [(0, "none"), (start, "gzip")]
    assert said["modules"] == ["ext4", "nvme", "virtio"]
    assert "6.1.0-18-amd64" in shown(capsys, path)
    assert "virtio" in shown(capsys, "-v", path)
    path.write_bytes(gzip.compress(BODY)[:-30])
    assert main(["info", str(path)]) == 1


def test_disks_are_told_of_as_before(tmp_path):
    path = tmp_path / "d.raw"
    path.write_bytes(data("x", 4096))
    assert describe(path) is None
    path.write_bytes(bzimage())
    assert describe(path, format="raw") is None
