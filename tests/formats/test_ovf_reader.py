"""Descriptors of every dialect, and what must not be believed of them."""

from __future__ import annotations

import time

import pytest
from ovfkit import CIM, OVF09, OVF1, OVF2, RASD, VSSD, envelope, hardware, item, system

from diskmorph.formats.errors import FormatError, PolicyError
from diskmorph.formats.limits import Limits
from diskmorph.formats.machine import EFI
from diskmorph.formats.ovf.reader import read_envelope
from diskmorph.formats.ovf.units import best_unit, unit_factor

MIB = 1 << 20


def read(data: bytes, **limits: int):
    return read_envelope(data, file="x.ovf", limits=Limits(**limits))


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        (None, 1),
        ("byte", 1),
        ("byte * 2^20", MIB),
        ("byte * 2 ^ 20", MIB),
        ("byte*2^30", 1 << 30),
        ("byte * 10^6", 10**6),
        ("byte * 2^10 * 2^10", MIB),
        ("byte * 1024", 1024),
        ("MegaBytes", MIB),
        ("GB", 1 << 30),
        ("kibibytes", 1024),
        ("hertz", None),
        ("byte * ", None),
        ("byte * 2^99", None),
        ("byte * 2^20 junk", None),
        ("bits", None),
    ],
)
def test_units(text, factor):
    assert unit_factor(text) == factor


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (1 << 30, (1, "byte * 2^30")),
        (5 * MIB, (5, "byte * 2^20")),
        (1537, (1537, "byte")),
        (0, (0, "byte")),
        ((1 << 40) + MIB, (MIB + 1, "byte * 2^20")),
    ],
)
def test_best_unit(size, words):
    assert best_unit(size) == words


def test_version_1_with_everything():
    extra = (
        '<OperatingSystemSection ovf:id="96" vmw:osType="debian12_64Guest"><Info>i</Info>'
        "<Description>Debian</Description></OperatingSystemSection>"
        "<AnnotationSection><Info>i</Info><Annotation>a note</Annotation></AnnotationSection>"
        '<ProductSection ovf:class="c" ovf:instance="1"><Info>i</Info>'
        '<Property ovf:key="k" ovf:type="string" ovf:value="v" ovf:userConfigurable="true"><Label>l</Label></Property>'
        "</ProductSection>"
    )
    settings = (
        '<vmw:Config vmw:key="firmware" vmw:value="efi"/>'
        '<vmw:Config vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="true"/>'
    )
    nic = item(InstanceID=20, ResourceType=10, Connection="net", ResourceSubType="E1000", Address="00:11:22:33:44:55")
    body = system("web", hardware() + nic + settings, extra=extra)
    found = read(
        envelope(body=body, sections='<NetworkSection><Info>i</Info><Network ovf:name="net"/></NetworkSection>')
    )
    (machine,) = found.machines
    assert (machine.name, machine.cpus, machine.memory, machine.hardware) == ("web", 2, 512 * MIB, "vmx-13")
    assert (machine.firmware, machine.secure_boot, machine.annotation) == (EFI, True, "a note")
    assert (machine.os.id, machine.os.cim, machine.os.description) == ("debian12_64", 96, "Debian")
    assert [(p.key, p.value, p.label, p.configurable) for p in machine.properties] == [("c.k.1", "v", "l", True)]
    assert [(n.network, n.model, n.mac) for n in machine.nics] == [("net", "E1000", "00:11:22:33:44:55")]
    assert [(d.file, d.virtual_size, d.unit) for d in machine.disks] == [("d.vmdk", MIB, 0)]
    assert machine.controller_of(machine.disks[0]).model == "lsilogic"
    assert found.networks == ("net",)


