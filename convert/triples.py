"""Glance triples: a root file system with its kernel and ramdisk into a folder, described as Glance takes them."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.job import convert
from diskmorph.convert.options import ConvertOptions, ConvertReport, Moved
from diskmorph.convert.package_disks import new_folder
from diskmorph.convert.plan import make_plan
from diskmorph.formats.allocator import Identity, OptionReader
from diskmorph.formats.ami.glance import AKI, AMI, ARI, MANIFEST, new_triple, triple_json
from diskmorph.formats.ami.kernel import read_kernel
from diskmorph.formats.ami.ramdisk import read_ramdisk
from diskmorph.formats.errors import OptionError
from diskmorph.formats.policy import Opener
from diskmorph.formats.views import SourceDisk

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.convert.options import Progress
    from diskmorph.formats.disk import Disk


def disk_to_triple(
    source: str | os.PathLike[str] | Disk,
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Write a new folder with `ami` (the disk as plain bytes), `aki`, `ari` and `images.json`.

    `-o kernel=FILE,ramdisk=FILE,cmdline=TEXT,name=NAME` say what goes with it. The JSON has for each image what
    `openstack image create` is told: identifiers chosen beforehand, formats, properties, and the command itself. Raises
    OptionError, TargetError, FormatError (no kernel, no ramdisk), and what `convert` raises.
    """
    begun = time.monotonic()
    options = options or ConvertOptions()
    words = OptionReader(AMI, options.format_options)
    kernel, ramdisk = words.text("kernel", ""), words.text("ramdisk", "")
    cmdline = words.text("cmdline", "")
    name = words.text("name", Path(os.path.normpath(target)).name)
    words.done()
    if ramdisk and not kernel:
        raise OptionError("a ramdisk goes with a kernel", hint="say -o kernel=FILE too")
    architecture = _judge(kernel, ramdisk, options)
    plain = replace(options, target_format="raw", format_options={}, force=False, profile=None)
    moved = Moved()
    reports = []
    with new_folder(Path(target), sync=options.sync, dry_run=options.dry_run) as folder:
        identity = _identity(source, plain)
        images = new_triple(
            name,
            identity,
            kernel=bool(kernel),
            ramdisk=bool(ramdisk),
            architecture=architecture,
            cmdline=cmdline or None,
        )
        reports.append(convert(source, folder / AMI, options=plain, on_progress=on_progress))
        for file, label in ((kernel, AKI), (ramdisk, ARI)):
            if file:
                with SourceDisk(Opener(options.parents, options.limits).user_file(file)) as part:
                    own = replace(plain, digest=False, disk=None, snapshot=None, size=None)
                    reports.append(convert(part, folder / label, options=own))
        if not options.dry_run:
            (folder / MANIFEST).write_bytes(triple_json(images))
    for report in reports:
        for word in ("cloned", "copied", "encoded", "passed", "skipped"):
            setattr(moved, word, getattr(moved, word) + getattr(report.bytes, word))
    return replace(
        reports[0],
        target=os.fspath(target),
        format=AMI,
        virtual_size=sum(report.virtual_size for report in reports),
        stored_size=sum(report.stored_size for report in reports),
        bytes=moved,
        seconds=time.monotonic() - begun,
        members=(*(image.file for image in images), MANIFEST),
    )


def _judge(kernel: str, ramdisk: str, options: ConvertOptions) -> str | None:
    """Return the kernel's architecture. Raises FormatError where the files are not what they should be."""
    opener = Opener(options.parents, options.limits)
    if ramdisk:
        with opener.user_file(ramdisk) as source:
            read_ramdisk(source)
    if not kernel:
        return None
    with opener.user_file(kernel) as source:
        return read_kernel(source).architecture


def _identity(source: str | os.PathLike[str] | Disk, options: ConvertOptions) -> Identity:
    if not options.reproducible:
        return Identity()
    from diskmorph.convert.digest import tree_digest  # noqa: PLC0415 - only when asked for

    with make_plan(source, "ami", options) as plan:
        return Identity(tree_digest(plan.disk))
