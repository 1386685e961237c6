"""Every `--for`: the shape byte by byte, and what other programs make of it."""

import gzip
import hashlib
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from clikit import dm

import diskmorph
from diskmorph.convert.cloud_facts import facts_of, glance_properties
from diskmorph.convert.cloud_gcp import data_ranges, sparse_header
from diskmorph.convert.options import ConvertOptions
from diskmorph.convert.targets import PROFILES, applied
from diskmorph.formats.allocator import Identity
from diskmorph.formats.errors import DiskmorphError, OptionError, TargetError
from diskmorph.formats.gpt import Partition, build_gpt
from diskmorph.formats.views import Memory, Regions, Zero

from testkit import GIB, MIB, data, pattern_disk, run

ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
ROOT_ARM64 = "B921B045-1DF0-41C3-AF44-4C6F280D3FAE"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw disk of an odd size with data at both ends and in the middle."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(data("first", 5000))
        file.seek(6 * MIB + 512)
        file.write(data("middle", 100_000))
        file.seek(9 * MIB)
        file.write(data("last", 512))
    return path


def partitioned(*types: str, code: bytes = b"") -> Regions:
    parts = [Partition(n, kind, "", n * MIB, MIB, str(Identity(b"x").uuid(str(n)))) for n, kind in enumerate(types, 1)]
    size = (len(types) + 2) * MIB
    head, tail = build_gpt(size, parts, disk_guid=Identity(b"x").uuid("disk"), mbr_code=code)
    disk = Regions()
    disk.add_bytes(head)
    disk.pad_to(size - len(tail))
    disk.add_bytes(tail)
    return disk


# --- the rules


def test_every_target_is_known_to_the_command_line():
    text = dm("convert", "--help").out
    names = {profile.name for profile in PROFILES}
    assert names == {
        "azure", "gcp", "aws", "openstack", "esxi", "virtualbox", "hyperv", "proxmox", "kubevirt", "vagrant-libvirt",
        "incus", "wsl", "firecracker",
    }  # fmt: skip
    assert all(name in text.replace("\n", " ") for name in names)


def test_the_suffix_chooses_among_what_the_target_takes():
    options = ConvertOptions(profile="openstack")
    assert applied(options, "a.raw")[0].target_format == "raw"
    assert applied(options, "a.qcow2")[0].target_format == "qcow2"
    assert applied(options, "a.vmdk")[0].target_format == "qcow2"
    assert applied(options)[0].target_format == "qcow2"
    aws, _ = applied(ConvertOptions(profile="aws"), "a.vmdk")
    assert dict(aws.format_options) == {"subformat": "streamOptimized"}


def test_options_that_a_target_does_not_take_are_refused():
    with pytest.raises(OptionError, match="subformat=dynamic"):
        applied(ConvertOptions(profile="azure", format_options={"subformat": "dynamic"}))
    with pytest.raises(OptionError, match="does not take qcow2"):
        applied(ConvertOptions(profile="azure", target_format="qcow2"))
    with pytest.raises(TargetError, match="VHD"):
        diskmorph.convert(Zero(3 << 40), "/nowhere/a.vhd", options=ConvertOptions(profile="azure", dry_run=True))


def test_changes_are_told_in_dry_runs_too(disk: Path):
    done = dm("convert", disk, "out.vhd", "--for", "azure", "--dry-run").ok()
    assert "multiples of 1048576" in done.err and "fixed" in done.err and "generation 1" in done.err
    assert not Path("out.vhd").exists()
    said = dm("convert", disk, "out.vhd", "--for", "azure", "--json").ok().json
    assert any("multiples of 1048576" in note for note in said["notes"])
    done = dm("convert", disk, "out.vmdk", "--for", "openstack").ok()
    assert "called like vmdk" in done.err


# --- what a disk tells of its firmware


