"""Disks to OVA and OVF and back: judged by tarfile, qemu-img and hashlib, not by our own readers."""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from ovfkit import OVF1, RASD, entry, envelope, hardware, ova, system

import diskmorph
from diskmorph import ConvertOptions
from diskmorph.formats.errors import DiskmorphError, IntegrityError, OptionError, TargetError, UnsupportedError
from diskmorph.formats.packages import open_package
from diskmorph.formats.registry import open_disk
from diskmorph.formats.views import Memory, grown

from testkit import MIB, content, data, little_disk, qemu_same, run, sha256, write_image

if TYPE_CHECKING:
    from pathlib import Path

EPOCH = 1_700_000_000


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A small disk as a raw file and as qcow2."""
    folder = tmp_path_factory.mktemp("disk")
    source = little_disk(5 * MIB + 1536)
    (raw,) = write_image("raw", source, folder / "d.raw")
    (qcow2,) = write_image("qcow2", source, folder / "d.qcow2")
    return raw, qcow2


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, format=tarfile.USTAR_FORMAT) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def options(**words: str) -> ConvertOptions:
    return ConvertOptions(format_options=words, sync=False)


def test_an_ova_is_what_other_products_read(tmp_path, disk):
    raw, qcow2 = disk
    report = diskmorph.convert(qcow2, tmp_path / "vm.ova", options=options(cpus="2", memory="2G", firmware="efi"))
    found = members(tmp_path / "vm.ova")
    assert list(found) == ["vm.ovf", "vm.mf", "vm-disk1.vmdk"]
    digests = {n: hashlib.sha256(b).hexdigest() for n, b in found.items() if n != "vm.mf"}
    assert found["vm.mf"].decode() == "".join(f"SHA256({n})= {d}\n" for n, d in digests.items())
    (tmp_path / "x.vmdk").write_bytes(found["vm-disk1.vmdk"])
    run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", tmp_path / "x.vmdk", tmp_path / "x.raw")
    assert sha256(tmp_path / "x.raw") == sha256(raw)
    root = ET.fromstring(found["vm.ovf"])
    file = root.find(f".//{{{OVF1}}}File")
    assert file.get(f"{{{OVF1}}}size") == str(len(found["vm-disk1.vmdk"]))
    assert (report.format, report.virtual_size, report.members) == ("ova", raw.stat().st_size, ("vm.ova",))
    assert report.stored_size == (tmp_path / "vm.ova").stat().st_size
    assert report.bytes.total() == report.virtual_size
    assert run("bsdtar", "-tf", tmp_path / "vm.ova").stdout.split() == list(found)


def test_headers_are_ustar_without_extensions(tmp_path, disk):
    diskmorph.convert(disk[1], tmp_path / "vm.ova", options=options())
    raw = (tmp_path / "vm.ova").read_bytes()
    with tarfile.open(tmp_path / "vm.ova") as tar:
        for member in tar:
            head = raw[member.offset : member.offset + 512]
            assert head[257:265] == b"ustar\x0000"
            assert head[156:157] == b"0"
            assert (member.mode, member.uid, member.gid, member.pax_headers) == (0o644, 0, 0, {})
        assert raw[-1024:] == bytes(1024)
        assert len(raw) == tar.offset + 512 or len(raw) - member.offset_data - member.size < 2048


def test_the_way_back(tmp_path, disk):
    raw, qcow2 = disk
    diskmorph.convert(qcow2, tmp_path / "vm.ova", options=options())
    for name in ("back.raw", "back.qcow2", "back.vdi"):
        diskmorph.convert(tmp_path / "vm.ova", tmp_path / name, options=ConvertOptions(sync=False))
    assert sha256(tmp_path / "back.raw") == sha256(raw)
    qemu_same(raw, tmp_path / "back.qcow2", "qcow2")
    qemu_same(raw, tmp_path / "back.vdi", "vdi")


def test_a_folder_form(tmp_path, disk):
    raw, qcow2 = disk
    report = diskmorph.convert(qcow2, tmp_path / "my vm.ovf", options=options(manifest="sha1"))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["my vm.mf", "my vm.ovf", "my-vm-disk1.vmdk"]
    assert report.members == ("my vm.ovf", "my vm.mf", "my-vm-disk1.vmdk")
    with open_package(tmp_path / "my vm.ovf") as package:
        assert {d.algorithm for d in package.manifest} == {"SHA1"}
        with package.open_disk() as found:
            assert content(found) == raw.read_bytes()
    with pytest.raises(TargetError, match="exists"):
        diskmorph.convert(qcow2, tmp_path / "my vm.ovf", options=options())
    diskmorph.convert(qcow2, tmp_path / "my vm.ovf", options=replace(options(), force=True))


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
def test_manifests_by_each_digest(tmp_path, disk, algorithm):
    diskmorph.convert(disk[1], tmp_path / "vm.ova", options=options(manifest=algorithm))
    found = members(tmp_path / "vm.ova")
    for line in found["vm.mf"].decode().splitlines():
        name = line.split("(")[1].split(")")[0]
        assert line == f"{algorithm.upper()}({name})= {hashlib.new(algorithm, found[name]).hexdigest()}"


def test_several_disks_make_one_machine(tmp_path, disk):
    raw, qcow2 = disk
    (other,) = write_image("vdi", Memory(data("other", 3 * MIB)), tmp_path / "o.vdi")
    diskmorph.convert([qcow2, other], tmp_path / "vm.ova", options=options())
    found = members(tmp_path / "vm.ova")
    assert list(found) == ["vm.ovf", "vm.mf", "vm-disk1.vmdk", "vm-disk2.vmdk"]
    diskmorph.convert(tmp_path / "vm.ova", tmp_path / "2.raw", options=ConvertOptions(disk=2, sync=False))
    assert (tmp_path / "2.raw").read_bytes() == data("other", 3 * MIB)
    with pytest.raises(OptionError, match="--disk"):
        diskmorph.convert(tmp_path / "vm.ova", tmp_path / "x.raw")
    (tmp_path / "all").mkdir()
    report = diskmorph.convert(tmp_path / "vm.ova", tmp_path / "all", options=replace(options(), target_format="raw"))
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["vm-disk1.raw", "vm-disk2.raw"]
    assert sha256(tmp_path / "all/vm-disk1.raw") == sha256(raw)
    assert report.virtual_size == raw.stat().st_size + 3 * MIB == report.bytes.total()
    with pytest.raises(OptionError, match="several sources"):
        diskmorph.convert([qcow2, other], tmp_path / "x.qcow2")


def test_a_folder_appears_whole_or_not_at_all(tmp_path, disk):
    raw, qcow2 = disk
    (tmp_path / "bad").mkdir()
    rows = "".join(f'<Disk ovf:diskId="d{n}" ovf:fileRef="f{n}" ovf:capacity="1"/>' for n in (1, 2))
    refs = "".join(f'<File ovf:id="f{n}" ovf:href="{n}.qcow2"/>' for n in (1, 2))
    path = ova(
        tmp_path / "x.ova",
        ("x.ovf", envelope(refs, rows, system("m", hardware(2)))),
        ("1.qcow2", qcow2.read_bytes()),
        ("2.qcow2", qcow2.read_bytes()[: 2 * MIB]),
    )
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DiskmorphError):
        diskmorph.convert(path, f"{tmp_path}/out/", options=ConvertOptions(sync=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "bad/keep").write_text("")
    with pytest.raises(TargetError, match="not an empty folder"):
        diskmorph.convert(path, tmp_path / "bad")
    assert raw.exists()


def test_a_package_becomes_another_and_keeps_its_machine(tmp_path, disk):
    raw, qcow2 = disk
    extra = '<OperatingSystemSection ovf:id="96" vmw:osType="debian12_64Guest"><Info>i</Info></OperatingSystemSection>'
    source = ova(
        tmp_path / "in.ova",
        (
            "x.ovf",
            envelope('<File ovf:id="f1" ovf:href="d.qcow2"/>', body=system("old", hardware(cpus=3), extra=extra)),
        ),
        ("d.qcow2", qcow2.read_bytes()),
    )
    diskmorph.convert(source, tmp_path / "out.ova", options=options(memory="1G"))
    assert next(iter(members(tmp_path / "out.ova"))) == "old.ovf"
    with open_package(tmp_path / "out.ova") as package:
        (machine,) = package.machines
        assert (machine.name, machine.cpus, machine.memory, machine.os.id) == ("old", 3, 1 << 30, "debian12_64")
        with package.open_disk() as found:
            assert content(found) == raw.read_bytes()
    with pytest.raises(TargetError, match="same file"):
        diskmorph.convert(source, source, options=replace(options(), force=True))


def test_packages_of_many_machines_are_refused_unless_a_disk_is_chosen(tmp_path, disk):
    _, qcow2 = disk
    refs = "".join(f'<File ovf:id="f{n}" ovf:href="{n}.qcow2"/>' for n in (1, 2))
    rows = "".join(f'<Disk ovf:diskId="d{n}" ovf:fileRef="f{n}" ovf:capacity="1"/>' for n in (1, 2))
    two = system("a", hardware(1)) + system("b", hardware(1).replace("ovf:/disk/d1", "ovf:/disk/d2"))
    body = f'<VirtualSystemCollection ovf:id="c"><Info>i</Info>{two}</VirtualSystemCollection>'
    path = ova(
        tmp_path / "x.ova", ("x.ovf", envelope(refs, rows, body)), *((f"{n}.qcow2", qcow2.read_bytes()) for n in (1, 2))
    )
    with pytest.raises(UnsupportedError, match="2 machines"):
        diskmorph.convert(path, tmp_path / "y.ova")
    diskmorph.convert(path, tmp_path / "y.ova", options=ConvertOptions(disk=2, sync=False))
    with open_package(tmp_path / "y.ova") as package:
        assert package.machines[0].name == "b"


def test_names_of_disks_that_differ_by_suffix_or_number(tmp_path, disk):
    raw, qcow2 = disk
    names = ["x.img", "x-3.qcow2", "x.qcow2"]
    refs = "".join(f'<File ovf:id="f{n}" ovf:href="{name}"/>' for n, name in enumerate(names, 1))
    rows = "".join(f'<Disk ovf:diskId="d{n}" ovf:fileRef="f{n}" ovf:capacity="1"/>' for n in (1, 2, 3))
    files = [(name, qcow2.read_bytes()) for name in names]
    path = ova(tmp_path / "x.ova", ("x.ovf", envelope(refs, rows, system("a", hardware(3)))), *files)
    diskmorph.convert(path, f"{tmp_path}/out/", options=ConvertOptions(target_format="raw", sync=False))
    found = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in found] == ["x-3-3.raw", "x-3.raw", "x.raw"]
    assert all(sha256(file) == sha256(raw) for file in found)


def test_plain_bytes_that_are_fewer_than_the_disk_has(tmp_path, disk):
    raw, _ = disk
    size = raw.stat().st_size
    for held, fits in ((size, True), (size - MIB, False)):
        rows = f'<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="{size + MIB - 1}"/>'
        described = envelope('<File ovf:id="f1" ovf:href="d.img"/>', rows)
        path = ova(tmp_path / "x.ova", ("x.ovf", described), ("d.img", raw.read_bytes()[:held]))
        words = ConvertOptions(force=True, sync=False)
        if fits:
            assert diskmorph.convert(path, tmp_path / "x.raw", options=words).virtual_size == size
            continue
        with pytest.raises(DiskmorphError, match="cut off"):
            diskmorph.convert(path, tmp_path / "x.raw", options=words)


def test_a_disk_of_no_machine_is_told_of(tmp_path, disk):
    _, qcow2 = disk
    refs = "".join(f'<File ovf:id="f{n}" ovf:href="{n}.qcow2"/>' for n in (1, 2))
    rows = "".join(f'<Disk ovf:diskId="d{n}" ovf:fileRef="f{n}" ovf:capacity="1"/>' for n in (1, 2))
    files = [(f"{n}.qcow2", qcow2.read_bytes()) for n in (1, 2)]
    path = ova(tmp_path / "x.ova", ("x.ovf", envelope(refs, rows, system("a", hardware(1)))), *files)
    report = diskmorph.convert(path, tmp_path / "y.ova", options=options())
    assert len(report.lost) == 1
    assert "disk 2 (2.qcow2)" in report.lost[0]


def test_the_same_content_makes_the_same_bytes(tmp_path, disk, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))
    raw, qcow2 = disk
    asked = replace(options(name="x"), reproducible=True)
    for source, name in ((qcow2, "a.ova"), (raw, "b.ova")):
        diskmorph.convert(source, tmp_path / name, options=asked)
    assert sha256(tmp_path / "a.ova") == sha256(tmp_path / "b.ova")
    with tarfile.open(tmp_path / "a.ova") as tar:
        assert {member.mtime for member in tar} == {EPOCH}


def test_descriptor_room_is_filled_where_a_size_has_fewer_digits(tmp_path, disk, monkeypatch):
    """The room reserved may be a block larger than the descriptor needs: blanks fill it, and the package stays true."""
    from diskmorph.convert import packages

    real = packages.envelope_room
    monkeypatch.setattr(packages, "envelope_room", lambda *words: real(*words) + 512)
    diskmorph.convert(disk[1], tmp_path / "vm.ova", options=options())
    found = members(tmp_path / "vm.ova")
    assert found["vm.ovf"].endswith(b"  ")
    with open_package(tmp_path / "vm.ova") as package:
        assert package.machines[0].name == "vm"


def test_verify_reads_the_target_back(tmp_path, disk, monkeypatch):
    raw, qcow2 = disk
    report = diskmorph.convert(qcow2, tmp_path / "vm.ova", options=replace(options(), verify=True, digest=True))
    assert (report.verified, report.digest) == (True, sha256(raw))
    from diskmorph.convert.slots import Slot

    real = Slot.write

    def damaged(self: Slot, offset: int, payload: bytes) -> None:
        real(self, offset, payload if offset != 65536 else bytes(payload[:12]) + bytes(len(payload) - 12))

    monkeypatch.setattr(Slot, "write", damaged)
    with pytest.raises((IntegrityError, DiskmorphError)):
        diskmorph.convert(qcow2, tmp_path / "bad.ova", options=replace(options(), verify=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vm.ova"]


def test_dry_run_and_progress(tmp_path, disk):
    raw, qcow2 = disk
    report = diskmorph.convert([qcow2, raw], tmp_path / "vm.ova", options=replace(options(), dry_run=True))
    assert not list(tmp_path.iterdir())
    assert report.virtual_size == 2 * raw.stat().st_size
    seen = []
    diskmorph.convert([qcow2, raw], tmp_path / "vm.ova", options=options(), on_progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total == 2 * raw.stat().st_size


def test_failure_leaves_nothing(tmp_path, disk):
    raw, _ = disk
    (tmp_path / "vm.ova").write_text("old")
    cut = tmp_path / "cut.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", raw, cut)
    os.truncate(cut, cut.stat().st_size - 600_000)
    with pytest.raises(DiskmorphError):
        diskmorph.convert(cut, tmp_path / "vm.ova", options=replace(options(), force=True))
    assert (tmp_path / "vm.ova").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.qcow2", "vm.ova"]


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("-", {"target_format": "ova"}),
        ("x.ova", {"profile": "azure"}),
        ("x.ova", {"base": "b.qcow2"}),
        ("x.ova", {"device": True}),
        ("x.ova", {"format_options": {"cpus": "0"}}),
        ("x.ova", {"disk": 5}),
        ("no/such/folder/x.ova", {}),
    ],
)
def test_what_is_refused(tmp_path, disk, target, more):
    source = disk[1]
    if "disk" in more:
        source = ova(tmp_path / "in.ova", ("x.ovf", envelope()), ("d.vmdk", b"x"))
    name = target if target == "-" else tmp_path / target
    with pytest.raises(DiskmorphError):
        diskmorph.convert(source, name, options=ConvertOptions(**more))
    assert not (tmp_path / "x.ova").exists()


def test_profiles_take_packages(tmp_path, disk):
    for profile in ("esxi", "virtualbox", "proxmox", "aws"):
        diskmorph.convert(disk[1], tmp_path / f"{profile}.ova", options=ConvertOptions(profile=profile, sync=False))
        with open_package(tmp_path / f"{profile}.ova") as package:
            assert package.machines[0].hardware == "vmx-13"


def test_a_member_above_8_gib_is_read_in_place(tmp_path):
    """A sparse archive with a base-256 size: only its ends are ever touched."""
    size = 9 << 30
    small, tail = data("head", 65536), data("tail", 65536)
    with open(tmp_path / "d.raw", "wb") as file:
        file.write(small)
        file.seek(size - len(tail))
        file.write(tail)
    head = entry("x.ovf", envelope('<File ovf:id="f1" ovf:href="d.raw"/>'))
    from diskmorph.formats.tarheader import build_header

    with open(tmp_path / "x.ova", "wb") as file:
        file.write(head + build_header("d.raw", size, 0))
        start = file.tell()
        file.write(small)
        file.seek(start + size - len(tail))
        file.write(tail + bytes(1024))
    with open_disk(tmp_path / "x.ova") as found:
        assert found.size == size
        assert found.read(size - 65536, 65536) == tail
    report = diskmorph.convert(tmp_path / "x.ova", tmp_path / "o.qcow2", options=ConvertOptions(sync=False))
    assert report.virtual_size == size
    assert (tmp_path / "o.qcow2").stat().st_size < 16 * MIB


def test_a_disk_that_boots_by_efi_alone_makes_an_efi_machine(tmp_path):
    from diskmorph.formats.gpt import Partition, build_gpt

    esp = Partition(1, "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "EFI", MIB, MIB, "11111111-2222-3333-4444-555555555555")
    for code, expected in ((b"", "efi"), (b"\xeb\x63", "bios")):
        head, tail = build_gpt(4 * MIB, [esp], disk_guid="11111111-2222-3333-4444-666666666666", mbr_code=code)
        disk = Memory(head + bytes(4 * MIB - len(head) - len(tail)) + tail)
        report = diskmorph.convert(disk, tmp_path / "vm.ova", options=replace(options(), force=True))
        with open_package(tmp_path / "vm.ova") as package:
            assert package.machines[0].firmware == expected
        assert any("firmware=efi" in note for note in report.notes) == (expected == "efi")
    head, tail = build_gpt(4 * MIB, [esp], disk_guid="11111111-2222-3333-4444-666666666666")
    disk = Memory(head + bytes(4 * MIB - len(head) - len(tail)) + tail)
    diskmorph.convert(disk, tmp_path / "bios.ova", options=options(firmware="bios"))
    with open_package(tmp_path / "bios.ova") as package:
        assert package.machines[0].firmware == "bios"


def test_items_of_written_machines_hang_together(tmp_path, disk):
    diskmorph.convert([disk[1]] * 3, tmp_path / "vm.ova", options=options(controller="ahci", nics="2"))
    root = ET.fromstring(members(tmp_path / "vm.ova")["vm.ovf"])
    items = [
        {child.tag.split("}")[1]: child.text for child in node}
        for node in root.iter(f"{{{OVF1}}}Item")
        if any(child.tag.startswith(f"{{{RASD}}}") for child in node)
    ]
    (controller,) = [i for i in items if i["ResourceType"] == "20"]
    assert all(i["Parent"] == controller["InstanceID"] for i in items if i["ResourceType"] == "17")
    assert len({i["InstanceID"] for i in items}) == len(items)


def test_odd_sizes_round_up_to_a_sector(tmp_path):
    odd = tmp_path / "odd.raw"
    odd.write_bytes(data("odd", MIB + 100))
    diskmorph.convert(odd, tmp_path / "vm.ova", options=options())
    with open_disk(tmp_path / "vm.ova") as found:
        assert found.size == MIB + 512
        assert content(found) == content(grown(Memory(odd.read_bytes()), MIB + 512))
