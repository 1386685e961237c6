"""Disks that were built start under emulation: BIOS and UEFI, every format, GRUB, a unified kernel image, a triple."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from bootkit import LINE, debian, kernel_package, machine, tiny_image

from diskmorph.convert.bridge import BuildOptions, build
from diskmorph.convert.bridge.options import Size
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.gpt import read_table
from diskmorph.formats.registry import open_disk

from testkit import run

pytestmark = pytest.mark.slow
MIB = 1 << 20


def made(
    folder: Path, name: str, *, boot: tuple[str, ...] = ("bios", "uefi"), triple: bool = False, **image: object
) -> Path:
    source = tiny_image(folder / "tiny.tar", **image)  # type: ignore[arg-type]
    options = BuildOptions(
        convert=ConvertOptions(sync=False),
        size=Size(slack=64 * MIB),
        boot=boot,
        kernel=kernel_package(),
        triple=folder / "triple" if triple else None,
    )
    build(source, folder / name, options=options)
    return folder / name


def test_container_in_bios_and_uefi_from_one_disk(tmp_path: Path) -> None:
    disk = made(tmp_path, "d.qcow2")
    for uefi in (False, True):
        log = machine(disk, "qcow2", until="status 7", seconds=150, uefi=uefi, ends=True)
        assert LINE in log


@pytest.mark.parametrize(("suffix", "format"), [("vmdk", "vmdk"), ("vhdx", "vhdx"), ("vdi", "vdi"), ("vhd", "vpc")])
def test_formats(tmp_path: Path, suffix: str, format: str) -> None:
    log = machine(made(tmp_path, f"d.{suffix}", boot=("bios",)), format, until="status 7", seconds=150)
    assert LINE in log


def test_unified_kernel_image_and_triple(tmp_path: Path) -> None:
    disk = made(tmp_path, "d.raw", boot=("uki",), triple=True)
    assert LINE in machine(disk, "raw", until="status 7", seconds=150, uefi=True)
    triple = tmp_path / "triple"
    words = ("-kernel", f"{triple}/aki", "-initrd", f"{triple}/ari", "-append", "root=/dev/vda console=ttyS0 quiet")
    assert LINE in machine(triple / "ami", "raw", until="status 7", seconds=120, more=words)


def test_root_grows_with_the_disk(tmp_path: Path) -> None:
    disk = made(tmp_path, "d.raw", boot=("bios",))
    os.truncate(disk, disk.stat().st_size + (1 << 30))
    machine(disk, "raw", until="status 7", seconds=150, ends=True, keep=True)
    assert "No problems found" in run("sgdisk", "-v", disk).stdout
    with open_disk(disk, format="raw") as opened:
        root = read_table(opened).partitions[-1]  # type: ignore[union-attr]
    assert root.length > 1 << 30 and root.stop > disk.stat().st_size - 2 * MIB
    image = tmp_path / "root.img"
    skip, count = root.start // MIB, root.length // MIB
    run("dd", f"if={disk}", f"of={image}", "bs=1M", f"skip={skip}", f"count={count}", "conv=sparse")
    run("e2fsck", "-fn", image)
    told = run("dumpe2fs", "-h", image).stdout
    blocks = int(next(line for line in told.splitlines() if line.startswith("Block count:")).split()[2])
    assert blocks == root.length // 4096, "the file system does not fill its partition"


def test_signals_reach_the_program(tmp_path: Path) -> None:
    script = b"""#!/bin/sh
trap 'echo GOT-TERM; exit 3' TERM
echo; echo READY; kill -TERM 1
while :; do sleep 1; done
"""
    disk = made(tmp_path, "d.raw", boot=("bios",), marker=script, User="")
    log = machine(disk, "raw", until="status 3", seconds=150, ends=True)
    assert log.index("READY") < log.index("GOT-TERM")


def test_power_button_stops_the_program(tmp_path: Path) -> None:
    script = b"#!/bin/sh\ntrap 'echo STOPPED; exit 5' TERM\necho; echo READY\nwhile :; do sleep 1; done\n"
    disk = made(tmp_path, "d.raw", boot=("bios",), marker=script, User="")
    log = machine(disk, "raw", until="status 5", seconds=150, ends=True, press="READY")
    assert "STOPPED" in log


def test_debian_in_bios_and_uefi_from_one_disk(tmp_path: Path) -> None:
    options = BuildOptions(convert=ConvertOptions(sync=False), size=Size(slack=200 * MIB), hostname="box-7")
    build(debian(), tmp_path / "d.qcow2", options=options)
    subprocess.run(["qemu-img", "resize", "-q", tmp_path / "d.qcow2", "+1G"], check=True)
    for uefi in (False, True):
        log = machine(tmp_path / "d.qcow2", "qcow2", until="box-7 login:", seconds=400, uefi=uefi)
        assert "grown to" in log
