"""Our initial ramdisk: a static busybox, the drivers that disks and networks need, and a script that finds the root."""

from __future__ import annotations

import stat
import zlib
from importlib.resources import files
from typing import TYPE_CHECKING

from diskmorph.convert.bridge.launcher import grow_program
from diskmorph.convert.bridge.modules import DRIVERS, dependency_lists
from diskmorph.formats.cpio import write_cpio
from diskmorph.formats.errors import OptionError
from diskmorph.formats.tree import Node, Tree, dir_node, file_node, link_node

if TYPE_CHECKING:
    from diskmorph.convert.bridge.modules import ModuleFolder, Picked
    from diskmorph.convert.bridge.shelf import Shelf

# Every applet that initramfs.sh and grow.sh call.
_APPLETS = (
    "[",
    "blockdev",
    "cat",
    "cut",
    "dd",
    "echo",
    "findfs",
    "grep",
    "gzip",
    "head",
    "hexdump",
    "insmod",
    "mdev",
    "mkdir",
    "modprobe",
    "mount",
    "partprobe",
    "printf",
    "readlink",
    "sed",
    "sh",
    "sleep",
    "sort",
    "switch_root",
    "sync",
    "tail",
    "test",
    "umount",
    "usleep",
    "xargs",
)
_BUSYBOX = ("bin/busybox", "usr/bin/busybox", "bin/busybox.static", "usr/bin/busybox.static", "sbin/busybox")
_MACHINES = {"amd64": 62, "arm64": 183, "386": 3, "arm": 40, "riscv64": 243}
_LEVEL = 6


def guest_script(name: str, **values: str) -> bytes:
    """Return a script of convert/bridge/guest with @NAME@ replaced by the values."""
    text = (files("diskmorph.convert.bridge") / "guest" / name).read_text("utf-8")
    for word, value in values.items():
        text = text.replace(f"@{word}@", value)
    return text.encode()


def find_busybox(shelf: Shelf, architecture: str) -> Node | None:
    """Return a busybox without shared libraries for this architecture: from the tree, a package or the machine."""
    return shelf.find(_BUSYBOX, lambda node: is_static(node, architecture))


def missing_busybox(architecture: str) -> OptionError:
    """Return the error that says what brings a busybox."""
    return OptionError(
        f"a static busybox for {architecture} is needed and neither the tree nor this machine has one",
        hint="install the package busybox-static here or in the tree, or name it: --part busybox-static_*.deb",
    )


def is_static(node: Node, architecture: str) -> bool:
    """Return whether a file is a program for the architecture that needs no interpreter (ELF, PT_INTERP)."""
    source = node.source()
    head = source.read_upto(0, 64)
    if head[:4] != b"\x7fELF" or int.from_bytes(head[18:20], "little") != _MACHINES.get(architecture, 0):
        return False
    wide = head[4] == 2
    offset = int.from_bytes(head[32:40] if wide else head[28:32], "little")
    size, count = (int.from_bytes(head[a : a + 2], "little") for a in ((54, 56) if wide else (42, 44)))
    if size < 32 or count > 64:
        return False
    table = source.read_upto(offset, size * count)
    return not any(int.from_bytes(table[at : at + 4], "little") == 3 for at in range(0, len(table), size))


def pick_drivers(folder: ModuleFolder) -> Picked:
    """Return the drivers for disks and networks that a kernel has as modules."""
    return folder.pick(name for names in DRIVERS.values() for name in names)


def make_initramfs(
    busybox: Node, picked: Picked | None, version: str, architecture: str, *, uuid: str, init: str, mode: str
) -> bytes:
    """Return the ramdisk, gzipped: it mounts the file system `uuid` and starts `init` in it."""
    tree = Tree(name="initramfs")
    for name in ("bin", "dev", "lib", "newroot", "proc", "sys"):
        tree.put(name, dir_node())
    tree.put("dev/console", Node(stat.S_IFCHR | 0o600, rdev=(5, 1)))
    tree.put("dev/null", Node(stat.S_IFCHR | 0o666, rdev=(1, 3)))
    tree.put("bin/busybox", Node(stat.S_IFREG | 0o755, size=busybox.size, pieces=busybox.pieces))
    for name in _APPLETS:
        tree.put(f"bin/{name}", link_node(b"busybox"))
    tree.put("bin/grow", file_node(grow_program(architecture), 0o755))
    tree.put("init", file_node(guest_script("initramfs.sh", UUID=uuid, INIT=init, MODE=mode), 0o755))
    tree.put("grow.sh", file_node(guest_script("grow.sh"), 0o755))
    if picked is not None and picked.modules:
        _put_modules(tree, picked, f"lib/modules/{version}")
    return gzipped(write_cpio(tree))


def _put_modules(tree: Tree, picked: Picked, folder: str) -> None:
    for module in picked.modules:
        tree.put(f"{folder}/{module.path}", file_node(module.content))
    needs, aliases = dependency_lists(picked)
    tree.put(f"{folder}/modules.dep", file_node(needs.encode()))
    tree.put(f"{folder}/modules.alias", file_node(aliases.encode()))


def gzipped(data: bytes) -> bytes:
    """Return data as a gzip member without name and time (RFC 1952)."""
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()