def test_version_0_9():
    def section(kind: str, body: str) -> str:
        return f'<ovf:Section xsi:type="ovf:{kind}_Type"><ovf:Info>i</ovf:Info>{body}</ovf:Section>'

    def old(*pairs: tuple[str, object]) -> str:
        return "<ovf:Item>" + "".join(f"<rasd:{k}>{v}</rasd:{k}>" for k, v in pairs) + "</ovf:Item>"

    items = (
        "<ovf:System><vssd:InstanceId>0</vssd:InstanceId><vssd:VirtualSystemType>vmx-04</vssd:VirtualSystemType></ovf:System>"
        + old(("Caption", "cpu"), ("InstanceId", 1), ("ResourceType", 3), ("VirtualQuantity", 1))
        + old(("InstanceId", 2), ("ResourceType", 4), ("AllocationUnits", "MegaBytes"), ("VirtualQuantity", 512))
        + old(("InstanceId", 3), ("ResourceType", 5), ("BusNumber", 1))
        + old(("InstanceId", 4), ("ResourceType", 17), ("HostResource", "disk/d1"), ("Parent", 3))
    )
    data = (
        f'<ovf:Envelope xmlns:ovf="{OVF09}" xmlns:rasd="{RASD}" xmlns:vssd="{VSSD}" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" ovf:version="0.9">'
        '<ovf:References><ovf:File ovf:href="d.vmdk" ovf:id="f"/></ovf:References>'
        + section("DiskSection", f'<ovf:Disk ovf:capacity="{MIB}" ovf:diskId="d1" ovf:fileRef="f"/>')
        + '<ovf:Content ovf:id="old" xsi:type="ovf:VirtualSystem_Type"><ovf:Info>i</ovf:Info>'
        + section("VirtualHardwareSection", items)
        + "</ovf:Content></ovf:Envelope>"
    )
    found = read(data.encode())
    (machine,) = found.machines
    assert (found.version, machine.name, machine.cpus, machine.memory) == ("0.9", "old", 1, 512 * MIB)
    assert [(d.file, d.virtual_size) for d in machine.disks] == [("d.vmdk", MIB)]
    assert (machine.controllers[0].bus, machine.controllers[0].address) == ("ide", 1)


def test_version_2_has_storage_and_ports_of_its_own():
    items = hardware(0) + (
        f'<StorageItem xmlns:sasd="{CIM}StorageAllocationSettingData"><sasd:HostResource>ovf:/disk/d1</sasd:HostResource>'
        "<sasd:InstanceID>5</sasd:InstanceID><sasd:Parent>3</sasd:Parent><sasd:ResourceType>17</sasd:ResourceType></StorageItem>"
        f'<EthernetPortItem xmlns:e="{CIM}EthernetPortAllocationSettingData"><e:Connection>n</e:Connection>'
        "<e:InstanceID>6</e:InstanceID><e:ResourceType>10</e:ResourceType></EthernetPortItem>"
    )
    found = read(envelope(body=system("new", items), space=OVF2))
    assert (found.version, found.machines[0].nics[0].network) == ("2", "n")
    assert [d.file for d in found.machines[0].disks] == ["d.vmdk"]


def test_nested_collections_keep_the_document_order():
    inner = (
        '<VirtualSystemCollection ovf:id="in"><Info>i</Info>' + system("b", hardware(0)) + "</VirtualSystemCollection>"
    )
    body = (
        '<VirtualSystemCollection ovf:id="out"><Info>i</Info>'
        + system("a", hardware(0))
        + inner
        + system("c", hardware(0))
        + "</VirtualSystemCollection>"
    )
    assert [m.name for m in read(envelope("", "", body)).machines] == ["a", "b", "c"]


def test_disks_are_numbered_as_machines_have_them_and_the_unused_last():
    files = "".join(f'<File ovf:id="f{i}" ovf:href="{i}.vmdk"/>' for i in (1, 2, 3))
    disks = "".join(f'<Disk ovf:diskId="d{i}" ovf:fileRef="f{i}" ovf:capacity="{i}"/>' for i in (3, 1, 2))
    items = hardware(0) + "".join(
        item(InstanceID=50 + i, ResourceType=17, Parent=3, HostResource=f"ovf:/disk/d{i}") for i in (2, 1)
    )
    found = read(envelope(files, disks, system("m", items)))
    assert list(found.disks) == ["d2", "d1", "d3"]
    assert [(d.number, d.file) for d in found.machines[0].disks] == [(1, "2.vmdk"), (2, "1.vmdk")]


def test_capacity_of_a_property_and_of_one_without_a_value():
    disks = '<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="${%s}" ovf:capacityAllocationUnits="byte * 2^20"/>'
    product = '<ProductSection><Info>i</Info><Property ovf:key="size" ovf:type="uint32"{}/></ProductSection>'
    said = read(envelope(disks=disks % "size", body=system(extra=product.format(' ovf:value="16"'))))
    assert said.disks["d1"].capacity == 16 * MIB
    unsaid = read(envelope(disks=disks % "size", body=system(extra=product.format(""))))
    assert unsaid.disks["d1"].capacity is None
    assert read(envelope(disks=disks % "other", body=system())).disks["d1"].capacity is None


def test_deployment_options_take_the_default_one():
    options = (
        '<DeploymentOptionSection><Info>i</Info><Configuration ovf:id="small"/>'
        '<Configuration ovf:id="large" ovf:default="true"/></DeploymentOptionSection>'
    )
    items = (
        hardware(0, cpus=1)
        + '<Item ovf:configuration="large"><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType>'
        "<rasd:VirtualQuantity>8</rasd:VirtualQuantity></Item>"
        + '<Item ovf:bound="max"><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType>'
        "<rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>"
    )
    assert read(envelope("", "", system("m", items), sections=options)).machines[0].cpus == 8


