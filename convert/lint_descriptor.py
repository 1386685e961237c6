"""Rules of `lint` for the descriptor and its disks. Each yields (message, place, hint) for what would be refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from diskmorph.convert import lint_vmdk
from diskmorph.formats.machine import EFI, IDE, NVME, SATA, SCSI
from diskmorph.formats.ovf import model as m
from diskmorph.formats.ovf.units import unit_factor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.convert.lint_facts import Facts, FileFacts
    from diskmorph.formats.machine import Controller, Machine
    from diskmorph.formats.xmltree import Node

    Found = Iterator[tuple[str, str, str]]

_FAMILY = re.compile(r"vmx-([0-9]{1,9})")
_POWER = re.compile(r"byte(\s*\*\s*2\s*\^\s*\d+)?")
_HREF = re.compile(r"[A-Za-z0-9._ ()+-]+")
_ANEW = "write the package anew: `diskmorph convert PKG NEW.ova`"
_NEWEST_FAMILY = 22
_MOST_VOLUMES = 21
_ENVELOPE_RANKS = {"References": 0, "VirtualSystem": 2, "VirtualSystemCollection": 2, "Content": 2, "Strings": 3}
_ESXI_CONTROLLERS = {
    SCSI: {"lsilogic", "lsilogicsas", "buslogic", "virtualscsi"},
    SATA: {"vmware.sata.ahci", "ahci"},
    NVME: {"vmware.nvme.controller"},
}
_VIRTUALBOX_CONTROLLERS = {
    IDE: {"piix3", "piix4", "ich6", ""},
    SCSI: {"lsilogic", "lsilogicsas", "buslogic", ""},
    SATA: {"vmware.sata.ahci", "ahci"},
}


def _line(facts: Facts, line: int) -> str:
    return f"{facts.descriptor} line {line}"


def _machines(facts: Facts) -> tuple[Machine, ...]:
    return facts.envelope.machines if facts.envelope is not None else ()


# --- the descriptor's form


def version(facts: Facts) -> Found:
    """Demand that the descriptor is OVF 1.x."""
    if facts.envelope is not None and facts.root is not None and facts.envelope.version not in {"0.9", "1"}:
        yield (
            f"the descriptor is OVF {facts.envelope.version}; OVF 1 is taken",
            _line(facts, facts.root.line),
            _ANEW,
        )


def envelope_order(facts: Facts) -> Found:
    """Demand that References, sections, one machine or collection and strings come in this order (DSP8023)."""
    if facts.root is None:
        return
    ranks = [(_ENVELOPE_RANKS.get(node.name, 1), node) for node in facts.root.children]
    reach = 0
    for rank, node in ranks:
        if rank < reach:
            yield f"<{node.name}> stands behind what it should precede", _line(facts, node.line), _ANEW
            return
        reach = rank
    if [rank for rank, _ in ranks].count(2) != 1:
        yield "the envelope has not one machine or collection", _line(facts, facts.root.line), _ANEW


def _hardware(facts: Facts) -> Iterator[Node]:
    for node in facts.root.walk() if facts.root is not None else ():
        if node.name == "VirtualHardwareSection":
            yield node


def item_order(facts: Facts) -> Found:
    """Demand that children of hardware items are in alphabetical order: the CIM schema is a sequence."""
    for hardware in _hardware(facts):
        for node in hardware.children:
            if node.name not in {"Item", "System"}:
                continue
            names = [child.name for child in node.children if child.space in {m.RASD, m.VSSD}]
            if names != sorted(names):
                odd = next(a for a, b in zip(names, sorted(names), strict=True) if a != b)
                yield (
                    f"the children of a hardware <{node.name}> are not in alphabetical order, from <{odd}> on",
                    _line(facts, node.line),
                    _ANEW,
                )
                return


def foreign_elements(facts: Facts) -> Found:
    """Demand that elements that are not OVF's own say ovf:required="false"."""
    if facts.root is None:
        return
    known = {facts.root.space, m.RASD, m.VSSD, m.VMW, ""}
    stack = [facts.root]
    while stack:
        node = stack.pop()
        required = node.get("required", facts.root.space, m.OVF1)
        if node.space not in known and required not in {"false", "0"} and not node.space.startswith(m.CIM):
            yield (
                f"<{node.name}> of {node.space} is neither OVF's own nor marked as not required",
                _line(facts, node.line),
                'remove it, or mark it ovf:required="false"',
            )
            return
        if node.space in known:
            stack.extend(reversed(node.children))


# --- files


def hrefs(facts: Facts) -> Found:
    """Demand that files are named by flat, portable names."""
    for file in facts.files:
        if not _HREF.fullmatch(file.ref.href):
            yield (
                f"the file {file.ref.href!r} is not a flat, portable name",
                _line(facts, file.ref.line),
                "put it beside the descriptor, under a name of letters, digits, `.`, `_` and `-`",
            )


def missing_files(facts: Facts) -> Found:
    """Demand that referenced files are there and can be read."""
    for file in facts.files:
        if file.problem is not None:
            yield f"{file.ref.href}: {file.problem}", _line(facts, file.ref.line), "restore the file"


