"""What a disk tells of the machine that it boots: firmware and architecture, by its partition table alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diskmorph.formats import gpt
from diskmorph.formats.errors import DiskmorphError

if TYPE_CHECKING:
    from diskmorph.formats.disk import Disk

_ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
_GIB = 1 << 30
_CODE = 440  # of an MBR's boot code

# Discoverable Partitions Specification: root and /usr partitions
_ARCHITECTURES = {
    "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709": "x86_64",
    "8484680C-9521-48C6-9C11-B0720656F69E": "x86_64",
    "44479540-F297-41B2-9AF7-D131D5F0458A": "i686",
    "B921B045-1DF0-41C3-AF44-4C6F280D3FAE": "aarch64",
    "B0E01050-EE5F-4390-949A-9101B17104E9": "aarch64",
    "69DAD710-2CE4-4E3C-B16C-21A1D49ABED3": "armv7l",
    "72EC70A6-CF74-40E6-BD49-4BDA08E8F224": "riscv64",
    "C31C45E6-3F39-412E-80FB-4809C4980599": "ppc64le",
    "5EEAD9A9-FE09-4A1E-A1D7-520D00531306": "s390x",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """How a disk can boot. `architecture` by the kernel's names (x86_64); `known` says whether the disk tells it."""

    efi: bool
    bios: bool
    architecture: str = "x86_64"
    known: bool = False

    @property
    def firmware(self) -> str:
        """The firmware to give the machine: "bios" wherever that may do."""
        return "uefi" if self.efi and not self.bios else "bios"


def facts_of(disk: Disk) -> Facts:
    """Look at the partition table and the boot code; a disk that cannot be read this far tells nothing."""
    try:
        table = gpt.read_table(disk)
        code = disk.read(0, _CODE) if disk.size >= _CODE else b""
    except DiskmorphError:
        return Facts(efi=False, bios=False)
    if table is None:
        return Facts(efi=False, bios=any(code))
    types = [partition.type.upper() for partition in table.partitions]
    found = next((_ARCHITECTURES[one] for one in types if one in _ARCHITECTURES), None)
    efi = any(one in {_ESP, "0XEF"} for one in types)
    bios = any(code) or _BIOS_BOOT in types
    return Facts(efi, bios, found or "x86_64", found is not None)


def glance_properties(disk: Disk) -> dict[str, str]:
    """Return the image properties that OpenStack needs to run a disk as it is meant (Glance's common properties)."""
    facts = facts_of(disk)
    properties = {
        "hw_disk_bus": "virtio",
        "hw_vif_model": "virtio",
        "hw_firmware_type": facts.firmware,
        "hw_machine_type": _machine_type(facts),
        "min_disk": str(-(-disk.size // _GIB)),
    }
    if facts.known:
        properties["architecture"] = facts.architecture
    return properties


def _machine_type(facts: Facts) -> str:
    if facts.architecture in {"aarch64", "armv7l", "riscv64"}:
        return "virt"
    return "q35" if facts.firmware == "uefi" else "pc"


def remarks(name: str, disk: Disk) -> tuple[str, ...]:
    """Return what a user must know of how the product called `name` (of `--for`) boots this disk."""
    facts = facts_of(disk)
    if name in {"hyperv", "azure"}:
        generation = 2 if facts.efi else 1
        why = "has an EFI system partition" if facts.efi else "has no EFI system partition"
        also = " (or 1: it has BIOS boot code too)" if facts.efi and facts.bios else ""
        return (f"choose a machine of generation {generation}{also}: the disk {why}",)
    if name in {"incus", "gcp"} and not facts.efi:
        return ("the disk has no EFI system partition: machines boot it by BIOS only",)
    if name == "vagrant-libvirt" and facts.firmware == "uefi":
        return ("the disk boots by UEFI only: set libvirt.loader in the Vagrantfile that uses the box",)
    return ()
