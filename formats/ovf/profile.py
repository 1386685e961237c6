"""The portable machine: what a new package describes, from the `-o` words and, where there is one, an older machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diskmorph.formats.allocator import OptionReader, parse_size
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.machine import BIOS, EFI, SATA, SCSI, Controller, Machine, MachineDisk, Nic, OperatingSystem
from diskmorph.formats.ovf.manifest import ALGORITHMS
from diskmorph.formats.ovf.model import STREAM_OPTIMIZED
from diskmorph.formats.ovf.systems import is_system
from diskmorph.formats.xmltree import is_xml_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
DEFAULT_MEMORY = GIB
DEFAULT_HARDWARE = 13
_MOST_CPUS, _MOST_MEMORY, _MOST_NICS = 768, 24 * TIB, 10

# -o controller: bus, ResourceSubType, places for disks; a SCSI controller itself sits at 7.
_CONTROLLERS = {
    "lsilogic": (SCSI, "lsilogic", [*range(7), *range(8, 16)]),
    "pvscsi": (SCSI, "VirtualSCSI", [*range(7), *range(8, 16)]),
    "ahci": (SATA, "vmware.sata.ahci", list(range(30))),
}
_NIC_MODELS = {"e1000": "E1000", "e1000e": "E1000e", "vmxnet3": "VmxNet3", "pcnet32": "PCNet32"}
_UNPORTABLE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_STEM = 64


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """The `-o` words of a new package, checked; None where nothing was said."""

    cpus: int | None
    memory: int | None
    name: str | None
    firmware: str | None
    secure_boot: bool | None
    nics: int | None
    network: str | None
    os: str | None
    hardware: int
    controller: str
    manifest: str


def read_options(words: Mapping[str, str]) -> MachineOptions:
    """Return the checked words. Raises OptionError."""
    said = OptionReader("ova", words)
    firmware = said.text("firmware", BIOS, (BIOS, EFI)) if "firmware" in words else None
    secure = said.flag("secureboot") if "secureboot" in words else None
    if secure and firmware == BIOS:
        raise OptionError("ova option secureboot=on goes with firmware=efi only")
    options = MachineOptions(
        cpus=said.number("cpus", 1, least=1, most=_MOST_CPUS) if "cpus" in words else None,
        memory=_memory(said.text("memory", "")) if "memory" in words else None,
        name=_name(said.text("name", "")) if "name" in words else None,
        firmware=EFI if secure else firmware,
        secure_boot=secure,
        nics=said.number("nics", 1, least=0, most=_MOST_NICS) if "nics" in words else None,
        network=_name(said.text("network", "")) if "network" in words else None,
        os=_system(said.text("os", "")) if "os" in words else None,
        hardware=said.number("hwversion", DEFAULT_HARDWARE, least=4, most=99),
        controller=said.text("controller", "lsilogic", tuple(_CONTROLLERS)),
        manifest=said.text("manifest", "sha256", ALGORITHMS),
    )
    said.done()
    return options


def _memory(text: str) -> int:
    size = parse_size(text, "ova option memory")
    if size % MIB or not 4 * MIB <= size <= _MOST_MEMORY:
        raise OptionError(f"ova option memory={text} is out of range", hint="whole MiB from 4M to 24T")
    return size


def _name(text: str) -> str:
    if not text.strip() or not is_xml_text(text) or len(text) > 256 or any(c in text for c in "\t\n\r"):
        raise OptionError("ova option name is empty, too long or has control characters")
    return text


def _system(text: str) -> str:
    if not is_system(text):
        raise OptionError(f"ova option os={text} is not the name of a system", hint="such as debian12_64")
    return text


def portable_stem(name: str) -> str:
    """Return a file name's stem with nothing in it but ASCII letters, digits, `.`, `_` and `-`."""
    stem = _UNPORTABLE.sub("-", name).strip("-.")[:_LONGEST_STEM].strip("-.")
    return stem or "vm"


def portable_machine(
    name: str, disks: Sequence[tuple[str, int]], options: MachineOptions, old: Machine | None = None
) -> Machine:
    """Return the machine that a new package describes: one controller, and all disks, (file, size in bytes), on it.

    What neither the options nor the `old` machine say is a portable default; `name` is that of the target. Raises
    TargetError where the controller has no place for so many disks.
    """
    bus, model, places = _CONTROLLERS[options.controller]
    if len(disks) > len(places):
        raise TargetError(
            f"has no place for {len(disks)} disks on one {options.controller} controller",
            file=name,
            expected=f"at most {len(places)}",
            found=len(disks),
        )
    base = old or Machine("", name)
    called = options.name or (old.name if old is not None else name)
    controller = Controller("controller", bus, model, 0)
    attached = tuple(
        MachineDisk(number, f"vmdisk{number}", file, size, STREAM_OPTIMIZED, controller.id, places[number - 1])
        for number, (file, size) in enumerate(disks, 1)
    )
    firmware = options.firmware or base.firmware
    secure = options.secure_boot if options.secure_boot is not None else base.secure_boot and firmware == EFI
    return replace(
        base,
        id=called,
        name=called,
        cpus=options.cpus or base.cpus,
        memory=options.memory or _whole(base.memory) or DEFAULT_MEMORY,
        firmware=firmware,
        secure_boot=secure,
        disks=attached,
        controllers=(controller,),
        nics=_nics(options, old),
        os=OperatingSystem(options.os) if options.os else base.os,
        hardware=f"vmx-{options.hardware:02d}",
    )


def _whole(memory: int | None) -> int | None:
    return None if memory is None else -(-memory // MIB) * MIB


def _nics(options: MachineOptions, old: Machine | None) -> tuple[Nic, ...]:
    known = old.nics if old is not None else ()
    count = options.nics if options.nics is not None else len(known) if old is not None else 1
    nics = []
    for number in range(count):
        was = known[number] if number < len(known) else None
        network = options.network or (was.network if was is not None else None) or "VM Network"
        model = _NIC_MODELS.get((was.model or "").lower() if was is not None else "", "E1000")
        nics.append(Nic(network=network, model=model))
    return tuple(nics)