def test_facts_of_disks():
    assert facts_of(partitioned(ESP)).firmware == "uefi"
    assert facts_of(partitioned(ESP, code=b"\xeb\x63\x90")).firmware == "bios"
    assert facts_of(Zero(MIB)).firmware == "bios" and not facts_of(Zero(MIB)).bios
    arm = facts_of(partitioned(ESP, ROOT_ARM64))
    assert (arm.architecture, arm.known) == ("aarch64", True)
    assert glance_properties(partitioned(ESP, ROOT_ARM64)) == {
        "hw_disk_bus": "virtio", "hw_vif_model": "virtio", "hw_firmware_type": "uefi", "hw_machine_type": "virt",
        "min_disk": "1", "architecture": "aarch64",
    }  # fmt: skip
    assert glance_properties(Zero(5 * GIB + 1))["hw_machine_type"] == "pc"
    assert glance_properties(Zero(5 * GIB + 1))["min_disk"] == "6"


def test_openstack_properties_only_there(disk: Path):
    assert "hw_disk_bus" in dm("convert", disk, "a.qcow2", "--for", "openstack", "--json").ok().json["properties"]
    assert "properties" not in dm("convert", disk, "b.qcow2", "--for", "proxmox", "--json").ok().json


# --- gcp


def test_gcp_archive_is_read_by_tar_and_python(disk: Path):
    dm("convert", disk, "d.tar.gz", "--for", "gcp", "--verify").ok()
    head = gzip.decompress(Path("d.tar.gz").read_bytes())[:512]
    assert head[156:157] == b"S" and head[257:265] == b"ustar  \0"
    run("tar", "-xzSf", "d.tar.gz")
    out = Path("disk.raw.out")
    Path("disk.raw").rename(out)  # the archive's member replaced the source, which has the same name
    assert out.stat().st_size == GIB and out.stat().st_blocks * 512 < 4 * MIB
    with out.open("rb") as file:
        assert file.read(5000) == data("first", 5000)
        file.seek(6 * MIB + 512)
        assert file.read(100_000) == data("middle", 100_000)
        file.seek(9 * MIB)
        assert file.read(1024) == data("last", 512) + bytes(512)
    with tarfile.open("d.tar.gz") as archive:
        assert [(member.name, member.size) for member in archive] == [("disk.raw", GIB)]


