"""`Machine`: what a package says of a virtual machine. One model for OVF, AMI, Vagrant and others.

Sizes are in bytes. What a package does not say is None, or the default that readers of that package assume.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BIOS, EFI = "bios", "efi"

IDE, SCSI, SATA, NVME, OTHER = "ide", "scsi", "sata", "nvme", "other"
"""Buses of controllers."""


@dataclass(frozen=True, slots=True)
class Controller:
    """A disk controller: `bus` is one of the buses above, `model` the package's own word for it (`lsilogic`)."""

    id: str
    bus: str
    model: str | None = None
    address: int | None = None


@dataclass(frozen=True, slots=True)
class MachineDisk:
    """A disk of a machine.

    `number` counts the package's disks from 1; `id` is the package's name of it. `file` is the member that holds it,
    None where it begins empty. `virtual_size` is the disk's size as the package says it (None: only the file knows),
    `controller` the id of one of the machine's, `unit` its place there.
    """

    number: int
    id: str
    file: str | None = None
    virtual_size: int | None = None
    format: str | None = None
    controller: str | None = None
    unit: int | None = None


@dataclass(frozen=True, slots=True)
class Nic:
    """A network card: the network that it is plugged into, its model and address, as far as said."""

    name: str | None = None
    network: str | None = None
    model: str | None = None
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class OperatingSystem:
    """What runs in a machine: `id` is VMware's word (`debian12_64`), `cim` the number of CIM_OperatingSystem.OSType."""

    id: str | None = None
    cim: int | None = None
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Property:
    """A setting that a package hands to its machine."""

    key: str
    value: str | None = None
    type: str | None = None
    label: str | None = None
    configurable: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual machine. `memory` in bytes; `hardware` is the family that it was made for (`vmx-13`)."""

    id: str
    name: str
    cpus: int = 1
    memory: int | None = None
    firmware: str = BIOS
    secure_boot: bool = False
    architecture: str | None = None
    disks: tuple[MachineDisk, ...] = ()
    controllers: tuple[Controller, ...] = ()
    nics: tuple[Nic, ...] = ()
    os: OperatingSystem | None = None
    hardware: str | None = None
    properties: tuple[Property, ...] = ()
    annotation: str | None = None

    def controller_of(self, disk: MachineDisk) -> Controller | None:
        """Return the controller that a disk hangs on, if it hangs on one."""
        return next((one for one in self.controllers if one.id == disk.controller), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the machine as `info --json` shows it (docs/json.md)."""
        said = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}