def test_memory_without_units_is_in_mebibytes_unless_it_cannot_be():
    small = system("m", hardware(0, memory=768, units=None))
    large = system("m", hardware(0, memory=1 << 30, units=None))
    assert read(envelope("", "", small)).machines[0].memory == 768 * MIB
    assert read(envelope("", "", large)).machines[0].memory == 1 << 30


def test_virtualbox_tells_its_firmware_elsewhere():
    vbox = (
        '<vbox:Machine xmlns:vbox="http://www.virtualbox.org/ovf/machine" ovf:required="false">'
        '<vbox:Hardware><vbox:Firmware type="EFI"/></vbox:Hardware></vbox:Machine>'
    )
    assert read(envelope(body=system(extra=vbox))).machines[0].firmware == EFI


def test_elements_of_other_namespaces_are_not_taken_for_ovf():
    other = '<x:VirtualSystem xmlns:x="urn:x" ovf:id="no"><x:Info>i</x:Info></x:VirtualSystem>'
    assert [m.name for m in read(envelope(sections=other)).machines] == ["box"]


def test_utf_16_and_a_byte_order_mark_are_read():
    text = envelope().decode()
    assert read(('<?xml version="1.0" encoding="UTF-16"?>' + text).encode("utf-16")).machines[0].name == "box"
    assert read(b"\xef\xbb\xbf" + text.encode()).machines[0].name == "box"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (envelope()[:-20], "not well-formed"),
        (b"<Envelope/>" * 2, "not well-formed"),
        (b"", "not well-formed"),
        (b"<html/>", "not an OVF descriptor"),
        (envelope(disks='<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="-5"/>'), "capacity"),
        (envelope(disks='<Disk ovf:diskId="d1" ovf:capacity="1e9"/>'), "capacity"),
        (envelope(disks='<Disk ovf:diskId="d1" ovf:capacity="9999999999999999999"/>'), "capacity"),
        (envelope(disks='<Disk ovf:diskId="d1"/>' * 2), "two Disk"),
        (envelope('<File ovf:id="a" ovf:href="x"/>' * 2, ""), "two File"),
        (envelope('<File ovf:id="a"/>', ""), "href"),
        (envelope('<File ovf:id="a" ovf:href="x" ovf:size="-1"/>', ""), "size"),
        (envelope('<File ovf:id="a" ovf:href="x" ovf:chunkSize="0"/>', ""), "chunkSize"),
        (envelope("", ""), "refers to a disk"),
        (envelope("", "", system("m", hardware(0, cpus=0))), "CPUs"),
        (envelope("", "", system("m", hardware(0, memory="x"))), "not a number"),
        (b'<?xml version="1.0" encoding="klingon"?>' + envelope(), "encoding"),
    ],
)
def test_damage_is_an_error_that_names_it(data, says):
    with pytest.raises(FormatError, match=says) as caught:
        read(data)
    assert caught.value.file == "x.ovf"


HOSTILE = {
    "dtd": envelope(prolog='<!DOCTYPE Envelope [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
    "laughs": envelope(prolog='<!DOCTYPE E [<!ENTITY a "' + "ha" * 1000 + '"><!ENTITY b "' + "&a;" * 1000 + '">]>'),
    "external subset": envelope(prolog='<!DOCTYPE E SYSTEM "http://127.0.0.1:9/x.dtd">'),
    "nested": envelope(sections="<x>" * 20_000 + "</x>" * 20_000),
    "huge": envelope(sections="<!--" + "y" * (5 << 20) + "-->"),
    "attributes": envelope(sections="<x " + " ".join(f'a{i}="1"' for i in range(100_000)) + "/>"),
    "elements": envelope(sections="<x/>" * 300_000),
    "name": envelope(sections=f"<{'x' * 100_000}/>"),
    "files": envelope("".join(f'<File ovf:id="{i}" ovf:href="x"/>' for i in range(5000)), ""),
    "machines": envelope("", "", system("m", "") * 5000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptors_end_soon(name):
    begun = time.monotonic()
    with pytest.raises((FormatError, PolicyError)):
        read(HOSTILE[name])
    assert time.monotonic() - begun < 10


def test_a_document_type_is_refused_by_policy():
    with pytest.raises(PolicyError, match="document type"):
        read(HOSTILE["dtd"])
    assert OVF1 in HOSTILE["dtd"].decode()