def file_sizes(facts: Facts) -> Found:
    """Demand that `ovf:size` is there and true."""
    for file in facts.files:
        if file.ref.size is None:
            yield (
                f"the size of {file.ref.href} is not said",
                _line(facts, file.ref.line),
                f'say ovf:size="{file.size}"' if file.size is not None else "say ovf:size",
            )
        elif file.size is not None and file.ref.size != file.size:
            yield (
                f"the size of {file.ref.href} is said to be {file.ref.size}, but is {file.size}",
                _line(facts, file.ref.line),
                f'say ovf:size="{file.size}"',
            )


def compressed_files(facts: Facts) -> Found:
    """Demand that files are not compressed around their own format."""
    for file in facts.files:
        if (file.ref.compression or "identity").lower() != "identity":
            yield (
                f"{file.ref.href} is compressed by {file.ref.compression}",
                _line(facts, file.ref.line),
                "decompress it: streamOptimized disks are compressed by themselves",
            )


def chunked_files(facts: Facts) -> Found:
    """Demand that files are whole."""
    for file in facts.files:
        if file.ref.chunk_size:
            yield f"{file.ref.href} is cut into chunks", _line(facts, file.ref.line), "join the chunks to one file"


# --- disks


def _disk_files(facts: Facts) -> Iterator[FileFacts]:
    """Yield the files that disks refer to, each once."""
    if facts.envelope is None:
        return
    used = {disk.file for disk in facts.envelope.disks.values()}
    for file in facts.files:
        if file.ref.id in used and file.size is not None and file.problem is None:
            yield file


def capacity_units(facts: Facts) -> Found:
    """Demand that units are bytes, or bytes times a power of two."""
    for disk in facts.envelope.disks.values() if facts.envelope is not None else ():
        if disk.units is not None and not _POWER.fullmatch(disk.units.strip()):
            yield (
                f"the capacity of {disk.id} is in units of {disk.units!r}, which are not understood",
                _line(facts, disk.line),
                'say ovf:capacityAllocationUnits="byte * 2^20" or another power',
            )


def capacities(facts: Facts) -> Found:
    """Demand that the capacity is said, and what the disk itself says."""
    if facts.envelope is None:
        return
    vmdks = {file.ref.id: file.vmdk for file in _disk_files(facts)}
    for disk in facts.envelope.disks.values():
        known = vmdks.get(disk.file or "")
        if disk.capacity is None and unit_factor(disk.units) is not None and not disk.id.startswith("file/"):
            yield f"the capacity of {disk.id} is not said as a number", _line(facts, disk.line), "say ovf:capacity"
        elif (
            known is not None and disk.capacity is not None and disk.parent is None and known.capacity != disk.capacity
        ):
            yield (
                f"the capacity of {disk.id} is said to be {disk.capacity} bytes, but the disk has {known.capacity}",
                _line(facts, disk.line),
                f'say ovf:capacity="{known.capacity}" ovf:capacityAllocationUnits="byte"',
            )


def disk_formats(facts: Facts) -> Found:
    """Demand that disks are said to be streamOptimized VMDKs."""
    for disk in facts.envelope.disks.values() if facts.envelope is not None else ():
        if disk.file is None or disk.id.startswith("file/"):
            continue
        said = (disk.format or "").lower()
        if "vmdk" not in said:
            yield (
                f"the disk {disk.id} is said to be of the format {disk.format!r}",
                _line(facts, disk.line),
                f'convert it, and say ovf:format="{m.STREAM_OPTIMIZED}"',
            )


def disk_streams(facts: Facts) -> Found:
    """Demand that disks are streamOptimized VMDKs."""
    for file in _disk_files(facts):
        if file.vmdk is None or not file.vmdk.compressed:
            what = f"a {file.format}" if file.vmdk is None and file.format != "vmdk" else "another kind of VMDK"
            yield (
                f"the disk {file.ref.href} is {what}, not a streamOptimized VMDK",
                f"{file.ref.href} byte 0",
                _ANEW,
            )


def vmdk_versions(facts: Facts) -> Found:
    """See lint_vmdk."""
    return _of_vmdks(facts, lint_vmdk.versions)


def vmdk_ends(facts: Facts) -> Found:
    """See lint_vmdk."""
    return _of_vmdks(facts, lint_vmdk.ends)


def vmdk_adapters(facts: Facts) -> Found:
    """See lint_vmdk."""
    return _of_vmdks(facts, lint_vmdk.adapters)


def _of_vmdks(facts: Facts, judge: Callable[[lint_vmdk.Judged], Found]) -> Found:
    for file in _disk_files(facts):
        if file.vmdk is not None:
            yield from judge(lint_vmdk.Judged(file.ref.href, file.size or 0, file.vmdk, _ANEW))


# --- machines


def families(facts: Facts) -> Found:
    """Demand that the hardware is VMware's."""
    for machine in _machines(facts):
        words = re.split(r"[\s,]+", machine.hardware or "")
        numbers = [int(found[1]) for word in words if (found := _FAMILY.fullmatch(word))]
        if not numbers or min(numbers) > _NEWEST_FAMILY:
            yield (
                f"the hardware family {machine.hardware or '(none)'} of {machine.name} is not known: vmx-13 is",
                f"machine {machine.name}",
                "say vmx-13 as vssd:VirtualSystemType",
            )


