"""Descriptors written: valid, portable, and read back as what they were made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import xmlschema
from ovfkit import RASD

from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.limits import Limits
from diskmorph.formats.machine import EFI, Machine, Nic, OperatingSystem, Property
from diskmorph.formats.ovf.profile import portable_machine, portable_stem, read_options
from diskmorph.formats.ovf.reader import read_envelope
from diskmorph.formats.ovf.systems import cim_number, vmware_word
from diskmorph.formats.ovf.writer import WrittenDisk, build_envelope, envelope_room

MIB, GIB = 1 << 20, 1 << 30
SCHEMA = xmlschema.XMLSchema(str(Path(__file__).parents[1] / "packages/schema/ovf.xsd"))

CASES = {
    "plain": ({}, [("a.vmdk", 5 * MIB)]),
    "everything": (
        {
            "cpus": "4",
            "memory": "2G",
            "name": 'R&D <"Ztt"> é日',
            "firmware": "efi",
            "secureboot": "on",
            "nics": "2",
            "network": "a & b",
            "os": "debian12_64",
            "hwversion": "19",
            "controller": "pvscsi",
        },
        [("a.vmdk", GIB), ("b.vmdk", 1537 * 512)],
    ),
    "no network": ({"nics": "0", "controller": "ahci"}, [(f"{i}.vmdk", 512) for i in range(30)]),
    "full SCSI": ({}, [(f"{i}.vmdk", MIB) for i in range(15)]),
}


def build(words, disks, old=None):
    machine = portable_machine("vm", disks, read_options(words), old)
    return machine, build_envelope(machine, [WrittenDisk(file, 1234, size) for file, size in disks])


@pytest.mark.parametrize("name", CASES)
def test_valid_and_read_back(name):
    machine, text = build(*CASES[name])
    SCHEMA.validate(text.decode())
    found = read_envelope(text, file="x", limits=Limits()).machines[0]
    for field in ("name", "cpus", "memory", "firmware", "secure_boot", "hardware"):
        assert getattr(found, field) == getattr(machine, field), field
    assert [(d.file, d.virtual_size, d.unit) for d in found.disks] == [
        (d.file, d.virtual_size, d.unit) for d in machine.disks
    ]
    assert [(n.network, n.model) for n in found.nics] == [(n.network, n.model) for n in machine.nics]


def test_the_schema_refuses_what_the_profile_forbids():
    _, text = build({}, [("a.vmdk", MIB)])
    good = text.decode()
    for old, new in (
        ("byte * 2^20</rasd", "byte * 2^20</rasd"),
        ("vmx-13", "virtualbox-2.2"),
        ('ovf:href="a.vmdk"', 'ovf:href="../a.vmdk"'),
        ('ovf:size="1234"', ""),
        ('ovf:fileRef="file1"', 'ovf:fileRef="file9"'),
        ('byte * 2^20" ovf:diskId', 'MegaBytes" ovf:diskId'),
    )[1:]:
        assert old in good
        assert not SCHEMA.is_valid(good.replace(old, new)), old


def test_a_scsi_controller_sits_at_seven():
    machine, _ = build(*CASES["full SCSI"])
    assert [d.unit for d in machine.disks] == [*range(7), *range(8, 16)]
    with pytest.raises(TargetError, match="16 disks"):
        build({}, [("a", MIB)] * 16)


def test_children_of_items_are_alphabetical():
    _, text = build(*CASES["everything"])
    for node in ET.fromstring(text).iter("{http://schemas.dmtf.org/ovf/envelope/1}Item"):
        names = [child.tag for child in node if child.tag.startswith(f"{{{RASD}}}")]
        assert names == sorted(names)


def test_what_a_package_said_is_kept_unless_options_say_otherwise():
    old = Machine(
        "id",
        "old name",
        cpus=3,
        memory=MIB * 768 + 1,
        firmware=EFI,
        secure_boot=True,
        nics=(Nic(network="lan", model="VmxNet3"), Nic(network="wan", model="strange")),
        os=OperatingSystem(None, 96, "Debian GNU/Linux"),
        properties=(Property("k", 'v"<', None, "label", configurable=True),),
        annotation="two\nlines",
        hardware="virtualbox-2.2",
    )
    machine, text = build({}, [("a.vmdk", MIB)], old)
    SCHEMA.validate(text.decode())
    found = read_envelope(text, file="x", limits=Limits()).machines[0]
    assert (found.name, found.cpus, found.memory) == ("old name", 3, 769 * MIB)
    assert (found.firmware, found.secure_boot, found.hardware) == (EFI, True, "vmx-13")
    assert [(n.network, n.model) for n in found.nics] == [("lan", "VmxNet3"), ("wan", "E1000")]
    assert (found.os.cim, found.annotation) == (96, "two\nlines")
    assert found.properties == (replace(old.properties[0], type="string"),)
    machine, _ = build({"firmware": "bios", "nics": "1", "cpus": "8"}, [("a.vmdk", MIB)], old)
    assert (machine.firmware, machine.secure_boot, len(machine.nics), machine.cpus) == ("bios", False, 1, 8)


def test_room_holds_every_size():
    machine = portable_machine("vm", [("a.vmdk", GIB)], read_options({}))
    for size in (0, 512, 9 << 30, 10**15 - 1):
        text = build_envelope(machine, [WrittenDisk("a.vmdk", size, GIB)])
        assert len(text) <= envelope_room(machine, [WrittenDisk("a.vmdk", 0, GIB)])


@pytest.mark.parametrize(
    "words",
    [
        {"cpus": "0"},
        {"cpus": "x"},
        {"memory": "1M"},
        {"memory": "1000000"},
        {"memory": "big"},
        {"name": ""},
        {"name": "a\nb"},
        {"name": "a\x01"},
        {"firmware": "uefi"},
        {"firmware": "bios", "secureboot": "on"},
        {"nics": "11"},
        {"os": "a b"},
        {"hwversion": "3"},
        {"controller": "ide"},
        {"manifest": "md5"},
        {"unknown": "1"},
    ],
)
def test_options_that_are_refused(words):
    with pytest.raises(OptionError):
        read_options(words)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("vm", "vm"),
        ("a disk & <more>", "a-disk-more"),
        ("日本", "vm"),
        ("..", "vm"),
        ("x" * 200, "x" * 64),
        ("a.b_c-d", "a.b_c-d"),
    ],
)
def test_portable_names(name, stem):
    assert portable_stem(name) == stem


@pytest.mark.parametrize(
    ("word", "number", "vmware"),
    [
        ("debian12_64", 96, "debian12_64Guest"),
        ("debian12", 95, "debian12Guest"),
        ("ubuntu64", 94, "ubuntu64Guest"),
        ("rhel9_64", 80, "rhel9_64Guest"),
        ("otherGuest64", 102, "otherGuest64"),
        ("otherGuest", 1, "otherGuest"),
        ("otherLinux64", 101, "otherLinux64Guest"),
        ("windows2019srv_64", 117, "windows2019srv_64Guest"),
        ("nonsense", 1, "nonsenseGuest"),
    ],
)
def test_systems(word, number, vmware):
    assert (cim_number(word), vmware_word(word)) == (number, vmware)
