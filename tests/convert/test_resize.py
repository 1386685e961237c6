"""`resize` keeps what an image is: the variant of its format, or it says what is lost, or refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import diskmorph
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import open_disk

from testkit import MIB, content, pattern_disk, run

SECRET = b"secret"
LUKS = {"encrypt.format": "luks", "encrypt.iter-time": "1"}


def qemu_info(path: Path) -> dict[str, Any]:
    """What QEMU says of an image, without its name and sizes."""
    found = subprocess.run(["qemu-img", "info", "--output", "json", path], check=True, capture_output=True).stdout
    info: dict[str, Any] = json.loads(found)
    details = info.get("format-specific", {}).get("data", {})
    for key in ("cid", "parent-cid", "extents"):
        details.pop(key, None)
    return {key: info.get(key) for key in ("format", "cluster-size", "encrypted")} | {"details": details}


def encrypted(path: Path, by: str) -> Path:
    """An encrypted qcow2; the legacy kind is QEMU's."""
    disk = pattern_disk(4 * MIB, [(0, MIB, bytes([7]))])
    if by == "luks":
        options = ConvertOptions(format_options=LUKS, target_passphrase=SECRET)
        diskmorph.convert(disk, path, options=options)
        return path
    secret = ("--object", "secret,id=s,data=secret")
    words = "encrypt.format=aes,encrypt.key-secret=s"
    run("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", words, path, "4M")
    image = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    run("qemu-io", *secret, "--image-opts", image, "-c", "write -P 7 0 1M")
    return path


@pytest.mark.parametrize("by", ["luks", "aes"])
def test_an_encrypted_image_is_not_replaced_by_plaintext(by: str, tmp_path: Path) -> None:
    image = encrypted(tmp_path / "a.qcow2", by)
    before = image.read_bytes()
    options = ConvertOptions(parents=Parents(passphrase=SECRET))
    with pytest.raises(UnsupportedError, match=r"encryption .*--target-passphrase-file"):
        diskmorph.resize(image, 9 * MIB, options=options)
    assert image.read_bytes() == before
    report = diskmorph.resize(image, 9 * MIB, output=tmp_path / "b.qcow2", options=options)
    assert any("encryption" in loss for loss in report.lost)
    with open_disk(tmp_path / "b.qcow2") as disk:
        assert content(disk) == bytes([7]) * MIB + bytes(8 * MIB)


def test_what_the_new_image_lacks_is_told(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "4M")
    run("qemu-img", "snapshot", "-c", "monday", tmp_path / "a.qcow2")
    assert "monday" in diskmorph.resize(tmp_path / "a.qcow2", 8 * MIB, output=tmp_path / "b.qcow2").lost[0]


@pytest.mark.parametrize("keep_chain", [False, True])
def test_lost_encryption_is_told(keep_chain: bool, tmp_path: Path) -> None:
    image = encrypted(tmp_path / "a.qcow2", "luks")
    options = ConvertOptions(parents=Parents(passphrase=SECRET), keep_chain=keep_chain)
    lost = diskmorph.convert(image, tmp_path / "b.qcow2", options=options).lost
    assert [loss.split(":")[0] for loss in lost] == ["encryption (LUKS)"]
    options = ConvertOptions(parents=options.parents, keep_chain=keep_chain, format_options=LUKS)
    assert not diskmorph.convert(image, tmp_path / "c.qcow2", options=options).lost
