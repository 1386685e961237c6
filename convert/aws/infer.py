"""What kind of machine a disk boots on: architecture, boot mode, root device; read from the disk itself.

Only fixed places are read: the partition table, the EFI system partition's boot programs, boot code, and where these
leave the architecture open, the head of a kernel in an ext root file system.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diskmorph.formats.errors import DiskmorphError, OptionError
from diskmorph.formats.fsprobe import probe
from diskmorph.formats.gpt import read_table
from diskmorph.formats.views import Slice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.gpt import Partition, PartitionTable
    from diskmorph.formats.machine import Machine
    from diskmorph.formats.tree import Node

BIOS, UEFI, HYBRID = "legacy-bios", "uefi", "uefi-preferred"
BOOT_MODES = (BIOS, UEFI, HYBRID)
ARCHITECTURES = ("x86_64", "arm64", "i386")

_ESP = frozenset({"C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "0xef"})
_BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
_LEGACY_BOOTABLE = 1 << 2
"""GPT attribute bit 2 (UEFI 5.3.3): the partition that BIOS boot code is to start."""
# PE/COFF, "Machine Types"
_MACHINES = {0x8664: "x86_64", 0xAA64: "arm64", 0x014C: "i386"}
_BOOT_NAMES = {b"bootx64.efi": "x86_64", b"bootaa64.efi": "arm64", b"bootia32.efi": "i386"}
_MOST_PROGRAMS = 16


@dataclass(frozen=True, slots=True)
class Found:
    """What a disk says of the machine that it boots on; None is unknown. `why` tells what each follows from."""

    architecture: str | None = None
    boot_mode: str | None = None
    root_device: str = "/dev/xvda"
    why: tuple[str, ...] = ()


def infer(disk: Disk, machine: Machine | None = None) -> Found:
    """Return what a disk says, and where that says nothing, what its package says. Damage makes nothing known."""
    try:
        table = read_table(disk)
    except DiskmorphError:
        table = None
    found = _of_table(disk, table) if table is not None else Found(why=("no partition table",))
    if machine is None:
        return found
    if found.boot_mode is None and table is not None:
        mode = UEFI if machine.firmware == "efi" else BIOS
        found = replace(found, boot_mode=mode, why=(*found.why, f"the package says {machine.firmware}"))
    if found.architecture is None and found.boot_mode is not None:
        said = machine.architecture if machine.architecture in ARCHITECTURES else "x86_64"
        found = replace(found, architecture=said, why=(*found.why, "the package's architecture"))
    return found


def require(found: Found, architecture: str | None, boot_mode: str | None, root_device: str | None) -> Found:
    """Return what was found with the user's own words over it. Raises OptionError for what is unknown or impossible."""
    result = replace(
        found,
        architecture=architecture or found.architecture,
        boot_mode=boot_mode or found.boot_mode,
        root_device=root_device or found.root_device,
    )
    missing = [
        word for word, value in (("--boot-mode", result.boot_mode), ("--arch", result.architecture)) if value is None
    ]
    if missing:
        seen = f" ({', '.join(found.why)})" if found.why else ""
        raise UnknownMachineError(f"the disk does not say what it boots on{seen}", hint=f"say {' and '.join(missing)}")
    if result.architecture == "arm64" and result.boot_mode == BIOS:
        raise OptionError("arm64 machines do not boot in legacy-bios mode", hint="say --boot-mode uefi")
    return result


class UnknownMachineError(DiskmorphError):
    """The disk does not say which machine it boots on, nor did the user."""

    kind = "unsupported"


def _of_table(disk: Disk, table: PartitionTable) -> Found:
    why: list[str] = []
    esps = [part for part in table.partitions if part.type in _ESP]
    programs = [name for part in esps for name in _programs(disk, part)]
    bios = _bios_code(disk, table)
    efi = bool(programs) or (bool(esps) and not bios)
    if esps:
        why.append(
            f"an EFI system partition with {', '.join(sorted(set(programs))) or 'no boot program that can be read'}"
        )
    if bios:
        why.append(f"boot code in the {table.scheme.upper()}")
    mode = HYBRID if efi and bios else UEFI if efi else BIOS if bios else None
    architecture = _architecture(disk, table, programs, bios)
    if mode is None:
        why.append("no boot loader")
    windows = any(_kind(disk, part) == "ntfs" for part in table.partitions[:8])
    return Found(architecture, mode, "/dev/sda1" if windows else "/dev/xvda", tuple(why))


