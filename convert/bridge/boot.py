"""What booting needs: put into the tree where it belongs there, returned as partitions and boot code where not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diskmorph.convert.bridge import container, grub, system
from diskmorph.convert.bridge.build import Boot
from diskmorph.convert.bridge.facts import architecture, os_release
from diskmorph.convert.bridge.initramfs import find_busybox, make_initramfs, missing_busybox, pick_drivers
from diskmorph.convert.bridge.injected import Injector
from diskmorph.convert.bridge.kernels import BootKernel, find_kernel
from diskmorph.convert.bridge.modules import NEEDED, plain_name
from diskmorph.convert.bridge.parts import BIOS_BOOT, ESP, FIRST, MIB, Part
from diskmorph.convert.bridge.shelf import Shelf, given_file
from diskmorph.convert.bridge.uki import find_stub, make_uki
from diskmorph.formats.errors import OptionError
from diskmorph.formats.fat import FatOptions, fat_disk
from diskmorph.formats.tree import Node, Tree, file_node
from diskmorph.formats.views import Memory

if TYPE_CHECKING:
    from diskmorph.convert.bridge.launcher import Program
    from diskmorph.convert.bridge.modules import Picked
    from diskmorph.convert.bridge.options import BuildOptions
    from diskmorph.formats.allocator import Identity

_ESP_SIZE = 64 * MIB
_SECTOR = 512
_CONSOLES = {"amd64": "ttyS0,115200n8", "386": "ttyS0,115200n8", "arm64": "ttyAMA0,115200n8"}
_WORDS = {"azure": "rootdelay=300", "aws": "nvme_core.io_timeout=4294967295"}
_FOLDER = "boot/diskmorph"


@dataclass
class _Job:
    """What one build's steps share."""

    tree: Tree
    options: BuildOptions
    identity: Identity
    inject: Injector
    shelf: Shelf
    notes: list[str] = field(default_factory=list)

    @property
    def mtime(self) -> int:
        """Nanoseconds: the time of everything that is put in."""
        return int(self.identity.time()) * 10**9

    @property
    def root_uuid(self) -> str:
        """The root file system's."""
        return str(self.identity.uuid("ext4"))

    @property
    def esp_id(self) -> int:
        """The ESP's volume number."""
        return self.identity.u32("esp")


def prepare_boot(tree: Tree, options: BuildOptions, identity: Identity) -> Boot:
    """Put what booting needs into the tree; return partitions before the root, the MBR's code, what a user should know.

    Nothing of the tree is executed. Raises OptionError where a part is missing: it says which package or option
    brings it; UnsupportedError, FormatError, SourceError.
    """
    shelf = Shelf(tree, options.parts, options.convert.limits)
    job = _Job(tree, options, identity, Injector(tree), shelf)
    kernel = find_kernel(tree, options, shelf)
    wanted = architecture(tree)
    if kernel.architecture != wanted:
        raise OptionError(
            "the kernel is for another architecture than the tree", expected=wanted, found=kernel.architecture
        )
    program = _program(job)
    init = container.INIT if program is not None else system.find_init(tree)
    picked = pick_drivers(kernel.modules) if kernel.modules is not None else None
    _tell_missing(job, kernel, picked)
    initrd = _initrd(job, kernel, picked, init or "/sbin/init", "ro")
    _put_system(job, program, kernel)
    cmdline = _cmdline(job, kernel.architecture)
    kernel_path, initrd_path = _put_kernel(job, kernel, initrd)
    parts, code = _parts(job, kernel, initrd, cmdline, (kernel_path, initrd_path))
    job.inject.finish(job.mtime)
    return Boot(tuple(parts), code, tuple(job.notes), kernel.node.source("kernel"), initrd.source("ramdisk"))


