"""Kernel modules: which a list needs, in which order, and by which aliases devices ask for them."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from construct import Bytes, Int16ul, Int32ul, Int64ul, Padding, Struct

from diskmorph.formats.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from diskmorph.formats.tree import Node

_FILE = re.compile(r"([^/]+)\.ko(?:\.(gz|xz|zst))?$")
_LARGEST = 64 << 20
_LARGEST_LIST = 32 << 20
_ELF_HEADER = Struct("magic" / Bytes(5), Padding(35), "shoff" / Int64ul, Padding(10), "shentsize" / Int16ul,
                     "shnum" / Int16ul, "shstrndx" / Int16ul)  # fmt: skip
_SECTION = Struct("name" / Int32ul, "type" / Int32ul, "flags" / Int64ul, "addr" / Int64ul, "offset" / Int64ul,
                  "size" / Int64ul, Padding(24))  # fmt: skip

# What finds and mounts the root, and what reaches the network, on the machines that disks are made for.
DRIVERS: Mapping[str, tuple[str, ...]] = {
    "virtio": ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "virtio_net", "virtio_rng"),
    "nvme": ("nvme",),
    "ata": ("ata_piix", "ahci", "ata_generic"),
    "hyperv": ("hv_vmbus", "pci_hyperv", "hv_storvsc", "hv_netvsc", "hv_utils"),
    "xen": ("xen_blkfront", "xen_netfront"),
    "aws": ("ena", "ixgbevf"),
    "gcp": ("gve",),
    "vmware": ("vmw_pvscsi", "vmxnet3", "mptspi", "mptsas"),
    "emulated": ("e1000", "e1000e", "8139cp", "pcnet32", "sym53c8xx", "megaraid_sas"),
    "disk": ("sd_mod", "sr_mod", "ext4", "crc32c_generic", "crc32c_intel", "libcrc32c", "crc32_pclmul"),
    "machine": ("button", "evdev", "af_packet"),
}
# Drivers without which a target's machine finds no disk or no network
NEEDED: Mapping[str, tuple[str, ...]] = {
    "azure": ("hv_vmbus", "hv_storvsc", "hv_netvsc"),
    "hyperv": ("hv_vmbus", "hv_storvsc", "hv_netvsc"),
    "aws": ("nvme", "ena"),
    "gcp": ("virtio_pci", "virtio_scsi", "virtio_net"),
    "openstack": ("virtio_pci", "virtio_blk", "virtio_net"),
    "proxmox": ("virtio_pci", "virtio_scsi", "virtio_net"),
    "kubevirt": ("virtio_pci", "virtio_blk", "virtio_net"),
    "esxi": ("vmw_pvscsi", "vmxnet3"),
    "virtualbox": ("ahci", "e1000"),
}


@dataclass
class Module:
    """A module's file, decoded, and what it says of itself."""

    name: str
    path: str
    content: bytes
    needs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass
class Picked:
    """Modules in an order in which each comes behind what it needs; names that no file has; what is built in."""

    modules: list[Module] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    built_in: set[str] = field(default_factory=set)


class ModuleFolder:
    """lib/modules/VERSION of a kernel. `version` is the folder's name."""

    def __init__(self, root: Node, version: str) -> None:
        self.root = root
        self.version = version
        self._files: dict[str, tuple[str, Node]] = {}
        for path, node in _files(root, ""):
            found = _FILE.search(path)
            if found is not None:
                self._files.setdefault(plain_name(found[1]), (path, node))
        self.built_in = {plain_name(name) for name in _listed(root, b"modules.builtin")}
        self._listed = dict(_dependencies(root))
        self._loaded: dict[str, Module] = {}

    @property
    def empty(self) -> bool:
        """Whether there is no module."""
        return not self._files

    def pick(self, names: Iterable[str]) -> Picked:
        """Return the modules of these names, as far as present, with all that they need."""
        picked = Picked(built_in=self.built_in)
        done: set[str] = set()
        for name in names:
            self._add(plain_name(name), picked, done, ())
        return picked

    def _add(self, name: str, picked: Picked, done: set[str], way: tuple[str, ...]) -> None:
        if name in done or name in way or name in self.built_in:
            return
        if name not in self._files:
            picked.missing.append(name)
            done.add(name)
            return
        module = self._module(name)
        for need in module.needs:
            self._add(need, picked, done, (*way, name))
        done.add(name)
        picked.modules.append(module)

    def _module(self, name: str) -> Module:
        if name in self._loaded:
            return self._loaded[name]
        path, node = self._files[name]
        if node.size > _LARGEST:
            raise FormatError(f"the module {path} is impossibly large", found=node.size)
        content = _decoded(node.read(), path)
        told = _modinfo(content, path)
        needs = self._listed.get(name)
        if needs is None:
            needs = tuple(plain_name(word) for value in told.get("depends", ()) for word in value.split(",") if word)
        soft = [word for value in told.get("softdep", ()) if value.startswith("pre:") for word in value[4:].split()]
        needs = (*needs, *(plain_name(word) for word in soft if plain_name(word) in self._files))
        path = re.sub(r"\.(gz|xz|zst)$", "", path)
        found = Module(name, path, content, needs, tuple(told.get("alias", ())))
        self._loaded[name] = found
        return found