def one_machine(facts: Facts) -> Found:
    """Demand that the package has one machine."""
    count = len(_machines(facts))
    if facts.envelope is not None and count != 1:
        yield f"the package has {count} machines; one is taken", facts.descriptor, "make a package for each"


def _bad_controllers(facts: Facts, known: dict[str, set[str]]) -> Iterator[tuple[Machine, Controller]]:
    for machine in _machines(facts):
        used = {disk.controller for disk in machine.disks}
        for controller in machine.controllers:
            if controller.id not in used:
                continue
            models = known.get(controller.bus)
            if models is None or (controller.model or "").lower() not in models:
                yield machine, controller


def controllers_esxi(facts: Facts) -> Found:
    """Demand that disks hang on controllers that ESXi has."""
    for machine, controller in _bad_controllers(
        facts, {**_ESXI_CONTROLLERS, IDE: {(c or "").lower() for c in _ide(facts)}}
    ):
        yield (
            f"the controller {controller.model or controller.bus} of {machine.name} is not known",
            f"machine {machine.name}, item {controller.id}",
            "say lsilogic, VirtualSCSI or vmware.sata.ahci as ResourceSubType",
        )


def _ide(facts: Facts) -> Iterator[str | None]:
    """Yield the models of IDE controllers: ESXi takes any."""
    for machine in _machines(facts):
        for controller in machine.controllers:
            if controller.bus == IDE:
                yield controller.model


def controllers_virtualbox(facts: Facts) -> Found:
    """Demand that disks hang on controllers that VirtualBox has: not VMware's paravirtual one, nor NVMe."""
    for machine, controller in _bad_controllers(facts, _VIRTUALBOX_CONTROLLERS):
        yield (
            f"the controller {controller.model or controller.bus} of {machine.name} is not known",
            f"machine {machine.name}, item {controller.id}",
            "say lsilogic or AHCI as ResourceSubType",
        )


def disk_places(facts: Facts) -> Found:
    """Demand that each disk hangs on a controller that is there, at a place of its own."""
    for machine in _machines(facts):
        taken: set[tuple[str | None, int | None]] = set()
        for disk in machine.disks:
            controller = machine.controller_of(disk)
            place = (disk.controller, disk.unit)
            if controller is None:
                problem = f"the disk {disk.id} of {machine.name} hangs on no controller"
            elif disk.unit is not None and place in taken:
                problem = f"the disk {disk.id} of {machine.name} has the place of another"
            elif controller.bus == SCSI and disk.unit == 7:
                problem = f"the disk {disk.id} of {machine.name} has the place of its controller, 7"
            else:
                taken.add(place)
                continue
            yield problem, f"machine {machine.name}, disk {disk.id}", "mend Parent and AddressOnParent of its item"


def networks(facts: Facts) -> Found:
    """Demand that network cards are plugged into networks that the descriptor declares."""
    if facts.envelope is None:
        return
    for machine in _machines(facts):
        for nic in machine.nics:
            if nic.network is not None and nic.network not in facts.envelope.networks:
                yield (
                    f"a network card of {machine.name} is plugged into {nic.network!r}, which is not declared",
                    f"machine {machine.name}",
                    "declare it in the NetworkSection",
                )


def memory(facts: Facts) -> Found:
    """Demand that memory is said."""
    for machine in _machines(facts):
        if not machine.memory:
            yield (
                f"the memory of {machine.name} is not said in units that are understood",
                f"machine {machine.name}",
                'say it as an item of ResourceType 4 with AllocationUnits "byte * 2^20"',
            )


def memory_multiple(facts: Facts) -> Found:
    """Demand that memory comes in steps of 4 MiB."""
    for machine in _machines(facts):
        if machine.memory and machine.memory % (4 << 20):
            yield (
                f"the memory of {machine.name}, {machine.memory} bytes, is no multiple of 4 MiB",
                f"machine {machine.name}",
                "round it up",
            )


def firmware(facts: Facts) -> Found:
    """Demand that the hardware is new enough: 8 for EFI, 13 for secure boot."""
    for machine in _machines(facts):
        found = _FAMILY.search(machine.hardware or "")
        needs = 13 if machine.secure_boot else 8 if machine.firmware == EFI else 0
        if found is not None and int(found[1]) < needs:
            what = "secure boot" if machine.secure_boot else "EFI"
            yield (
                f"{machine.name} wants {what}, which hardware {machine.hardware} does not have",
                f"machine {machine.name}",
                f"say vmx-{needs:02d} or newer",
            )


def volumes(facts: Facts) -> Found:
    """Demand that there are at most 21 volumes."""
    for machine in _machines(facts):
        if len(machine.disks) > _MOST_VOLUMES:
            yield (
                f"{machine.name} has {len(machine.disks)} disks; at most {_MOST_VOLUMES} are taken",
                f"machine {machine.name}",
                "import the others as snapshots",
            )
