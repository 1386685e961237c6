"""Glance triples as files in a folder."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import diskmorph
from diskmorph import ConvertOptions
from diskmorph.formats.errors import FormatError, OptionError, TargetError

from testkit import MIB, content, little_disk, write_image

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))

from test_ami_kernel import bzimage
from test_ami_ramdisk import BODY


@pytest.fixture
def parts(tmp_path):
    """A disk as qcow2, a kernel and a ramdisk: their paths, and what the disk reads as."""
    disk = little_disk(2 * MIB)
    (path,) = write_image("qcow2", disk, tmp_path / "d.qcow2")
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(gzip.compress(BODY))
    return path, tmp_path / "vmlinuz", tmp_path / "initrd", content(disk)


def options(**words: object) -> ConvertOptions:
    return ConvertOptions(target_format="ami", format_options={k: str(v) for k, v in words.items()}, sync=False)


def test_a_triple(tmp_path, parts):
    disk, kernel, ramdisk, want = parts
    asked = options(kernel=kernel, ramdisk=ramdisk, cmdline="root=/dev/vda ro", name="web")
    report = diskmorph.convert(disk, tmp_path / "out", options=asked)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["aki", "ami", "ari", "images.json"]
    assert (out / "ami").read_bytes() == want
    assert (out / "aki").read_bytes() == kernel.read_bytes()
    assert (out / "ari").read_bytes() == ramdisk.read_bytes()
    images = {image["disk_format"]: image for image in json.loads((out / "images.json").read_text())["images"]}
    root = images["ami"]
    assert root["properties"]["kernel_id"] == images["aki"]["id"]
    assert root["properties"]["ramdisk_id"] == images["ari"]["id"]
    assert root["properties"]["os_command_line"] == "root=/dev/vda ro"
    assert root["properties"]["architecture"] == "x86_64"
    assert (root["name"], root["container_format"], root["file"]) == ("web", "ami", "ami")
    assert report.bytes.total() == report.virtual_size
    assert (report.format, report.members) == ("ami", ("aki", "ari", "ami", "images.json"))


def test_the_same_twice(tmp_path, parts):
    disk, kernel, *_ = parts
    texts = set()
    for name in ("a", "b"):
        asked = replace(options(kernel=kernel, name="x"), reproducible=True)
        diskmorph.convert(disk, tmp_path / name, options=asked)
        texts.add((tmp_path / name / "images.json").read_text())
    assert len(texts) == 1


def test_what_is_refused_leaves_nothing(tmp_path, parts):
    disk, kernel, ramdisk, _ = parts
    before = sorted(p.name for p in tmp_path.iterdir())
    for words, kind in (
        ({"ramdisk": ramdisk}, OptionError),
        ({"kernel": ramdisk}, FormatError),
        ({"kernel": kernel, "ramdisk": kernel}, FormatError),
        ({"colour": "red"}, OptionError),
    ):
        with pytest.raises(kind):
            diskmorph.convert(disk, tmp_path / "out", options=options(**words))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    diskmorph.convert(disk, tmp_path / "out", options=replace(options(kernel=kernel), dry_run=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(TargetError):
        diskmorph.convert(disk, tmp_path, options=options())