def test_gcp_many_ranges_need_extension_blocks():
    disk = pattern_disk(GIB, [(n * 8 * MIB + 4096, 4096, data(n, 4096)) for n in range(100)])
    ranges = data_ranges(disk)
    assert len(ranges) == 100 and ranges[3].tolist() == [24 * MIB + 4096, 4096]
    blocks = list(sparse_header("disk.raw", disk.size, ranges, 0))
    assert len(blocks) == 1 + -(-(101 - 4) // 21)
    assert [block[504] for block in blocks[1:]] == [1] * 4 + [0]
    near = pattern_disk(MIB, [(0, 4096, b"a"), (8192, 100, b"b"), (MIB - 4096, 4096, b"c")])
    assert data_ranges(near).tolist() == [[0, 12288], [MIB - 4096, 4096]]


def test_gcp_of_a_disk_that_ends_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    disk = pattern_disk(
        GIB, [(n * 9 * MIB, 4096, data(n, 4096)) for n in range(60)] + [(GIB - 512, 512, data("e", 512))]
    )
    diskmorph.convert(disk, "d.tar.gz", options=ConvertOptions(profile="gcp"))
    with tarfile.open("d.tar.gz") as archive:
        stream = archive.extractfile("disk.raw")
        assert stream is not None
        digest = hashlib.sha256()
        while piece := stream.read(MIB):
            digest.update(piece)
    assert digest.hexdigest() == diskmorph.digest(disk).digest


def test_gcp_of_nothing_and_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    diskmorph.convert(Zero(MIB), "z.tar.gz", options=ConvertOptions(profile="gcp"))
    run("tar", "-xzSf", "z.tar.gz")
    assert Path("disk.raw").stat().st_size == GIB
    diskmorph.convert(Zero(MIB), "z.raw", options=ConvertOptions(profile="gcp"))
    assert Path("z.raw").stat().st_size == GIB


def test_reproducible_and_nothing_left_behind(disk: Path):
    for target, words in (("gcp", ()), ("incus", ()), ("vagrant-libvirt", ())):
        for name in ("one.tar.gz", "two.tar.gz"):
            dm("convert", disk, name, "--for", target, "--reproducible", "--force", *words).ok()
        assert Path("one.tar.gz").read_bytes() == Path("two.tar.gz").read_bytes(), target
    assert sorted(os.listdir()) == ["disk.raw", "one.tar.gz", "two.tar.gz"]
    done = dm("convert", disk, "one.tar.gz", "--for", "gcp")
    assert done.status == 1 and "--force" in done.err
    assert sorted(os.listdir()) == ["disk.raw", "one.tar.gz", "two.tar.gz"]
    done = dm("convert", disk, disk, "--for", "incus", "--force")
    assert done.status == 1 and "same file" in done.err


@pytest.mark.parametrize("target", ["gcp", "incus", "vagrant-libvirt", "kubevirt"])
def test_dry_runs_write_nothing(target: str, disk: Path):
    name = "oci:image" if target == "kubevirt" else "out.tar.gz"
    said = dm("convert", disk, name, "--for", target, "--dry-run", "--json").ok().json
    assert said["stored_size"] > 0 and sum(said["bytes"].values()) == said["virtual_size"]
    assert os.listdir() == ["disk.raw"]


# --- boxes and images


def test_vagrant_box(disk: Path):
    dm("convert", disk, "d.box", "--for", "vagrant-libvirt", "--verify").ok()
    run("tar", "-xzf", "d.box")
    assert json.loads(Path("metadata.json").read_text()) == {
        "provider": "libvirt",
        "format": "qcow2",
        "virtual_size": 1,
    }
    run("qemu-img", "check", "box.img")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, "box.img")


def test_incus_unified_and_split(disk: Path):
    dm("convert", disk, "d.tar.gz", "--for", "incus", "-o", 'architecture=aarch64,description=a "b": c').ok()
    with tarfile.open("d.tar.gz") as archive:
        assert archive.getnames() == ["metadata.yaml", "rootfs.img"]
        text = archive.extractfile("metadata.yaml").read().decode()
    assert 'architecture: "aarch64"' in text and 'description: "a \\"b\\": c"' in text
    dm("convert", disk, "s.tar.gz", "--for", "incus", "-o", "split=on").ok()
    with tarfile.open("s.tar.gz") as archive:
        assert archive.getnames() == ["metadata.yaml"]
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, "s.qcow2")
    assert dm("convert", disk, "s.qcow2", "--for", "incus", "-o", "split=on").status == 2
    assert dm("convert", disk, "t.tar.gz", "--for", "incus", "-o", "split=maybe").status == 2


def test_kubevirt_names_modes_and_tags(disk: Path):
    dm("convert", disk, "oci:kv:v1", "--for", "kubevirt", "-o", "architecture=arm64", "--verify").ok()
    said = json.loads(run("skopeo", "inspect", "--override-arch", "arm64", "oci:kv:v1").stdout)
    assert said["Architecture"] == "arm64" and len(said["Layers"]) == 1
    layer = Path("kv/blobs/sha256") / said["Layers"][0].removeprefix("sha256:")
    with tarfile.open(layer) as archive:
        found = [(m.name, m.uid, m.gid, m.mode) for m in archive]
    assert found == [("disk", 107, 107, 0o755), ("disk/disk.qcow2", 107, 107, 0o440)]
    dm("convert", disk, "oci-archive:kv.tar:v2", "--for", "kubevirt").ok()
    run("skopeo", "inspect", "oci-archive:kv.tar:v2")
    assert dm("convert", disk, "kv.qcow2", "--for", "kubevirt").status == 2
    assert dm("convert", disk, "oci:kv", "--for", "kubevirt").status == 1  # not empty


