"""The kernel that a disk boots: the tree's own, or one that is given as a file or in a package."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.bridge.modules import ModuleFolder
from diskmorph.convert.bridge.shelf import given_file
from diskmorph.convert.bridge.software import is_package, open_software
from diskmorph.formats.ami.kernel import Kernel, read_kernel
from diskmorph.formats.directory import read_directory
from diskmorph.formats.errors import FormatError, OptionError
from diskmorph.formats.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.convert.bridge.options import BuildOptions
    from diskmorph.convert.bridge.shelf import Shelf
    from diskmorph.formats.tree import Node, Tree

_HINT = (
    "give one with --kernel: a vmlinuz with --modules DIR, or a kernel package "
    "(Debian: linux-image-*.deb; Fedora: kernel-core*.rpm; Alpine: linux-virt*.apk)"
)
_NAMES = re.compile(rb"(?:vmlinuz|vmlinux|Image|kernel)(?:-(.*))?$")
_SKIPPED = (b".hmac", b".sig", b".old", b".efi.signed")


@dataclass(frozen=True)
class BootKernel:
    """A kernel: its file, version, architecture in OCI's words, modules; `path` is its place in the tree, if any."""

    node: Node
    version: str
    architecture: str
    modules: ModuleFolder | None
    path: str | None = None


def find_kernel(tree: Tree, options: BuildOptions, shelf: Shelf) -> BootKernel:
    """Return the kernel that was given, else the tree's newest. Raises OptionError where there is none."""
    if options.kernel is not None:
        return _given(tree, options, shelf)
    found = _in_tree(tree)
    if found is None:
        for package in shelf.packages():
            found = _in_tree(package)
            if found is not None:
                return BootKernel(found.node, found.version, found.architecture, found.modules)
        raise OptionError("the tree has no kernel", hint=_HINT)
    if options.modules is not None:
        folder = _given_modules(tree, options.modules, found.version)
        return BootKernel(found.node, found.version, found.architecture, folder, found.path)
    return found


def _given(tree: Tree, options: BuildOptions, shelf: Shelf) -> BootKernel:
    path = options.kernel
    assert path is not None  # noqa: S101 - the caller looked
    with FileSource(path) as source:
        packed = is_package(source)
    if packed:
        package = open_software(path, options.convert.limits)
        tree.sources.extend(package.sources)
        found = _in_tree(package)
        if found is None:
            raise OptionError(f"{path} has no kernel in it", hint="a package such as linux-image-6.1.0-18-amd64 has")
        modules = found.modules or _in_packages(found.version, shelf)
        if options.modules is not None:
            modules = _given_modules(tree, options.modules, found.version)
        return BootKernel(found.node, found.version, found.architecture, modules)
    node = given_file(path, "--kernel")
    told = read_kernel(node.source(str(path)))
    version = told.version or ""
    if options.modules is not None:
        folder = _given_modules(tree, options.modules, version)
        return BootKernel(node, version or folder.version, _oci(told), folder)
    return BootKernel(node, version, _oci(told), _modules_of(tree, version) or _in_packages(version, shelf))


def _given_modules(tree: Tree, path: Path, version: str) -> ModuleFolder:
    if not path.is_dir():
        raise OptionError(f"--modules {path} is no directory", hint="a directory such as lib/modules/VERSION is meant")
    folder = read_directory(path)
    tree.sources.extend(folder.sources)
    root, name = folder.root, path.resolve().name
    for inside in ("lib/modules", "usr/lib/modules", ""):  # the root of an unpacked package, or lib/modules itself
        parent = folder.find(inside) if inside else folder.root
        if parent is not None and version and version.encode() in parent.children:
            root, name = parent.children[version.encode()], version
            break
    found = ModuleFolder(root, name)
    if found.empty:
        raise OptionError(f"--modules {path} has no kernel modules", hint="a directory such as lib/modules/VERSION has")
    if version and found.version != version and not _is_for(found, version):
        raise OptionError(f"the modules in {path} are not those of the kernel", expected=version, found=found.version)
    return ModuleFolder(root, version or name)


def _is_for(folder: ModuleFolder, version: str) -> bool:
    """Return whether modules in a folder of another name are for this kernel, by their version magic."""
    for module in folder.pick(["virtio_blk", "nvme", "sd_mod", "ext4", "virtio_net"]).modules:
        return b"vermagic=" + version.encode() + b" " in module.content
    return True


def _in_packages(version: str, shelf: Shelf) -> ModuleFolder | None:
    return next((found for tree in shelf.packages() if (found := _modules_of(tree, version)) is not None), None)


def _in_tree(tree: Tree) -> BootKernel | None:
    """Return the newest kernel in /boot or beside its modules."""
    best: tuple[list[object], BootKernel] | None = None
    for path, node, named in _candidates(tree):
        try:
            told = read_kernel(node.source(path))
        except FormatError:
            continue
        version = told.version or named
        modules = _modules_of(tree, version) or _modules_of(tree, named)
        found = BootKernel(node, version, _oci(told), modules, path)
        rank = [modules is not None, *_order(version)]
        if best is None or rank > best[0]:
            best = rank, found
    return best[1] if best else None


def _candidates(tree: Tree) -> Iterator[tuple[str, Node, str]]:
    boot = tree.find("boot")
    for name, node in sorted((boot.children if boot else {}).items()):
        found = _NAMES.match(name)
        if found and node.kind == stat.S_IFREG and not name.endswith(_SKIPPED):
            yield f"boot/{name.decode('utf-8', 'surrogateescape')}", node, (found[1] or b"").decode("utf-8", "replace")
    for folder in ("usr/lib/modules", "lib/modules"):
        versions = tree.find(folder)
        for name in sorted(versions.children if versions else {}):
            version = name.decode("utf-8", "surrogateescape")
            node_found = tree.find(f"{folder}/{version}/vmlinuz")
            if node_found is not None and node_found.kind == stat.S_IFREG:
                yield f"{folder}/{version}/vmlinuz", node_found, version


def _modules_of(tree: Tree, version: str) -> ModuleFolder | None:
    if not version or "/" in version or version == "..":
        return None
    for folder in ("usr/lib/modules", "lib/modules"):
        node = tree.find(f"{folder}/{version}")
        if node is not None and node.is_dir:
            return ModuleFolder(node, version)
    return None


def _order(version: str) -> list[object]:
    """Return what versions are compared by: numbers as numbers, the longer ones being larger."""
    found: list[object] = []
    for number, word in re.findall(r"([0-9]+)|([^0-9]+)", version):
        digits = number.lstrip("0")
        found.append((1, len(digits), digits) if number else (0, 0, word))
    return found


def _oci(kernel: Kernel) -> str:
    return {"x86_64": "amd64", "i386": "386"}.get(kernel.architecture, kernel.architecture)
