"""A file that is read is never written, whatever stands between it and the disk; a link to it may be replaced."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import vhdxmade

import diskmorph
from diskmorph.formats.errors import TargetError
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import open_disk

from testkit import MIB, data, pattern_disk, run, write_image

PHRASE = Parents(passphrase=b"secret")


def options(**words: object) -> diskmorph.ConvertOptions:
    return diskmorph.ConvertOptions(force=True, **words)  # type: ignore[arg-type]  # words of any kind


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(data("own", 2 * MIB))
    return path


def ova(raw: Path) -> Path:
    diskmorph.convert(raw, raw.with_name("vm.ova"))
    return raw.with_name("vm.ova")


def packed(raw: Path) -> Path:
    path = raw.with_name("disk.raw.gz")
    path.write_bytes(gzip.compress(raw.read_bytes(), 1))
    return path


def encrypted(raw: Path) -> Path:
    words = {"encrypt.format": "luks", "encrypt.iter-time": "20"}
    wanted = options(format_options=words, target_passphrase=b"secret")
    diskmorph.convert(raw, raw.with_name("secret.qcow2"), options=wanted)
    return raw.with_name("secret.qcow2")


def dirty(raw: Path) -> Path:
    blocks = {0: (vhdxmade.FULL, data("log", MIB), None)}
    image = vhdxmade.Made(4 * MIB, blocks, header={"log": vhdxmade.LOG}).build()
    vhdxmade.put_log(image, 0, vhdxmade.log_entry(5, [(4 * MIB, data("l", 4096))], size=len(image)))
    path = raw.with_name("dirty.vhdx")
    path.write_bytes(image)
    return path


MAKERS = [ova, packed, encrypted, dirty]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_the_source_is_not_replaced(raw: Path, make: Callable[[Path], Path]) -> None:
    path = make(raw)
    before = path.read_bytes()
    for name in (path, path.with_name("link")):
        if name is not path:
            name.hardlink_to(path)
        with pytest.raises(TargetError, match="which is read"):
            diskmorph.convert(path, name, options=options(target_format="qcow2", parents=PHRASE))
    assert path.read_bytes() == before
    path.with_name("soft").symlink_to(path)
    diskmorph.convert(path, path.with_name("soft"), options=options(target_format="qcow2", parents=PHRASE))
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", ["ova", "raw.gz"])
def test_nor_by_archives(raw: Path, suffix: str) -> None:
    target = raw.with_name(f"vm.{suffix}")
    ova(raw).rename(target)
    words = options(source_format="ova", target_format="raw" if suffix == "raw.gz" else None)
    with pytest.raises(TargetError, match="which is read"):
        diskmorph.convert(target, target, options=words)
    assert tar_of(target)


def tar_of(path: Path) -> bool:
    return path.read_bytes()[257:262] == b"ustar"


def test_an_open_disk_knows_its_file(raw: Path) -> None:
    path = ova(raw)
    with open_disk(path) as disk, pytest.raises(TargetError, match="which is read"):
        diskmorph.convert(disk, path, options=options(target_format="qcow2"))


def test_files_that_the_image_names_are_read_too(raw: Path, tmp_path: Path) -> None:
    secret = encrypted(raw)
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", raw, tmp_path / "top.qcow2")
    wanted = options(parents=Parents((tmp_path,)))
    with pytest.raises(TargetError, match="which is read"):
        diskmorph.convert(tmp_path / "top.qcow2", raw, options=wanted)
    with pytest.raises(TargetError, match="which is read"):
        diskmorph.convert(raw, secret, options=options(base=secret, parents=PHRASE))
    flat = {"subformat": "monolithicFlat"}
    write_image("vmdk", pattern_disk(MIB, []), tmp_path / "flat.vmdk", options=flat)
    with pytest.raises(TargetError, match="which is read"):
        diskmorph.convert(tmp_path / "flat.vmdk", tmp_path / "flat-flat.vmdk", options=options(target_format="raw"))


def test_nor_by_further_targets(raw: Path, tmp_path: Path) -> None:
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", raw, tmp_path / "top.qcow2")
    before = raw.read_bytes()
    for source, also in (("disk.raw", "disk.raw"), ("top.qcow2", "disk.raw"), ("vm.ova", "vm.ova")):
        if source == "vm.ova":
            ova(raw)
        wanted = options(also=(str(tmp_path / also),), parents=Parents((tmp_path,)))
        with pytest.raises(TargetError, match="which is read"):
            diskmorph.convert(tmp_path / source, tmp_path / "first.vdi", options=wanted)
        assert not (tmp_path / "first.vdi").exists()
    assert raw.read_bytes() == before


def test_standard_input_may_be_a_file_with_a_name(raw: Path) -> None:
    with raw.open("rb") as stream:
        line = [sys.executable, "-m", "diskmorph", "convert", "--force", "-O", "qcow2", "-", str(raw)]
        done = subprocess.run(line, stdin=stream, capture_output=True, check=False)
    assert done.returncode
    assert raw.stat().st_size == 2 * MIB
