"""Glance triples: three images tied by their identifiers."""

from __future__ import annotations

import json
import shlex

import pytest

from diskmorph.formats.allocator import Identity
from diskmorph.formats.ami.glance import new_triple, read_triple, triple_json
from diskmorph.formats.errors import FormatError


def test_a_triple_is_tied_by_its_identifiers():
    kernel, ramdisk, root = new_triple(
        "web server", Identity(b"seed"), kernel=True, ramdisk=True, architecture="x86_64", cmdline="root=/dev/vda ro"
    )
    assert [(i.disk_format, i.container_format, i.file) for i in (kernel, ramdisk, root)] == [
        (word, word, word) for word in ("aki", "ari", "ami")
    ]
    assert root.properties == {
        "architecture": "x86_64",
        "kernel_id": kernel.id,
        "ramdisk_id": ramdisk.id,
        "os_command_line": "root=/dev/vda ro",
    }
    words = shlex.split(root.command())
    assert words[:3] == ["openstack", "image", "create"]
    assert words[words.index("--id") + 1] == root.id
    assert f"kernel_id={kernel.id}" in words
    assert words[-1] == "web server"


def test_fewer_images_without_a_ramdisk():
    images = new_triple("x", Identity(b"seed"), kernel=True, ramdisk=False)
    assert [i.disk_format for i in images] == ["aki", "ami"]
    assert "ramdisk_id" not in images[-1].properties


def test_json_both_ways_and_the_same_for_the_same_seed():
    images = new_triple("x", Identity(b"seed"), kernel=True, ramdisk=True)
    text = triple_json(images)
    assert read_triple(text, file="j") == images
    assert triple_json(new_triple("x", Identity(b"seed"), kernel=True, ramdisk=True)) == text
    assert [image["command"] for image in json.loads(text)["images"]] == [image.command() for image in images]


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"images": [{}]}', b'{"images": 5}', b"[" * 100_000, b"\xff"]
    + [
        triple_json(new_triple("x", Identity(b"s"), kernel=False, ramdisk=False)).replace(a, b)
        for a, b in (
            (b'"file": "ami"', b'"file": "../x"'),
            (b'"disk_format": "ami"', b'"disk_format": "raw"'),
            (b'"name": "x"', b'"name": 5'),
        )
    ],
)
def test_damaged_json(data):
    with pytest.raises(FormatError):
        read_triple(data, file="j")