def _program(job: _Job) -> Program | None:
    """Return the program that the machine is for; None where an init starts the system."""
    init, how = system.find_init(job.tree), job.options.entrypoint
    if how == "never" or (how == "auto" and init is not None):
        if init is None:
            raise OptionError("the tree has no init", hint="--entrypoint auto runs the image's ENTRYPOINT")
        return None
    program = container.program_of(job.tree)
    if program is not None:
        return program
    if how == "always":
        raise OptionError("the image has neither ENTRYPOINT nor CMD", hint="--entrypoint auto starts its init")
    program = container.shell_of(job.tree)
    if program is None:
        raise OptionError(
            "nothing to run: the tree has no init, no ENTRYPOINT or CMD, and no /bin/sh",
            hint="install systemd-sysv in the tree, or build from an image with an ENTRYPOINT",
        )
    job.notes.append("the tree has no init, ENTRYPOINT or CMD: the machine runs /bin/sh on its console")
    return program


def _tell_missing(job: _Job, kernel: BootKernel, picked: Picked | None) -> None:
    if picked is None:
        job.notes.append(
            f"no modules for the kernel {kernel.version}: what is built in must find the disk, or --modules helps"
        )
        return
    have = {module.name for module in picked.modules} | picked.built_in
    target = job.options.convert.profile or ""
    lacking = [name for name in NEEDED.get(target, ()) if plain_name(name) not in have]
    if lacking:
        job.notes.append(f"the kernel {kernel.version} lacks drivers that {target} needs: {', '.join(lacking)}")


def _initrd(job: _Job, kernel: BootKernel, picked: Picked | None, init: str, mode: str) -> Node:
    """Return the ramdisk: the one given, ours, or the tree's own where no busybox is to be had."""
    if job.options.initrd is not None:
        return given_file(job.options.initrd, "--initrd")
    busybox = find_busybox(job.shelf, kernel.architecture)
    if busybox is not None:
        data = make_initramfs(
            busybox, picked, kernel.version, kernel.architecture, uuid=job.root_uuid, init=init, mode=mode
        )
        return file_node(data, mtime=job.mtime)
    own = _own_initrd(job.tree, kernel.version)
    if own is None or init == container.INIT:
        raise missing_busybox(kernel.architecture)
    job.notes.append("the tree's own ramdisk is used, which does not grow the root: no static busybox was found")
    return own


def _own_initrd(tree: Tree, version: str) -> Node | None:
    for name in (f"initrd.img-{version}", f"initramfs-{version}.img", f"initrd-{version}", "initramfs-linux.img"):
        node = tree.find(f"boot/{name}")
        if node is not None:
            return node
    return None


def _put_system(job: _Job, program: Program | None, kernel: BootKernel) -> None:
    esp = None
    if program is None and {"uefi", "uki"} & set(job.options.boot):
        esp = f"{job.esp_id >> 16:04X}-{job.esp_id & 0xFFFF:04X}"
    fstab = system.fstab_text(job.tree, job.root_uuid, esp)
    system.put_common(job.inject, job.tree, job.options.hostname, job.options.ssh_keys, fstab, job.mtime)
    if program is None:
        system.mounted_folders(job.inject, job.tree, job.mtime)
        system.put_distribution(job.inject, job.tree, job.notes, job.mtime)
        return
    busybox = find_busybox(job.shelf, kernel.architecture)
    if busybox is None:
        raise missing_busybox(kernel.architecture)
    container.put_container(job.inject, job.tree, program, busybox, kernel.architecture, job.mtime)


def _cmdline(job: _Job, arch: str) -> str:
    root = f"root=UUID={job.root_uuid}"
    given = job.options.cmdline
    if given is not None:
        if "\n" in given or "\0" in given:
            raise OptionError("--cmdline is not one line")
        return given if any(word.startswith("root=") for word in given.split()) else f"{root} {given}".strip()
    words = [root, "ro", "console=tty0", f"console={_CONSOLES.get(arch, 'ttyS0,115200n8')}", "quiet"]
    extra = _WORDS.get(job.options.convert.profile or "")
    return " ".join([*words, *([extra] if extra else [])])


