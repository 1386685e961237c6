"""What a tree is read from is not replaced by what is made of it, not even with --force."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import pytest
from ocikit import docker_archive, folder
from treekit import tar_entry, tar_file

from diskmorph.convert.bridge import BuildOptions, CommitOptions, ExtractOptions, build, commit, extract
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import TargetError
from diskmorph.formats.policy import Parents

from testkit import run

if TYPE_CHECKING:
    from pathlib import Path

FORCE = ConvertOptions(sync=False, force=True)
PLAIN = BuildOptions(boot=(), convert=FORCE)
LAYER = tar_file(folder("etc"), tar_entry("etc/os-release", b"ID=x\n"), tar_entry("etc/fstab"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return docker_archive(tmp_path / "app.tar", [LAYER])


def refused(call: object, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(TargetError, match="which is read"):
        call()  # type: ignore[operator]
    assert path.read_bytes() == before


def test_an_archive_does_not_become_its_own_image(image: Path) -> None:
    packed = image.with_name("packed.tar.gz")
    packed.write_bytes(gzip.compress(LAYER))
    same = image.with_name("hard.tar")
    same.hardlink_to(image)
    wanted = ExtractOptions(convert=FORCE)
    refused(lambda: extract(image, f"docker-archive:{same}", options=wanted), image)
    refused(lambda: extract(packed, f"oci-archive:{packed}", options=wanted), packed)
    refused(lambda: extract(packed, packed, options=wanted), packed)
    image.with_name("soft.tar").symlink_to(image)
    extract(image, f"docker-archive:{image.with_name('soft.tar')}", options=wanted)
    assert not image.with_name("soft.tar").is_symlink()


def test_nor_a_disk_or_what_lies_below_it(image: Path, tmp_path: Path) -> None:
    disk, top = tmp_path / "disk.qcow2", tmp_path / "top.qcow2"
    build(image, disk, options=PLAIN)
    run("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", disk, top)
    wanted = ExtractOptions(convert=ConvertOptions(sync=False, force=True, parents=Parents((tmp_path,))))
    refused(lambda: extract(top, f"oci-archive:{disk}", options=wanted), disk)
    refused(lambda: extract(disk, f"oci-archive:{disk}", options=wanted), disk)
    base = CommitOptions(base=str(image), extract=wanted)
    refused(lambda: commit(disk, f"docker-archive:{image}", options=base), image)
    refused(lambda: commit(disk, f"docker-archive:{disk}", options=base), disk)


def test_nor_does_a_disk_replace_its_tree(image: Path, tmp_path: Path) -> None:
    packed = image.with_name("packed")
    packed.write_bytes(gzip.compress(LAYER))
    as_raw = BuildOptions(boot=(), convert=ConvertOptions(sync=False, force=True, target_format="raw"))
    refused(lambda: build(packed, packed, options=as_raw), packed)
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/fstab").write_text("x")
    refused(lambda: build(root, root / "etc/fstab", options=as_raw), root / "etc/fstab")
    as_layers = BuildOptions(boot=(), layers=True, convert=ConvertOptions(sync=False, force=True))
    lowest = docker_archive(tmp_path / "a.0.qcow2", [LAYER, tar_file(tar_entry("two"))])
    refused(lambda: build(lowest, tmp_path / "a.qcow2", options=as_layers), lowest)
