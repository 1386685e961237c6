"""Each rule of `lint` finds what it is for, in packages that are clean but for one fault."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import pytest
from ovfkit import STREAM, entry, envelope, hardware, item, pax, system

import diskmorph
from diskmorph import ConvertOptions
from diskmorph.convert.lint import ALL, RULES, TARGETS, lint
from diskmorph.formats.errors import OptionError, SourceError, UnsupportedError

from testkit import MIB, little_disk, run

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 3 * MIB
NET = '<NetworkSection><Info>i</Info><Network ovf:name="net"/></NetworkSection>'


@pytest.fixture(scope="module")
def vmdk(tmp_path_factory):
    """A streamOptimized disk in the form that VMware takes."""
    folder = tmp_path_factory.mktemp("vmdk")
    words = ConvertOptions(target_format="vmdk", format_options={"subformat": "streamOptimized"}, sync=False)
    diskmorph.convert(little_disk(SIZE), folder / "d.vmdk", options=words)
    return (folder / "d.vmdk").read_bytes()


def clean(disk: bytes, **changes: str) -> bytes:
    said = {
        "files": f'<File ovf:href="d.vmdk" ovf:id="f1" ovf:size="{len(disk)}"/>',
        "disks": f'<Disk ovf:capacity="{SIZE >> 20}" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="d1" ovf:fileRef="f1" ovf:format="{STREAM}"/>',
        "items": hardware() + item(InstanceID=9, ResourceType=10, Connection="net", ResourceSubType="E1000"),
        "family": "vmx-13",
        "sections": NET,
        "extra": "",
        **changes,
    }
    body = system("box", said["items"], family=said["family"], extra=said["extra"])
    return envelope(said["files"], said["disks"], body, sections=said["sections"])


def manifest(*members: tuple[str, bytes], separator: str = "= ") -> bytes:
    return "".join(f"SHA256({n}){separator}{hashlib.sha256(d).hexdigest()}\n" for n, d in members).encode()


def archive(path: Path, text: bytes, disk: bytes, lines: bytes | None = None) -> Path:
    members = (("x.ovf", text), ("d.vmdk", disk))
    rows = (members[0], ("x.mf", manifest(*members) if lines is None else lines), members[1])
    path.write_bytes(b"".join(entry(n, d) for n, d in rows) + bytes(1024))
    return path


def rules(path: Path, target: str = "esxi") -> list[str]:
    return [finding.rule for finding in lint(path, target).findings]


@pytest.mark.parametrize("target", TARGETS)
def test_what_we_write_is_clean(tmp_path, target):
    for words in ({}, {"firmware": "efi", "cpus": "2"}, {"controller": "ahci"}, {"nics": "0"}):
        path = tmp_path / "own.ova"
        diskmorph.convert(
            little_disk(SIZE + 512), path, options=ConvertOptions(format_options=words, sync=False, force=True)
        )
        assert lint(path, target).findings == ()
    diskmorph.convert(tmp_path / "own.ova", tmp_path / "own.ovf", options=ConvertOptions(sync=False))
    assert lint(tmp_path / "own.ovf", target).findings == ()


@pytest.mark.parametrize("target", TARGETS)
def test_a_clean_package_made_by_hand(tmp_path, vmdk, target):
    assert rules(archive(tmp_path / "x.ova", clean(vmdk), vmdk), target) == []


def faults(disk: bytes) -> dict[str, tuple[bytes, bytes, str, str]]:
    """Name: descriptor, disk, rule, target."""
    footer = disk[:-512]
    old = bytearray(disk)
    old[4] = old[len(disk) - 1024 + 4] = 1
    ide = disk.replace(b'ddb.adapterType = "lsilogic"', b'ddb.adapterType = "ide"     ')
    assert ide != disk
    size = f'ovf:size="{len(disk)}"'
    whole = clean(disk)

    def sized(body: bytes) -> bytes:
        return whole.replace(size.encode(), f'ovf:size="{len(body)}"'.encode())

    other = (
        '<Disk ovf:capacity="{}" ovf:capacityAllocationUnits="{}" ovf:diskId="d1" ovf:fileRef="f1" ovf:format="{}"/>'
    )
    vbox = '<vbox:Machine xmlns:vbox="http://www.virtualbox.org/ovf/machine" {}/>'
    two = system("a", hardware(0)) + system("b", hardware(0))
    return {
        "trailing": (sized(disk + bytes(65536)), disk + bytes(65536), "vmdk-trailing", "esxi"),
        "no end": (sized(footer), footer, "vmdk-trailing", "esxi"),
        "version": (whole, bytes(old), "vmdk-version", "esxi"),
        "adapter": (whole, ide, "vmdk-adapter", "esxi"),
        "no size": (whole.replace(size.encode(), b""), disk, "file-size", "proxmox"),
        "wrong size": (whole.replace(size.encode(), b'ovf:size="5"'), disk, "file-size", "virtualbox"),
        "family": (clean(disk, family="virtualbox-2.2"), disk, "hardware-family", "esxi"),
        "new family": (clean(disk, family="vmx-99"), disk, "hardware-family", "esxi"),
        "units": (clean(disk, disks=other.format(3, "MegaBytes", STREAM)), disk, "capacity-units", "proxmox"),
        "capacity": (clean(disk, disks=other.format(4, "byte * 2^20", STREAM)), disk, "capacity", "aws"),
        "no capacity": (clean(disk, disks=other.format("${x}", "byte", STREAM)), disk, "capacity", "esxi"),
        "format": (clean(disk, disks=other.format(3, "byte * 2^20", "urn:raw")), disk, "disk-format", "esxi"),
        "foreign": (clean(disk, extra=vbox.format("")), disk, "foreign-elements", "esxi"),
        "order": (whole.replace(NET.encode(), b"").replace(b"</Envelope>", NET.encode() + b"</Envelope>"), disk, "envelope-order", "proxmox"),
        "items": (clean(disk, items=hardware().replace("<rasd:Address>0</rasd:Address>", "") .replace("<rasd:Parent>3</rasd:Parent>", "", 1).replace("<rasd:AddressOnParent>0</rasd:AddressOnParent>", "<rasd:Parent>3</rasd:Parent><rasd:AddressOnParent>0</rasd:AddressOnParent>")), disk, "item-order", "esxi"),
        "controller": (clean(disk, items=hardware().replace("lsilogic", "nonsense")), disk, "controller-esxi", "esxi"),
        "paravirtual": (clean(disk, items=hardware().replace("lsilogic", "VirtualSCSI")), disk, "controller-virtualbox", "virtualbox"),
        "no controller": (clean(disk, items=hardware().replace("<rasd:Parent>3</rasd:Parent>", "")), disk, "disk-place", "aws"),
        "seven": (clean(disk, items=hardware().replace("<rasd:AddressOnParent>0<", "<rasd:AddressOnParent>7<")), disk, "disk-place", "esxi"),
        "network": (clean(disk, sections=""), disk, "network", "esxi"),
        "memory": (clean(disk, items=hardware(units="furlong")), disk, "memory", "proxmox"),
        "odd memory": (clean(disk, items=hardware(memory=513)), disk, "memory-multiple", "esxi"),
        "firmware": (clean(disk, family="vmx-07", items=hardware() + '<vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>'), disk, "firmware", "esxi"),
        "machines": (envelope("", "", f'<VirtualSystemCollection ovf:id="c"><Info>i</Info>{two}</VirtualSystemCollection>'), disk, "one-machine", "aws"),
        "version 2": (whole.replace(b"/envelope/1", b"/envelope/2"), disk, "ovf-version", "esxi"),
        "missing": (whole.replace(b"d.vmdk", b"e.vmdk"), disk, "file-missing", "esxi"),
        "href": (whole.replace(b'"d.vmdk"', b'"sub/d.vmdk"'), disk, "href-flat", "proxmox"),
        "gzip": (whole.replace(b"<File ", b'<File ovf:compression="gzip" '), disk, "file-compressed", "aws"),
        "stream": (sized(b"raw" * 1000), b"raw" * 1000, "disk-stream", "esxi"),
    }  # fmt: skip


@pytest.mark.parametrize("name", faults(b"\0" * 1024 + b'ddb.adapterType = "lsilogic"' + b"\0" * 1024))
def test_planted_faults(tmp_path, vmdk, name):
    text, disk, rule, target = faults(vmdk)[name]
    path = archive(tmp_path / "x.ova", text, disk)
    report = lint(path, target)
    found = [finding.rule for finding in report.findings]
    assert rule in found, report.findings
    if name not in {"missing", "href", "gzip", "machines", "stream"}:  # one fault of these is several rules' business
        assert found == [rule], report.findings
    for finding in report.findings:
        assert finding.message
        assert finding.place
        assert finding.hint


def test_a_required_element_may_be_marked(tmp_path, vmdk):
    mark = '<vbox:Machine xmlns:vbox="http://www.virtualbox.org/ovf/machine" ovf:required="false"/>'
    assert rules(archive(tmp_path / "x.ova", clean(vmdk, extra=mark), vmdk)) == []


def test_archive_and_manifest(tmp_path, vmdk):
    text = clean(vmdk)
    members = (("x.ovf", text), ("d.vmdk", vmdk))
    true = manifest(*members)
    ovf, disk, mf = entry("x.ovf", text), entry("d.vmdk", vmdk), entry("x.mf", true)
    cases = {
        "archive-order": disk + ovf + mf,
        "archive-pax": pax(mtime="1.5") + ovf + mf + disk,
        "archive-manifest-place": ovf + disk + mf + entry("readme.txt", b"x"),
        "archive-names": ovf + mf + disk + entry("sub/readme", b"x"),
        "manifest-form": ovf + entry("x.mf", manifest(*members, separator=" = ")) + disk,
        "manifest-digest": ovf + entry("x.mf", manifest(("x.ovf", b"other"), members[1])) + disk,
        "manifest-files": ovf + entry("x.mf", true + b"SHA256(gone)= " + b"0" * 64 + b"\n") + disk,
    }
    for rule, body in cases.items():
        path = tmp_path / "x.ova"
        path.write_bytes(body + bytes(1024))
        assert rules(path) == [rule]
    path.write_bytes(ovf + disk + mf + bytes(1024))  # last is a good place too
    assert rules(path) == []
    path.write_bytes(ovf + entry("x.mf", manifest(members[0])) + disk + bytes(1024))
    (finding,) = lint(path, "esxi").findings
    assert (finding.rule, "d.vmdk" in finding.message) == ("manifest-files", True)


def test_what_cannot_be_read_is_a_finding(tmp_path, vmdk):
    cases = {
        "archive": entry("x.ovf", b"x") * 2 + bytes(1024),
        "descriptor": entry("x.ovf", b"<Envelope xmlns='ovf'>") + bytes(1024),
        "manifest-form": entry("x.ovf", clean(vmdk)) + entry("x.mf", b"junk") + entry("d.vmdk", vmdk) + bytes(1024),
    }
    for rule, body in cases.items():
        path = tmp_path / "x.ova"
        path.write_bytes(body)
        assert rules(path)[:1] == [rule]
    (tmp_path / "d.raw").write_bytes(b"x" * 4096)
    with pytest.raises(UnsupportedError):
        lint(tmp_path / "d.raw", "esxi")
    with pytest.raises(SourceError):
        lint(tmp_path / "none.ova", "esxi")
    with pytest.raises(OptionError, match="unknown target"):
        lint(path, "nowhere")


def test_streams_of_other_makers(tmp_path):
    """qemu-img names the directory in the header and ends in zeroes: one sector of them is right, more or none is not."""
    diskmorph.convert(little_disk(SIZE), tmp_path / "d.raw", options=ConvertOptions(sync=False))
    run(
        "qemu-img",
        "convert",
        "-O",
        "vmdk",
        "-o",
        "subformat=streamOptimized,adapter_type=lsilogic",
        tmp_path / "d.raw",
        tmp_path / "q.vmdk",
    )
    own = (tmp_path / "q.vmdk").read_bytes()
    cut = own.rstrip(b"\0")
    cut += bytes(-len(cut) % 512)
    whole = cut + bytes(512)
    for body, expected in ((own, 1), (cut, 1), (whole, 0), (whole + bytes(65536), 1)):
        found = rules(archive(tmp_path / "x.ova", clean(body), body))
        assert found == ["vmdk-trailing"] * expected
    (finding,) = lint(archive(tmp_path / "x.ova", clean(whole + bytes(512)), whole + bytes(512)), "esxi").findings
    assert re.search(r"512 bytes follow the end", finding.message)


def test_rules_are_data():
    names = [rule.name for rule in RULES]
    assert len(names) == len(set(names))
    assert all(rule.targets and rule.targets <= ALL for rule in RULES)


def test_the_command(tmp_path, vmdk, capsys):
    from diskmorph.cli import main

    path = archive(tmp_path / "x.ova", clean(vmdk, family="virtualbox-2.2"), vmdk)
    assert main(["lint", str(path), "--for", "esxi"]) == 3
    assert "virtualbox-2.2" in capsys.readouterr().out
    assert main(["lint", str(path), "--for", "virtualbox", "--json"]) == 0
    assert main(["lint", str(path), "--for", "mars"]) == 2
