"""Descriptors written: OVF 1.x, valid by DSP8023, in the portable profile that VMware, VirtualBox and Proxmox take.

Children of hardware items stand in alphabetical order, units are bytes times powers of two, everything that is not
OVF's own is marked `ovf:required="false"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diskmorph.formats.errors import TargetError
from diskmorph.formats.machine import EFI, SATA
from diskmorph.formats.ovf import model as m
from diskmorph.formats.ovf.systems import OTHER_64, cim_number, vmware_word
from diskmorph.formats.ovf.units import best_unit
from diskmorph.formats.xmltree import escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from diskmorph.formats.machine import Controller, Machine, Nic, Property

_MIB = 1 << 20
_NAMESPACES = " ".join(
    f'{word}="{space}"'
    for word, space in (
        ("xmlns", m.OVF1),
        ("xmlns:ovf", m.OVF1),
        ("xmlns:rasd", m.RASD),
        ("xmlns:vssd", m.VSSD),
        ("xmlns:vmw", m.VMW),
    )
)
_FIRST_NIC = 7  # AddressOnParent of the first network card, as VMware numbers them
WIDEST_SIZE = 10**15 - 1
"""A file size whose digits no size of a file has more of: what room is reserved for."""


@dataclass(frozen=True, slots=True)
class WrittenDisk:
    """A disk of a new package: the name and the size of its file, the size that the guest sees, all in bytes."""

    file: str
    file_size: int
    capacity: int


def build_envelope(machine: Machine, disks: Sequence[WrittenDisk]) -> bytes:
    """Return the descriptor of one machine; its `disks` say where each hangs, `disks` here which file it is.

    Raises TargetError for names that are not UTF-8.
    """
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f"<Envelope {_NAMESPACES}>",
        *_references(disks),
        *_disk_section(disks),
        *_network_section(machine.nics),
        *_system(machine),
        "</Envelope>",
        "",
    ]
    try:
        return "\n".join(lines).encode()
    except UnicodeEncodeError as error:
        found = error.object[max(error.start - 20, 0) : error.end + 20]
        raise TargetError("a name that is not UTF-8 cannot stand in an OVF descriptor", found=found) from None


def envelope_room(machine: Machine, disks: Sequence[WrittenDisk]) -> int:
    """Return bytes that the descriptor never exceeds, whatever the sizes of the files turn out to be."""
    widest = [WrittenDisk(disk.file, WIDEST_SIZE, disk.capacity) for disk in disks]
    return len(build_envelope(machine, widest))


def _element(name: str, text: object, attributes: str = "") -> str:
    return f"<{name}{attributes}>{escape(str(text))}</{name}>"


def _references(disks: Sequence[WrittenDisk]) -> list[str]:
    files = [
        f'    <File ovf:href="{escape(disk.file)}" ovf:id="file{number}" ovf:size="{disk.file_size}"/>'
        for number, disk in enumerate(disks, 1)
    ]
    return ["  <References>", *files, "  </References>"]


def _disk_section(disks: Sequence[WrittenDisk]) -> list[str]:
    lines = []
    for number, disk in enumerate(disks, 1):
        count, unit = best_unit(disk.capacity)
        lines.append(
            f'    <Disk ovf:capacity="{count}" ovf:capacityAllocationUnits="{unit}" ovf:diskId="vmdisk{number}" '
            f'ovf:fileRef="file{number}" ovf:format="{m.STREAM_OPTIMIZED}"/>'
        )
    return ["  <DiskSection>", "    <Info>Virtual disks</Info>", *lines, "  </DiskSection>"]


def _network_section(nics: Sequence[Nic]) -> list[str]:
    names = dict.fromkeys(nic.network or "VM Network" for nic in nics)
    if not names:
        return []
    lines = []
    for name in names:
        lines += [
            f'    <Network ovf:name="{escape(name)}">',
            f"      {_element('Description', f'The network {name}')}",
            "    </Network>",
        ]
    return ["  <NetworkSection>", "    <Info>Networks</Info>", *lines, "  </NetworkSection>"]


def _system(machine: Machine) -> list[str]:
    return [
        f'  <VirtualSystem ovf:id="{escape(machine.name)}">',
        "    <Info>A virtual machine</Info>",
        f"    {_element('Name', machine.name)}",
        *_operating_system(machine),
        *_annotation(machine),
        *_product(machine.properties),
        *_hardware(machine),
        "  </VirtualSystem>",
    ]


def _operating_system(machine: Machine) -> list[str]:
    word = machine.os.id if machine.os is not None and machine.os.id else None
    number = cim_number(word) if word else OTHER_64
    if word is None and machine.os is not None and machine.os.cim is not None:
        number = machine.os.cim
    said = f' vmw:osType="{escape(vmware_word(word))}"' if word else ""
    lines = [f'    <OperatingSystemSection ovf:id="{number}"{said}>', "      <Info>The guest's operating system</Info>"]
    if machine.os is not None and machine.os.description:
        lines.append(f"      {_element('Description', machine.os.description)}")
    return [*lines, "    </OperatingSystemSection>"]


def _annotation(machine: Machine) -> list[str]:
    if not machine.annotation:
        return []
    return [
        '    <AnnotationSection ovf:required="false">',
        "      <Info>A note on the machine</Info>",
        f"      {_element('Annotation', machine.annotation)}",
        "    </AnnotationSection>",
    ]


def _product(properties: Iterable[Property]) -> list[str]:
    lines = []
    for known in properties:
        value = f' ovf:value="{escape(known.value)}"' if known.value is not None else ""
        line = (
            f'      <Property ovf:key="{escape(known.key)}" ovf:type="{escape(known.type or "string")}" '
            f'ovf:userConfigurable="{"true" if known.configurable else "false"}"{value}'
        )
        lines.append(f"{line}>{_element('Label', known.label)}</Property>" if known.label else f"{line}/>")
    if not lines:
        return []
    return [
        '    <ProductSection ovf:required="false">',
        "      <Info>Settings of the machine</Info>",
        *lines,
        "    </ProductSection>",
    ]


def _hardware(machine: Machine) -> list[str]:
    return [
        "    <VirtualHardwareSection>",
        "      <Info>Virtual hardware</Info>",
        "      <System>",
        f"        {_element('vssd:ElementName', 'Virtual Hardware Family')}",
        f"        {_element('vssd:InstanceID', 0)}",
        f"        {_element('vssd:VirtualSystemIdentifier', machine.name)}",
        f"        {_element('vssd:VirtualSystemType', machine.hardware)}",
        "      </System>",
        *_items(machine),
        *_settings(machine),
        "    </VirtualHardwareSection>",
    ]


def _items(machine: Machine) -> list[str]:
    items: list[dict[str, object]] = [_cpus(machine), _memory(machine)]
    items += [_controller(controller) for controller in machine.controllers]
    ids = {
        controller.id: number
        for number, controller in enumerate(machine.controllers, len(items) - len(machine.controllers) + 1)
    }
    for disk in machine.disks:
        items.append(
            {
                "AddressOnParent": disk.unit,
                "ElementName": f"Hard disk {disk.number}",
                "HostResource": f"ovf:/disk/{disk.id}",
                "Parent": ids[disk.controller or ""],
                "ResourceType": m.DISK_DRIVE,
            }
        )
    items += [_nic(nic, number) for number, nic in enumerate(machine.nics)]
    lines = []
    for number, item in enumerate(items, 1):
        children = [
            f"        {_element(f'rasd:{name}', value)}"
            for name, value in sorted({**item, "InstanceID": number}.items())
        ]
        lines += ["      <Item>", *children, "      </Item>"]
    return lines


def _cpus(machine: Machine) -> dict[str, object]:
    return {
        "AllocationUnits": "hertz * 10^6",
        "Description": "Number of virtual CPUs",
        "ElementName": f"{machine.cpus} virtual CPU(s)",
        "ResourceType": m.CPU,
        "VirtualQuantity": machine.cpus,
    }


def _memory(machine: Machine) -> dict[str, object]:
    size = (machine.memory or 0) // _MIB
    return {
        "AllocationUnits": "byte * 2^20",
        "Description": "Memory size",
        "ElementName": f"{size} MiB of memory",
        "ResourceType": m.MEMORY,
        "VirtualQuantity": size,
    }


def _controller(controller: Controller) -> dict[str, object]:
    kind = m.OTHER_STORAGE if controller.bus == SATA else m.SCSI_CONTROLLER
    return {
        "Address": controller.address or 0,
        "Description": "SATA controller" if controller.bus == SATA else "SCSI controller",
        "ElementName": f"{controller.bus.upper()} controller {controller.address or 0}",
        "ResourceSubType": controller.model,
        "ResourceType": kind,
    }


def _nic(nic: Nic, number: int) -> dict[str, object]:
    network = nic.network or "VM Network"
    return {
        "AddressOnParent": _FIRST_NIC + number,
        "AutomaticAllocation": "true",
        "Connection": network,
        "Description": f"{nic.model} network card on {network}",
        "ElementName": f"Network card {number + 1}",
        "ResourceSubType": nic.model,
        "ResourceType": m.ETHERNET,
    }


def _settings(machine: Machine) -> list[str]:
    said = {}
    if machine.firmware == EFI:
        said["firmware"] = "efi"
    if machine.secure_boot:
        said["bootOptions.efiSecureBootEnabled"] = "true"
    return [
        f'      <vmw:Config ovf:required="false" vmw:key="{key}" vmw:value="{value}"/>' for key, value in said.items()
    ]