def _kind(disk: Disk, part: Partition) -> str | None:
    try:
        found = probe(disk, part.start, min(part.length, 1 << 20))
    except DiskmorphError:
        return None
    return found.type if found is not None else None


def _architecture(disk: Disk, table: PartitionTable, programs: list[str], bios: bool) -> str | None:
    known = set(programs)
    if len(known) == 1:
        return known.pop()
    kernel = _kernel(disk, table)
    if kernel is not None:
        return kernel
    if "x86_64" in known or bios:
        return "x86_64"
    return "arm64" if "arm64" in known else None


# --- UEFI


def _programs(disk: Disk, part: Partition) -> Iterator[str]:
    """Yield the architecture of each EFI program in /EFI of a system partition; none where it cannot be read."""
    from diskmorph.formats.fat import read_fat  # noqa: PLC0415 - most commands need none

    try:
        tree = read_fat(Slice(disk, part.start, min(part.length, disk.size - part.start)))
        folder = _child(tree.root, b"efi")
        nodes = list(_efi_files(folder)) if folder is not None else []
        for name, node in nodes[:_MOST_PROGRAMS]:
            architecture = _machine_of(node) or _BOOT_NAMES.get(name)
            if architecture is not None:
                yield architecture
    except DiskmorphError:
        return


def _child(node: Node, name: bytes) -> Node | None:
    return next((child for key, child in node.children.items() if key.lower() == name and child.is_dir), None)


def _efi_files(folder: Node) -> Iterator[tuple[bytes, Node]]:
    for vendor in folder.children.values():
        if vendor.is_dir:
            for name, node in vendor.children.items():
                if name.lower().endswith(b".efi") and not node.is_dir:
                    yield name.lower(), node


def _machine_of(node: Node) -> str | None:
    """Return the architecture of a PE program: its header's offset stands at 60 (PE/COFF, "MS-DOS Stub")."""
    source = node.source("EFI program")
    head = source.read_upto(0, 64)
    if head[:2] != b"MZ" or len(head) < 64:
        return None
    mark = source.read_upto(int.from_bytes(head[60:64], "little"), 6)
    return _MACHINES.get(int.from_bytes(mark[4:6], "little")) if mark[:4] == b"PE\0\0" else None


# --- BIOS


def _bios_code(disk: Disk, table: PartitionTable) -> bool:
    """Whether a BIOS would find something to start: code in the first sector, and what that starts."""
    first = disk.read(0, min(512, disk.size))
    if not any(first[:440]):
        return False
    if table.scheme == "gpt":
        return any(
            (part.type == _BIOS_BOOT and any(_head(disk, part)))
            or (part.attributes & _LEGACY_BOOTABLE and any(_head(disk, part)))
            for part in table.partitions
        )
    return b"GRUB" in first or any(part.bootable for part in table.partitions)


def _head(disk: Disk, part: Partition) -> bytes:
    return disk.read(part.start, min(4096, part.length, disk.size - part.start))


# --- kernels


def _kernel(disk: Disk, table: PartitionTable) -> str | None:
    """Return the architecture of a kernel in /boot of an ext file system."""
    from diskmorph.formats.ext4.reader import read_ext  # noqa: PLC0415 - seldom needed

    for part in table.partitions[:16]:
        if not (_kind(disk, part) or "").startswith("ext"):
            continue
        try:
            tree = read_ext(Slice(disk, part.start, part.length))
            for place in (b"boot", b""):
                folder = tree.find(place) if place else tree.root
                if folder is None or not folder.is_dir:
                    continue
                for name, node in folder.children.items():
                    if name.startswith((b"vmlinuz", b"Image")) and not node.is_dir:
                        found = _kernel_head(node)
                        if found is not None:
                            return found
        except DiskmorphError:
            continue
    return None


def _kernel_head(node: Node) -> str | None:
    """Return the architecture that a kernel's boot header tells (Linux, arch/x86/boot.rst and arm64/booting.rst)."""
    from diskmorph.formats.ami import schema  # noqa: PLC0415

    if not node.size:
        return None
    source = node.source("kernel")
    head = source.read_upto(0, schema.BOOT_HEADER_END)
    if head[0x38:0x3C] == b"ARM\x64":
        return "arm64"
    if head[0x202:0x206] != b"HdrS" or len(head) < schema.BOOT_HEADER_OFFSET + schema.BOOT_HEADER.sizeof():
        return None
    header = schema.BOOT_HEADER.parse(head[schema.BOOT_HEADER_OFFSET :])
    return "x86_64" if header.xloadflags & schema.XLF_KERNEL_64 else "i386"
