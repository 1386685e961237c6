"""Vagrant boxes and Incus images: a qcow2 with a few lines of metadata in a gzip'd tar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.cloud_facts import facts_of
from diskmorph.convert.cloud_write import (
    FileSink,
    GzipSink,
    Part,
    add_file,
    add_source,
    content_of,
    end_archive,
    require_readable,
    tar_header,
    unnamed,
)
from diskmorph.formats.errors import OptionError
from diskmorph.formats.output import FileTarget

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.convert.cloud import Shaping
    from diskmorph.convert.options import ConvertReport
    from diskmorph.formats.source import ByteSource

_GB = 1 << 30
_VAGRANTFILE = """\
Vagrant.configure("2") do |config|
  config.vm.provider :libvirt do |libvirt|
    libvirt.driver = "kvm"
    libvirt.disk_bus = "virtio"
  end
end
"""


def write_vagrant(shaping: Shaping) -> ConvertReport:
    """Write a box: metadata.json, Vagrantfile, box.img (vagrant-libvirt, "Box Format")."""
    size = -(-shaping.plan.disk.size // _GB)
    said = {"provider": "libvirt", "format": "qcow2", "virtual_size": size}
    files = {"metadata.json": json.dumps(said).encode() + b"\n", "Vagrantfile": _VAGRANTFILE.encode()}
    return _packed(shaping, "vagrant", files, "box.img")


def write_incus(shaping: Shaping) -> ConvertReport:
    """Write an image of a virtual machine: metadata.yaml and rootfs.img (Incus, "Image format").

    With `-o split=on` the tarball holds metadata.yaml alone, and the disk lies beside it as NAME.qcow2.
    """
    files = {"metadata.yaml": _metadata(shaping).encode()}
    split = shaping.words.get("split", "off")
    if split not in {"on", "off"}:
        raise OptionError(f"incus option split={split} is neither on nor off")
    return _split(shaping, files) if split == "on" else _packed(shaping, "incus", files, "rootfs.img")


def _metadata(shaping: Shaping) -> str:
    """Return metadata.yaml; its strings are JSON's, which YAML takes (YAML 1.2.2, 1.2)."""
    facts = facts_of(shaping.plan.disk)
    architecture = shaping.words.get("architecture", facts.architecture)
    name = shaping.words.get("name") or Path(shaping.plan.source.name).stem or "disk"
    description = shaping.words.get("description") or name
    day = time.strftime("%Y%m%d", time.gmtime(shaping.mtime))
    lines = [
        f"architecture: {json.dumps(architecture)}",
        f"creation_date: {shaping.mtime}",
        "properties:",
        f"  architecture: {json.dumps(architecture)}",
        f"  description: {json.dumps(description)}",
        f"  name: {json.dumps(name)}",
        f'  serial: "{day}"',
    ]
    if not facts.efi:
        lines.append('  requirements.secureboot: "false"')
    return "\n".join([*lines, "templates: {}"]) + "\n"


def _packed(shaping: Shaping, format: str, files: Mapping[str, bytes], name: str) -> ConvertReport:
    options, path = shaping.options, Path(shaping.target)
    members = (*files, name)
    if options.dry_run:
        moved, sizes = shaping.write_inner(None)
        return shaping.report(format, sum(sizes) + sum(map(len, files.values())), moved, members)
    with (
        FileTarget(path.parent, [path.name], force=options.force, sync=options.sync) as target,
        unnamed(path.parent, path.name) as inner,
    ):
        moved, sizes = shaping.write_inner(inner)
        file = FileSink(target.members[0])
        with content_of(inner, sizes) as content:
            digest = _archive(shaping, file, files, name, content)
        if options.verify:
            require_readable(target.members[0], file.stored, digest)
        target.commit([file.stored])
    return shaping.report(format, file.stored, moved, members)


def _archive(
    shaping: Shaping, file: FileSink, files: Mapping[str, bytes], name: str = "", content: ByteSource | None = None
) -> str:
    """Write the archive, its large member last, where there is one; return the SHA-256 of the tar."""
    sink = GzipSink(file)
    for small, data in files.items():
        add_file(sink, small, data, shaping.mtime)
    if content is not None:
        add_source(sink, tar_header(name, content.size, shaping.mtime), content, shaping.tell)
    end_archive(sink)
    return sink.sha256


def _split(shaping: Shaping, files: Mapping[str, bytes]) -> ConvertReport:
    options, path = shaping.options, Path(shaping.target)
    disk = f"{path.name.split('.')[0]}.qcow2"
    if disk == path.name:
        raise OptionError("the tarball needs a name of its own beside the disk", hint="such as NAME.tar.gz")
    names = [path.name, disk]
    if options.dry_run:
        moved, sizes = shaping.write_inner(None)
        return shaping.report("incus", sum(sizes) + sum(map(len, files.values())), moved, tuple(names))
    with FileTarget(path.parent, names, force=options.force, sync=options.sync) as target:
        file = FileSink(target.members[0])
        _archive(shaping, file, files)
        moved, sizes = shaping.write_inner(Part(target.members[1]))
        target.commit([file.stored, sizes[0]])
    return shaping.report("incus", file.stored + sizes[0], moved, tuple(names))
