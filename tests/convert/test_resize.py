"""`resize` keeps what an image is: the variant of its format, or it says what is lost, or refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import vmdkmade

import diskmorph
from diskmorph.convert.inspect import inspect
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import open_disk

from testkit import KIB, MIB, content, data, pattern_disk, run

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
        diskmorph.resize(image, 3 * MIB, options=options)
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


QCOW2 = ["refcount_bits=1", "refcount_bits=64", "compat=0.10", "extended_l2=on,cluster_size=16k",
         "lazy_refcounts=on", "compression_type=zstd", "cluster_size=2M"]  # fmt: skip
OTHERS = ["vdi", "vdi static=on", "vpc subformat=fixed", "vpc subformat=dynamic", "vhdx block_size=16M,log_size=2M",
          "vhdx subformat=fixed", "vmdk adapter_type=buslogic,hwversion=11", "vmdk zeroed_grain=on",
          "vmdk subformat=streamOptimized", "raw"]  # fmt: skip
DIFFERENT = {"vpc": ["force_size=on"]}


@pytest.mark.parametrize("size", [9 * MIB, 3 * MIB])
@pytest.mark.parametrize("how", [*(f"qcow2 {words}" for words in QCOW2), *OTHERS])
def test_the_variant_stays(how: str, size: int, tmp_path: Path) -> None:
    kind, _, words = how.partition(" ")
    image, source = tmp_path / "a.img", tmp_path / "in.raw"
    source.write_bytes(data("variant", MIB) + bytes(MIB) + b"x" * (2 * MIB))
    words = ",".join([*([words] if words else []), *DIFFERENT.get(kind, [])])
    run("qemu-img", "convert", "-O", kind, *(("-o", words) if words else ()), source, image)
    before, info = qemu_info(image), inspect(image).image.info
    report = diskmorph.resize(image, size, shrink=True)
    after = inspect(image).image.info
    assert qemu_info(image) == before
    for name in ("subformat", "sector_size", "allocation_unit"):
        assert getattr(after, name) == getattr(info, name), name
    for name in {"physical_sector_size", "log_size", "adapter_type", "hwversion"} & set(info.features):
        assert after.features[name] == info.features[name], name
    assert not report.lost
    with open_disk(image) as disk:
        assert content(disk) == (source.read_bytes() + bytes(5 * MIB))[:size]


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_compressed_clusters_stay_as_they_are(codec: str, tmp_path: Path) -> None:
    image, source = tmp_path / "a.qcow2", tmp_path / "in.raw"
    source.write_bytes(b"text %d " % MIB * MIB)
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={codec}", source, image)
    before, stored = qemu_info(image), image.stat().st_size
    new = tmp_path / "b.qcow2"
    report = diskmorph.resize(image, 64 * MIB, output=new)
    assert qemu_info(new) == before
    assert report.bytes.passed >= source.stat().st_size - 64 * KIB
    assert not report.bytes.copied
    assert new.stat().st_size < 2 * stored
    run("qemu-img", "check", "-q", new)


def test_room_that_is_reserved_stays_reserved(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    run("qemu-img", "create", "-q", "-f", "raw", "-o", "preallocation=falloc", image, "4M")
    assert not diskmorph.resize(image, 6 * MIB).lost
    assert image.stat().st_blocks * 512 >= 6 * MIB
    options = ConvertOptions(format_options={"preallocation": "off"})
    diskmorph.resize(image, 5 * MIB, options=options)
    assert image.stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_room_that_is_lost_is_told(format: str, tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    run("qemu-img", "create", "-q", "-f", format, "-o", "preallocation=full", image, "4M")
    assert "preallocation" in diskmorph.resize(image, 6 * MIB, output=tmp_path / "b.img").lost[0]
    image.write_bytes(b"x" * 4 * MIB)
    options = ConvertOptions(source_format="raw")
    assert not diskmorph.resize(image, 6 * MIB, output=tmp_path / "c.img", options=options).lost


def test_grains_of_another_size_are_told(tmp_path: Path) -> None:
    image = tmp_path / "a.vmdk"
    text = vmdkmade.words(['RW 8192 SPARSE "a.vmdk"'])
    image.write_bytes(vmdkmade.Hosted(8192, {0: b"x"}, grain=8, text=text).build())
    assert diskmorph.resize(image, 9 * MIB).lost == ("the allocation unit of 4096 bytes becomes 65536",)


def test_words_of_the_user_go_before(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", tmp_path / "a.qcow2", "4M")
    options = ConvertOptions(format_options={"cluster_size": "128k"})
    assert not diskmorph.resize(tmp_path / "a.qcow2", 9 * MIB, options=options).lost
    assert inspect(tmp_path / "a.qcow2").image.info.allocation_unit == 128 * KIB


@pytest.mark.parametrize("format", ["vhd", "vhdx", "vdi", "vmdk"])
def test_an_overlay_becomes_one_disk_elsewhere(format: str, tmp_path: Path) -> None:
    base, over, new = (tmp_path / f"{name}.{format}" for name in ("base", "over", "new"))
    diskmorph.convert(pattern_disk(4 * MIB, [(0, MIB, b"abc")]), base)
    diskmorph.create(over, options=ConvertOptions(base=base))
    options = ConvertOptions(parents=Parents.of(tmp_path))
    with pytest.raises(UnsupportedError, match="overlay"):
        diskmorph.resize(over, 9 * MIB, options=options)
    report = diskmorph.resize(over, 9 * MIB, output=new, options=options)
    assert not report.lost
    assert any("flattened" in note for note in report.notes)
    with open_disk(new) as disk, open_disk(base) as below:
        assert content(disk) == content(below) + bytes(5 * MIB)