def plain_name(name: str) -> str:
    """Return a module's name as the kernel has it."""
    return name.replace("-", "_")


def dependency_lists(picked: Picked) -> tuple[str, str]:
    """Return the texts of modules.dep and modules.alias for the picked modules."""
    by_name = {module.name: module for module in picked.modules}
    lines: list[str] = []
    aliases: list[str] = []
    for module in picked.modules:
        needs = [other.path for other in reversed(_all_needs(module, by_name))]
        lines.append(f"{module.path}:{''.join(' ' + path for path in needs)}\n")
        aliases.extend(f"alias {alias} {module.name}\n" for alias in module.aliases)
    return "".join(lines), "".join(aliases)


def _all_needs(module: Module, by_name: Mapping[str, Module]) -> list[Module]:
    """Return what a module needs, the deepest first."""
    found: dict[str, Module] = {}

    def visit(current: Module) -> None:
        for name in current.needs:
            other = by_name.get(name)
            if other is not None and name not in found and other is not module:
                visit(other)
                found.setdefault(name, other)

    visit(module)
    return list(found.values())


def _files(folder: Node, prefix: str) -> Iterator[tuple[str, Node]]:
    stack = [(prefix, folder)]
    while stack:
        path, node = stack.pop()
        for name, child in sorted(node.children.items()):
            full = f"{path}{name.decode('utf-8', 'surrogateescape')}"
            if child.is_dir:
                stack.append((full + "/", child))
            elif child.kind == stat.S_IFREG:
                yield full, child


def _text(root: Node, name: bytes) -> str:
    node = root.children.get(name)
    if node is None or node.kind != stat.S_IFREG or node.size > _LARGEST_LIST:
        return ""
    return node.read().decode("utf-8", "replace")


def _listed(root: Node, name: bytes) -> Iterator[str]:
    for line in _text(root, name).splitlines():
        found = _FILE.search(line.strip())
        if found is not None:
            yield found[1]


def _dependencies(root: Node) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each module's name and what it needs directly or not, from modules.dep."""
    for line in _text(root, b"modules.dep").splitlines():
        path, _, needs = line.partition(":")
        found = _FILE.search(path.strip())
        if found is not None:
            names = [other[1] for word in needs.split() if (other := _FILE.search(word)) is not None]
            yield plain_name(found[1]), tuple(plain_name(name) for name in reversed(names))


def _decoded(data: bytes, path: str) -> bytes:
    if path.endswith(".ko"):
        return data
    from diskmorph.formats.source import BytesSource  # noqa: PLC0415 - where modules are compressed
    from diskmorph.formats.spool import decode_stream  # noqa: PLC0415

    codec = {"gz": "gzip", "xz": "xz", "zst": "zstd"}[path.rpartition(".")[2]]
    found = bytearray()
    for chunk in decode_stream(BytesSource(data, path), codec):
        found += chunk
        if len(found) > _LARGEST:
            raise FormatError(f"the module {path} expands to more than {_LARGEST >> 20} MiB")
    return bytes(found)


def _modinfo(content: bytes, path: str) -> dict[str, list[str]]:
    """Return the fields of a module's .modinfo section."""
    section = _section(content, b".modinfo", path)
    found: dict[str, list[str]] = {}
    for line in section.split(b"\0"):
        name, sign, value = line.partition(b"=")
        if sign:
            found.setdefault(name.decode("utf-8", "replace"), []).append(value.decode("utf-8", "replace"))
    return found


def _section(content: bytes, name: bytes, path: str) -> bytes:
    """Return a section of an ELF64 object. Raises FormatError where the file is none."""
    if content[:5] != b"\x7fELF\x02" or len(content) < _ELF_HEADER.sizeof():
        raise FormatError(f"the module {path} is no 64-bit ELF file")
    header = _ELF_HEADER.parse(content)
    size = _SECTION.sizeof()
    if header.shentsize != size or header.shoff + header.shnum * size > len(content):
        raise FormatError(f"the module {path} is damaged: its section table lies beyond its end")
    sections = [_SECTION.parse(content[header.shoff + i * size :][:size]) for i in range(header.shnum)]
    if header.shstrndx >= len(sections):
        raise FormatError(f"the module {path} is damaged: it has no section names")
    names = sections[header.shstrndx]
    for section in sections:
        at = names.offset + section.name
        if content[at : at + len(name) + 1] == name + b"\0":
            return content[section.offset : section.offset + section.size]
    return b""