def _put_kernel(job: _Job, kernel: BootKernel, initrd: Node) -> tuple[str, str]:
    """Put kernel, modules and ramdisk into the tree; return the paths of kernel and ramdisk for GRUB."""
    version = kernel.version or "kernel"
    path = kernel.path
    if path is None:
        path = f"boot/vmlinuz-{version}"
        job.inject.put(path, system.copy_of(kernel.node, 0o644, job.mtime))
        if kernel.modules is not None:
            _put_modules(job, kernel)
    ramdisk = f"{_FOLDER}/initrd-{version}.img"
    job.inject.put(ramdisk, system.copy_of(initrd, 0o644, job.mtime))
    return "/" + path, "/" + ramdisk


def _put_modules(job: _Job, kernel: BootKernel) -> None:
    """Put a kernel's modules where its programs look for them."""
    assert kernel.modules is not None  # noqa: S101 - the caller looked
    folder = Tree(kernel.modules.root)
    home = f"lib/modules/{kernel.version}"
    for path, node in folder.walk(ordered=True):
        if path and path not in (b"build", b"source"):
            job.inject.put(home.encode() + b"/" + path, _plain(node, job.mtime))


def _plain(node: Node, mtime: int) -> Node:
    if node.is_dir:
        return Node(0o040755, mtime=mtime)
    return Node(node.mode, mtime=mtime, size=node.size, pieces=node.pieces, target=node.target)


def _parts(
    job: _Job, kernel: BootKernel, initrd: Node, cmdline: str, paths: tuple[str, str]
) -> tuple[list[Part], bytes]:
    boot, title = job.options.boot, os_release(job.tree).get("PRETTY_NAME", "Linux").replace("'", "")
    parts, code = [], b""
    if {"bios", "uefi"} & set(boot):
        entry = grub.Entry(f"{title}, {kernel.version}", *paths, cmdline)
        text = grub.grub_config(job.root_uuid, [entry], serial=kernel.architecture in ("amd64", "386"))
        job.inject.put("boot/grub/grub.cfg", file_node(text.encode(), mtime=job.mtime))
    if "bios" in boot:
        if kernel.architecture not in ("amd64", "386"):
            if boot == ("bios",):
                raise OptionError(f"machines of architecture {kernel.architecture} have no BIOS", hint="--boot uefi")
        else:
            code, core = grub.bios_parts(job.shelf, job.root_uuid, FIRST // _SECTOR)
            parts.append(Part("BIOS boot", BIOS_BOOT, Memory(core + bytes(-len(core) % MIB))))
    if "uefi" in boot:
        name, program = grub.efi_program(job.shelf, job.root_uuid, kernel.architecture)
        parts.append(_esp(job, name, program, parts))
    if "uki" in boot:
        name, stub = find_stub(job.shelf, kernel.architecture)
        parts.append(_esp(job, name, _unified(job, stub, kernel, initrd, cmdline), parts))
    return parts, code


def _unified(job: _Job, stub: bytes, kernel: BootKernel, initrd: Node, cmdline: str) -> bytes:
    release = "".join(f'{name}="{value}"\n' for name, value in os_release(job.tree).items()) or "ID=linux\n"
    sections = [
        (".osrel", release.encode()),
        (".cmdline", cmdline.encode()),
        (".uname", kernel.version.encode()),
        (".linux", kernel.node.read()),
        (".initrd", initrd.read()),
    ]
    return make_uki(stub, sections)


def _esp(job: _Job, name: str, program: bytes, before: list[Part]) -> Part:
    """Return an EFI system partition whose only program firmware starts without being told (UEFI 2.10, 3.5.1.1)."""
    tree = Tree(name="ESP")
    tree.put(f"EFI/BOOT/{name}", file_node(program, mtime=job.mtime))
    size = max(_ESP_SIZE, -(-(len(program) + 16 * MIB) // MIB) * MIB)
    hidden = (FIRST + sum(part.length for part in before)) // _SECTOR
    options = FatOptions("ESP", job.esp_id, hidden * _SECTOR)
    return Part("EFI system partition", ESP, fat_disk(tree, size, options))
