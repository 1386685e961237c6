"""Dirty bitmaps from qcow2 to qcow2, judged by qemu-img and by reading them through qemu-nbd."""

import json
import struct

import pytest
from nbdservers import nbd_server

import diskmorph
from diskmorph.convert.chains import keep_chain
from diskmorph.formats.errors import FormatError
from diskmorph.formats.qcow2 import bitmaps as b

from testkit import run

SIZE = 96 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, str(SIZE))
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "fine")
    run("qemu-img", "bitmap", "--add", "-g", "65536", path, "coarse")
    run("qemu-img", "bitmap", "--add", "--disable", path, "off")
    run("qemu-io", "-c", "write -P 7 1M 20M", "-c", "write -P 9 50M 512", "-c", "write -P 1 95M 1M", path)
    return path


def described(path):
    info = json.loads(run("qemu-img", "info", "--output=json", path).stdout)
    return info["format-specific"]["data"].get("bitmaps", [])


def dirty(path, name, sock):
    """Return the dirty extents of a bitmap as qemu-nbd tells of them."""
    with nbd_server(sock, "qemu-nbd", "-r", "-t", "-B", name, "-k", sock, "-f", "qcow2", path) as url:
        words = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", url]
        return [(e["offset"], e["length"], e["type"]) for e in json.loads(run(*words).stdout)]


@pytest.mark.parametrize("words", [{}, {"cluster_size": "512"}, {"cluster_size": "2M"}, {"extended_l2": "on"}])
def test_they_are_kept(image, tmp_path, words):
    target = tmp_path / "out.qcow2"
    report = diskmorph.convert(image, target, options=diskmorph.ConvertOptions(format_options=words))
    assert not report.lost
    assert report.stored_size == target.stat().st_size
    assert described(target) == described(image)
    assert {entry["name"] for entry in described(target)} == {"fine", "coarse", "off"}
    run("qemu-img", "check", target)
    assert diskmorph.check(target).clean
    for name in ("fine", "coarse", "off"):
        assert dirty(target, name, tmp_path / "one") == dirty(image, name, tmp_path / "two")
    assert any(kind for _, _, kind in dirty(target, "fine", tmp_path / "three"))
    measured = diskmorph.measure(image, "qcow2", options=diskmorph.ConvertOptions(format_options=words))
    assert measured.required == report.stored_size
    run("qemu-img", "bitmap", "--clear", target, "fine")  # qemu can go on with it
    run("qemu-img", "check", target)


def test_compressed_and_backed_images_keep_them(image, tmp_path):
    over = tmp_path / "over.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", over)
    run("qemu-img", "bitmap", "--add", over, "mine")
    run("qemu-io", "-c", "write 3M 64k", over)
    words = diskmorph.ConvertOptions(compress="deflate", parents=diskmorph.Parents(allow=(tmp_path,)))
    diskmorph.convert(over, tmp_path / "out.qcow2", options=words)
    assert [entry["name"] for entry in described(tmp_path / "out.qcow2")] == ["mine"]
    assert dirty(tmp_path / "out.qcow2", "mine", tmp_path / "one") == dirty(over, "mine", tmp_path / "two")
    run("qemu-img", "check", tmp_path / "out.qcow2")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.vmdk", {}),
        ("out.qcow2", {"size": 2 * SIZE}),
        ("out.qcow2", {"format_options": {"compat": "0.10"}}),
    ],
)
def test_elsewhere_they_are_named_as_lost(image, tmp_path, name, words):
    report = diskmorph.convert(image, tmp_path / name, options=diskmorph.ConvertOptions(**words))
    assert any("fine" in loss and "coarse" in loss for loss in report.lost)


def directory(path):
    """Return where the bitmap directory lies."""
    raw = path.read_bytes()
    at = 104 if struct.unpack_from(">I", raw, 100)[0] == 104 else 112
    while True:
        kind, length = struct.unpack_from(">II", raw, at)
        if kind == 0x23852875:
            return struct.unpack_from(">IIQQ", raw, at + 8)[3]
        assert kind
        at += 8 + -(-length // 8) * 8


def test_a_bitmap_in_use_is_not_believed(image, tmp_path):
    at = directory(image)
    with image.open("r+b") as file:
        file.seek(at + 12)
        flags = struct.unpack(">I", file.read(4))[0]
        file.seek(at + 12)
        file.write(struct.pack(">I", flags | b.IN_USE))
    report = diskmorph.convert(image, tmp_path / "out.qcow2")
    assert len(report.lost) == 1
    assert len(described(tmp_path / "out.qcow2")) == 2


def test_a_table_that_lies_elsewhere_is_refused(image, tmp_path):
    with image.open("r+b") as file:
        file.seek(directory(image))
        file.write(struct.pack(">Q", 1 << 40))
    with pytest.raises(FormatError):
        diskmorph.convert(image, tmp_path / "out.qcow2")
    assert not (tmp_path / "out.qcow2").exists()


def test_each_layer_of_a_chain_keeps_its_own(image, tmp_path):
    top = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top)
    run("qemu-img", "bitmap", "--add", top, "mine")
    run("qemu-io", "-c", "write 3M 64k", top)
    parents = diskmorph.Parents(allow=(tmp_path,))
    (tmp_path / "to").mkdir()
    report = keep_chain(top, tmp_path / "to/out.qcow2", options=diskmorph.ConvertOptions(parents=parents))
    assert not report.lost
    assert described(tmp_path / "to/out-0.qcow2") == described(image)
    assert dirty(tmp_path / "to/out.qcow2", "mine", tmp_path / "one") == dirty(top, "mine", tmp_path / "two")
    for name in ("out-0", "out"):
        run("qemu-img", "check", tmp_path / f"to/{name}.qcow2")
    for words in ({"target_format": "vmdk"}, {"format_options": {"compat": "0.10"}}):
        options = diskmorph.ConvertOptions(parents=parents, dry_run=True, **words)
        lost = " ".join(keep_chain(top, tmp_path / "to/other.qcow2", options=options).lost)
        assert all(name in lost for name in ("mine", "fine", "coarse"))
