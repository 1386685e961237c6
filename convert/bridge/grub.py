"""GRUB without grub-install: its core image for BIOS, its program for UEFI, and their configuration.

Modules come from the tree, from packages, or from the machine; `grub-mkimage` of the machine puts them together.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.formats.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.convert.bridge.shelf import Shelf
    from diskmorph.formats.tree import Node

_COMMON = ("part_gpt", "ext2", "search_fs_uuid", "configfile", "normal", "linux", "serial", "terminal", "echo", "test")
_BIOS_MODULES = (*_COMMON, "gzio", "biosdisk", "ls", "cat", "reboot", "halt")
_EFI_MODULES = (*_COMMON, "gzio", "fat", "all_video", "ls", "cat", "reboot", "halt", "chain")
_FOLDERS = ("usr/lib/grub", "usr/share/grub2", "usr/lib/grub2", "boot/grub", "boot/grub2")
_NAME = re.compile(r"[a-z0-9_+-]+\.(mod|img|lst)")
_LARGEST_FILE = 8 << 20
_MOST_FILES = 1000
_SECONDS = 60
_CORE_LIMIT = 1 << 20
# OCI's architecture -> GRUB's platform, the file in /EFI/BOOT (UEFI 2.10, 3.5.1.1), Debian's package
EFI = {
    "amd64": ("x86_64-efi", "BOOTX64.EFI", "grub-efi-amd64-bin"),
    "arm64": ("arm64-efi", "BOOTAA64.EFI", "grub-efi-arm64-bin"),
    "386": ("i386-efi", "BOOTIA32.EFI", "grub-efi-ia32-bin"),
    "riscv64": ("riscv64-efi", "BOOTRISCV64.EFI", "grub-efi-riscv64-bin"),
}
_SERIAL = ("serial --unit=0 --speed=115200", "terminal_input console serial", "terminal_output console serial")
_BLOCKLIST = 500  # diskboot.img's last entry: u64 first sector, u16 sectors, u16 segment
_SEGMENT = 0x820
_BOOT_SECTOR_AT, _BOOT_DRIVE_AT, _DRIVE_CHECK_AT = 0x5C, 0x64, 0x66  # boot.img


@dataclass(frozen=True)
class Entry:
    """What the menu starts: paths in the root file system, and the command line."""

    title: str
    kernel: str
    initrd: str | None
    cmdline: str


def early_config(uuid: str) -> str:
    """Return the configuration within GRUB itself: it goes on with the root's grub.cfg."""
    return f"search.fs_uuid {uuid} root\nset prefix=($root)/boot/grub\nconfigfile ($root)/boot/grub/grub.cfg\n"


def grub_config(uuid: str, entries: Sequence[Entry], *, serial: bool = True) -> str:
    """Return /boot/grub/grub.cfg: the first entry at once; `serial`: on the PC's first serial port, too."""
    lines = [
        *(_SERIAL if serial else ()),
        "set default=0",
        "set timeout=0",
        f"search.fs_uuid {uuid} root",
    ]
    for entry in entries:
        lines += [f"menuentry '{entry.title}' {{", f"\tlinux {_plain(entry.kernel)} {_plain(entry.cmdline)}"]
        lines += [f"\tinitrd {_plain(entry.initrd)}"] if entry.initrd else []
        lines += ["}"]
    return "\n".join(lines) + "\n"


def _plain(words: str) -> str:
    """Return words that GRUB's shell takes as they are; quotes stay, they hold a kernel parameter together."""
    return re.sub(r"[\\$;|&<>]", r"\\\g<0>", words)


def bios_parts(shelf: Shelf, uuid: str, partition: int) -> tuple[bytes, bytes]:
    """Return the MBR's code (440 bytes) and the content of the BIOS boot partition that begins at LBA `partition`.

    Raises OptionError naming what is missing.
    """
    core = _image(shelf, "i386-pc", _BIOS_MODULES, uuid, "grub-pc-bin")
    core += bytes(-len(core) % 512)
    if len(core) > _CORE_LIMIT:
        raise OptionError("GRUB's core image has no room in its partition", expected=_CORE_LIMIT, found=len(core))
    patched = bytearray(core)
    struct.pack_into("<QHH", patched, _BLOCKLIST, partition + 1, len(core) // 512 - 1, _SEGMENT)
    boot = bytearray(_file(shelf, "i386-pc", "boot.img", "grub-pc-bin")[:440])
    struct.pack_into("<Q", boot, _BOOT_SECTOR_AT, partition)
    boot[_BOOT_DRIVE_AT] = 0xFF  # the drive that the BIOS says
    boot[_DRIVE_CHECK_AT : _DRIVE_CHECK_AT + 2] = b"\x90\x90"
    return bytes(boot), bytes(patched)


def efi_program(shelf: Shelf, uuid: str, architecture: str) -> tuple[str, bytes]:
    """Return the file name in /EFI/BOOT and the program. Raises OptionError naming what is missing."""
    if architecture not in EFI:
        raise OptionError(f"there is no GRUB for UEFI on {architecture}", hint="--boot none")
    platform, name, package = EFI[architecture]
    return name, _image(shelf, platform, _EFI_MODULES, uuid, package)


def _file(shelf: Shelf, platform: str, name: str, package: str) -> bytes:
    node = shelf.find(f"{folder}/{platform}/{name}" for folder in _FOLDERS)
    if node is None or node.size > _LARGEST_FILE:
        raise _missing(platform, package)
    return node.read()


def _missing(platform: str, package: str) -> OptionError:
    return OptionError(
        f"GRUB for {platform} is neither in the tree nor on this machine",
        hint=f"install the package {package} here or in the tree, or name its file with --part {package}_*.deb",
    )


def _image(shelf: Shelf, platform: str, modules: Sequence[str], uuid: str, package: str) -> bytes:
    tool = shutil.which("grub-mkimage") or shutil.which("grub2-mkimage")
    if tool is None:
        raise OptionError("grub-mkimage is not installed", hint="install the package grub-common, or choose --boot uki")
    folder = shelf.folder((f"{parent}/{platform}" for parent in _FOLDERS), "kernel.img")
    if folder is None:
        raise _missing(platform, package)
    with tempfile.TemporaryDirectory(prefix="diskmorph-") as scratch:
        place = Path(scratch)
        modules_at = folder if isinstance(folder, Path) else _laid_out(folder, place / "modules")
        (place / "early.cfg").write_text(early_config(uuid))
        words = [tool, "-O", platform, "-d", str(modules_at), "-p", "/boot/grub", "-c", str(place / "early.cfg")]
        words += ["-o", str(place / "image"), *(m for m in modules if (modules_at / f"{m}.mod").is_file())]
        done = subprocess.run(words, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603 - a fixed tool
        if done.returncode:
            raise OptionError(f"grub-mkimage failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
        return (place / "image").read_bytes()


def _laid_out(found: dict[str, Node], place: Path) -> Path:
    """Write GRUB's own files where grub-mkimage can read them: plain files with its names, nothing else of a tree."""
    place.mkdir()
    for name, node in list(found.items())[:_MOST_FILES]:
        if _NAME.fullmatch(name) and node.size <= _LARGEST_FILE:
            (place / name).write_bytes(node.read())
    return place
