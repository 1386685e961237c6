"""Descriptors read: OVF 0.9 to 2.x, leniently (DSP0243; 0.9 is VMware's draft of 2008).

Elements are known by their local names within the namespace of the root; 0.9 tells kinds by `xsi:type`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from diskmorph.formats.errors import FormatError
from diskmorph.formats.machine import (
    BIOS,
    EFI,
    IDE,
    NVME,
    SATA,
    SCSI,
    Controller,
    Machine,
    MachineDisk,
    Nic,
    OperatingSystem,
    Property,
)
from diskmorph.formats.ovf import model as m
from diskmorph.formats.ovf.units import LARGEST, resolve, unit_factor, whole_number
from diskmorph.formats.xmltree import Node, parse_xml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.limits import Limits

_SPACES = (m.OVF1, m.OVF2, m.OVF09)
_HOST_RESOURCE = re.compile(r"(?:ovf:)?/*(disk|file)/(.+)")
_ITEMS = frozenset({"Item", "StorageItem", "EthernetPortItem"})
_MOST_CPUS = 65_536
# Values below it cannot be bytes: no machine has a megabyte of memory. Writers that leave units out mean MiB.
_LEAST_MEMORY = 1 << 20


def read_envelope(data: bytes, *, file: str, limits: Limits) -> m.Envelope:
    """Return what a descriptor says. Raises FormatError, PolicyError (document types)."""
    root = parse_xml(data, file=file, format="ovf", limits=limits)
    if root.name != "Envelope" or (root.space and "ovf" not in root.space.lower()):
        raise FormatError(
            "is not an OVF descriptor", file=file, format="ovf", structure="Envelope", found=f"<{root.name}>"
        )
    return _Reader(root, file, limits).envelope()


class _Reader:
    def __init__(self, root: Node, file: str, limits: Limits) -> None:
        self._root, self._file, self._limits = root, file, limits
        self._spaces = tuple(dict.fromkeys((root.space, *_SPACES)))
        self._option = self._default_option()
        self._properties: dict[str, Property] = {}
        self._files: dict[str, m.FileRef] = {}
        self._disks: dict[str, m.DiskRef] = {}
        self._used: dict[str, m.DiskRef] = {}  # in the order of their numbers
        self._numbers: dict[str, int] = {}

    def envelope(self) -> m.Envelope:
        """Return everything."""
        for node in self._root.walk():
            if self._kind(node) == "ProductSection":
                for key, known in self._product(node):
                    self._properties.setdefault(key, known)
        for references in self._sections(self._root, "References"):
            for node in references.all("File"):
                self._add(self._files, self._file_ref(node), "File", node)
        for section in self._sections(self._root, "DiskSection"):
            for node in section.all("Disk"):
                self._add(self._disks, self._disk_ref(node), "Disk", node)
        machines = tuple(self._machine(node) for node in self._systems())
        for disk in self._disks.values():
            self._number(disk)
        networks = tuple(
            self._attribute(node, "name") or ""
            for section in self._sections(self._root, "NetworkSection")
            for node in section.all("Network")
        )
        return m.Envelope(self._version(), self._files, self._used, networks, machines)

    # What every part needs

    def _fault(self, problem: str, node: Node, field: str | None = None, found: object = None) -> FormatError:
        return FormatError(
            f"{problem}, in line {node.line}",
            file=self._file,
            format="ovf",
            structure=node.name,
            field=field,
            found=found,
        )

    def _attribute(self, node: Node, name: str) -> str | None:
        return node.get(name, *self._spaces)

    def _number_of(self, node: Node, name: str) -> int | None:
        text = self._attribute(node, name)
        if not (text or "").strip():
            return None
        value = whole_number(text)
        if value is None or value > LARGEST:
            raise self._fault(f"{name} is not a number of bytes", node, name, text)
        return value

    def _kind(self, node: Node) -> str:
        """Return what a node is: its name, or in OVF 0.9 the name of its type."""
        if node.space not in self._spaces:
            return ""
        if node.name not in {"Section", "Content"}:
            return node.name
        said = node.attributes.get(f"{{{m.XSI}}}type", "")
        return said.rpartition(":")[2].removesuffix("_Type")

    def _sections(self, parent: Node, kind: str) -> list[Node]:
        return [node for node in parent.children if self._kind(node) == kind]

    def _version(self) -> str:
        if self._root.space == m.OVF1:
            return "1"
        if self._root.space == m.OVF09 or self._root.find("Section") is not None:
            return "0.9"
        found = re.search(r"/envelope/(\d+)", self._root.space)
        return found[1] if found else (self._attribute(self._root, "version") or "0.9").partition(".")[0]

    def _add(self, table: dict[str, m.FileRef] | dict[str, m.DiskRef], entry: object, what: str, node: Node) -> None:
        assert isinstance(entry, m.FileRef | m.DiskRef)  # noqa: S101 - what the callers make
        if entry.id in table:
            raise self._fault(f"has two {what} elements of one id", node, "id", entry.id)
        if len(table) >= self._limits.members:
            raise self._fault(f"has more than {self._limits.members} {what} elements", node)
        table[entry.id] = entry  # type: ignore[assignment]

    # Deployment options (DSP0243 9.8): the default one, else the first, is taken

    def _default_option(self) -> str | None:
        options = [
            node
            for section in self._sections(self._root, "DeploymentOptionSection")
            for node in section.all("Configuration")
        ]
        chosen = [node for node in options if self._attribute(node, "default") in {"true", "1"}] or options
        return self._attribute(chosen[0], "id") if chosen else None

    def _applies(self, node: Node) -> bool:
        said = self._attribute(node, "configuration")
        return said is None or self._option in said.split()

    # References, disks, properties

    def _file_ref(self, node: Node) -> m.FileRef:
        href, key = self._attribute(node, "href"), self._attribute(node, "id")
        if not href or not key:
            raise self._fault("a File lacks its href or id", node)
        chunk = self._number_of(node, "chunkSize")
        if chunk == 0:
            raise self._fault("chunkSize is not a size", node, "chunkSize", chunk)
        packed = self._attribute(node, "compression")
        return m.FileRef(key, href, self._number_of(node, "size"), packed or None, chunk, node.line)

    def _disk_ref(self, node: Node) -> m.DiskRef:
        key = self._attribute(node, "diskId")
        if not key:
            raise self._fault("a Disk lacks its diskId", node)
        units = self._attribute(node, "capacityAllocationUnits")
        return m.DiskRef(
            key,
            self._attribute(node, "fileRef") or None,
            self._capacity(node, units),
            self._attribute(node, "format"),
            self._attribute(node, "parentRef") or None,
            units,
            node.line,
        )

    def _capacity(self, node: Node, units: str | None) -> int | None:
        """Return a disk's size in bytes; None where only the deployment or the disk itself tells."""
        text, factor = self._attribute(node, "capacity"), unit_factor(units)
        said = resolve(text, self._properties) if text else None
        if said is None or factor is None:
            return None
        value = whole_number(said)
        if value is None or value * factor > LARGEST:
            raise self._fault("capacity is not a size", node, "capacity", said)
        return value * factor

    def _product(self, section: Node) -> Iterator[tuple[str, Property]]:
        """Yield each property of a ProductSection under its full key and its bare one (DSP0243 9.5.1)."""
        before, after = self._attribute(section, "class"), self._attribute(section, "instance")
        for node in section.all("Property"):
            bare = self._attribute(node, "key") or ""
            value = self._attribute(node, "value") or self._attribute(node, "defaultValue")
            for option in node.all("Value"):
                if self._applies(option):
                    value = self._attribute(option, "value") or value
            key = ".".join(word for word in (before, bare, after) if word)
            known = Property(
                key,
                value,
                self._attribute(node, "type"),
                node.value("Label"),
                self._attribute(node, "userConfigurable") in {"true", "1"},
            )
            yield key, known
            if bare != key:
                yield bare, known

    # Machines

    def _systems(self) -> list[Node]:
        """Return every VirtualSystem, those of nested collections too, in the document's order."""
        found, stack = [], [self._root]
        while stack:
            node = stack.pop()
            kind = self._kind(node)
            if kind == "VirtualSystem":
                found.append(node)
            if node is self._root or kind == "VirtualSystemCollection":
                stack.extend(reversed(node.children))
        if len(found) > self._limits.members:
            raise self._fault(f"has more than {self._limits.members} machines", self._root)
        return found

    def _machine(self, node: Node) -> Machine:
        key = self._attribute(node, "id") or ""
        hardware = next(iter(self._sections(node, "VirtualHardwareSection")), None)
        system = hardware.find("System") if hardware is not None else None
        name = node.value("Name") or key or (system.value("VirtualSystemIdentifier") if system else None) or "machine"
        note = next((s.value("Annotation") for s in self._sections(node, "AnnotationSection")), None)
        machine = Machine(
            key or name,
            name,
            os=self._system(node),
            hardware=system.value("VirtualSystemType") if system else None,
            properties=tuple(
                known
                for section in self._sections(node, "ProductSection")
                for key, known in self._product(section)
                if key == known.key
            ),
            annotation=note,
        )
        if hardware is None:
            return machine
        return self._with_firmware(self._with_items(machine, hardware), node, hardware)

    def _system(self, node: Node) -> OperatingSystem | None:
        for section in self._sections(node, "OperatingSystemSection"):
            cim = whole_number(self._attribute(section, "id"))
            said = section.attributes.get(f"{{{m.VMW}}}osType") or section.value("OSType")
            return OperatingSystem(said.removesuffix("Guest") if said else None, cim, section.value("Description"))
        return None

    def _with_firmware(self, machine: Machine, node: Node, hardware: Node) -> Machine:
        settings = {}
        for child in hardware.children:
            if child.space == m.VMW and child.name in {"Config", "ExtraConfig"}:
                settings[child.get("key", m.VMW) or ""] = (child.get("value", m.VMW) or "").lower()
        firmware = settings.get("firmware") or _virtualbox_firmware(node)
        secure = settings.get("bootOptions.efiSecureBootEnabled") == "true"
        efi = secure or firmware.startswith(("efi", "uefi"))
        return replace(machine, firmware=EFI if efi else BIOS, secure_boot=secure)

    def _items(self, hardware: Node) -> list[Node]:
        """Return the hardware items that apply; one of the chosen option replaces its namesake (DSP0243 9.8)."""
        found: dict[object, Node] = {}
        for node in hardware.children:
            if node.name not in _ITEMS or node.space not in self._spaces:
                continue
            if not self._applies(node) or self._attribute(node, "bound") not in {None, "normal"}:
                continue
            key = node.value("InstanceID") or node.value("InstanceId")
            special = self._attribute(node, "configuration") is not None
            if key is None or (key in found and not special):
                found[id(node)] = node
            else:
                found[key] = node
        return list(found.values())

    def _with_items(self, machine: Machine, hardware: Node) -> Machine:
        cpus: int | None = None
        memory: int | None = None
        controllers: list[Controller] = []
        nics: list[Nic] = []
        disks: list[MachineDisk] = []
        for node in self._items(hardware):
            kind = whole_number(node.value("ResourceType"))
            if kind == m.CPU and cpus is None:
                cpus = self._quantity(node)
            elif kind == m.MEMORY and memory is None:
                memory = self._memory(node)
            elif kind in {m.IDE_CONTROLLER, m.SCSI_CONTROLLER, m.OTHER_STORAGE}:
                controllers.append(_controller(node, kind))
            elif kind == m.ETHERNET or node.name == "EthernetPortItem":
                nics.append(_nic(node))
            elif (disk := self._machine_disk(node, kind)) is not None:
                disks.append(disk)
        if cpus is not None and not 0 < cpus <= _MOST_CPUS:
            raise self._fault("has an impossible number of CPUs", hardware, "VirtualQuantity", cpus)
        return replace(
            machine,
            cpus=cpus or 1,
            memory=memory,
            controllers=tuple(controllers),
            nics=tuple(nics),
            disks=tuple(disks),
        )

    def _quantity(self, node: Node) -> int | None:
        text = node.value("VirtualQuantity") or node.value("Reservation")
        said = resolve(text, self._properties) if text else None
        if said is None:
            return None
        value = whole_number(said)
        if value is None:
            raise self._fault("a quantity is not a number", node, "VirtualQuantity", said)
        return value

    def _memory(self, node: Node) -> int | None:
        value = self._quantity(node)
        units = node.value("AllocationUnits") or node.value("VirtualQuantityUnits")
        factor = unit_factor(units)
        if value is None or factor is None:
            return None
        if units is None and value < _LEAST_MEMORY:
            factor = 1 << 20
        if value * factor > LARGEST:
            raise self._fault("has an impossible amount of memory", node, "VirtualQuantity", value)
        return value * factor

    def _machine_disk(self, node: Node, kind: int | None) -> MachineDisk | None:
        text = node.value("HostResource")
        found = _HOST_RESOURCE.fullmatch(text) if text else None
        if found is None or kind in {m.CD_DRIVE, m.DVD_DRIVE}:
            return None
        disk = self._referred(found[1], found[2], node)
        file = self._files.get(disk.file) if disk.file is not None else None
        return MachineDisk(
            self._number(disk),
            disk.id,
            file.href if file is not None else None,
            disk.capacity,
            disk.format,
            node.value("Parent"),
            whole_number(node.value("AddressOnParent")),
        )

    def _referred(self, kind: str, key: str, node: Node) -> m.DiskRef:
        if kind == "disk" and key in self._disks:
            return self._disks[key]
        if kind == "file" and key in self._files:
            return m.DiskRef(f"file/{key}", key, None, line=node.line)
        raise self._fault(f"a disk drive refers to a {kind} that is not there", node, "HostResource", key)

    def _number(self, disk: m.DiskRef) -> int:
        self._used.setdefault(disk.id, disk)
        return self._numbers.setdefault(disk.id, len(self._used))


def _virtualbox_firmware(node: Node) -> str:
    for machine in node.all("Machine"):
        hardware = machine.find("Hardware")
        firmware = hardware.find("Firmware") if hardware is not None and machine.space == m.VBOX else None
        if firmware is not None:
            return (firmware.attributes.get("type") or "").lower()
    return ""


def _controller(node: Node, kind: int) -> Controller:
    model = node.value("ResourceSubType")
    bus = {m.IDE_CONTROLLER: IDE, m.SCSI_CONTROLLER: SCSI}.get(kind, SATA)
    if bus == SATA and "nvme" in (model or "").lower():
        bus = NVME
    key = node.value("InstanceID") or node.value("InstanceId") or ""
    return Controller(key, bus, model, whole_number(node.value("Address") or node.value("BusNumber")))


def _nic(node: Node) -> Nic:
    return Nic(
        node.value("ElementName") or node.value("Caption"),
        node.value("Connection"),
        node.value("ResourceSubType"),
        node.value("Address"),
    )