def test_shapes_refuse_what_makes_no_sense(disk: Path):
    Path("folder").mkdir()
    for words in (
        ["convert", "folder", "a.tar.gz", "--for", "gcp"],
        ["convert", disk, "-", "--for", "gcp"],
        ["convert", disk, "a.wsl", "--for", "wsl"],
        ["convert", "folder", "a.wsl", "--for", "wsl", "-O", "raw"],
        ["convert", "folder", "fc", "--for", "firecracker"],
        ["convert", "folder", "a.qcow2", "--for", "wsl", "-o", "nosuch=1"],
    ):
        done = dm(*words)
        assert done.status in {1, 2} and "fault in diskmorph" not in done.err, (words, done.err)
    assert sorted(os.listdir()) == ["disk.raw", "folder"]


# --- trees


def small_tree(root: Path, **files: bytes) -> Path:
    for name, content in {"etc/passwd": b"root:x:0:0::/:/bin/sh\nme:x:1001:1001::/:/bin/sh\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def test_wsl_adds_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tree = small_tree(tmp_path / "t", **{"usr/lib/systemd/systemd": b"x"})
    dm("convert", tree, "box.wsl", "--for", "wsl", "--verify").ok()
    with tarfile.open("box.wsl") as archive:
        text = archive.extractfile("etc/wsl-distribution.conf").read().decode()
        assert "systemd = true" in archive.extractfile("etc/wsl.conf").read().decode()
    assert text == "[oobe]\ndefaultUid = 1001\ndefaultName = box\n\n[shortcut]\nenabled = true\n"
    small_tree(tree, **{"etc/wsl-distribution.conf": b"[oobe]\ndefaultName = mine\n"})
    done = dm("convert", tree, "two.tar.gz", "--for", "wsl").ok()
    with tarfile.open("two.tar.gz") as archive:
        assert b"mine" in archive.extractfile("etc/wsl-distribution.conf").read()
    assert ".wsl" in done.err
    said = dm("convert", tree, "no.wsl", "--for", "wsl", "--dry-run", "--json").ok().json
    assert said["stored_size"] > 0 and not Path("no.wsl").exists()


def test_firecracker_takes_the_newest_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    elf = b"\x7fELF\x02\x01\x01" + data("kernel", 3 * MIB)
    tree = small_tree(tmp_path / "t", **{"boot/vmlinux-6.9.1": b"\x7fELFold", "boot/vmlinux-6.10.2": elf})
    done = dm("convert", tree, "fc", "--for", "firecracker").ok()
    assert Path("fc/vmlinux").read_bytes() == elf and "6.10.2" in done.err
    run("e2fsck", "-fn", "fc/rootfs.ext4")
    assert "me:x:1001" in run("debugfs", "-R", "cat /etc/passwd", "fc/rootfs.ext4").stdout
    Path("k").write_bytes(b"\x7fELF" + b"mine")
    dm("convert", tree, "fc2", "--for", "firecracker", "-o", "kernel=k", "--size", "100M").ok()
    assert Path("fc2/vmlinux").read_bytes() == b"\x7fELFmine"
    assert Path("fc2/rootfs.ext4").stat().st_size == 100 * MIB
    assert dm("convert", tree, "fc3", "--for", "firecracker", "--dry-run").ok() and not Path("fc3").exists()
    Path("k").write_bytes(b"nothing that boots" * 100)
    assert dm("convert", tree, "fc4", "--for", "firecracker", "-o", "kernel=k").status == 1
    assert not Path("fc4").exists()


def test_memory_disks_take_shapes_too(tmp_path: Path):
    with pytest.raises(DiskmorphError, match="folder"):
        diskmorph.convert(Memory(bytes(512)), tmp_path / "no/d.tar.gz", options=ConvertOptions(profile="gcp"))
    with pytest.raises((OptionError, TargetError)):
        diskmorph.convert(Memory(bytes(512)), tmp_path / "d.wsl", options=ConvertOptions(profile="wsl"))
    assert subprocess.run(["ls", tmp_path], capture_output=True, check=True).stdout == b""
