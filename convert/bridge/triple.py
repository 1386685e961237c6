"""`--triple DIR`: the kernel (aki), its ramdisk (ari) and the bare root file system (ami)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from diskmorph.convert.job import convert
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.directory import DirectoryTarget
from diskmorph.formats.errors import TargetError

if TYPE_CHECKING:
    from pathlib import Path

    from diskmorph.convert.bridge.options import BuildOptions
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.source import ByteSource

_STEP = 1 << 20


def write_triple(path: Path, root: Disk, kernel: ByteSource, ramdisk: ByteSource, options: BuildOptions) -> None:
    """Write the directory; it appears whole or not at all. Raises TargetError where it exists and is not empty."""
    asked = options.convert
    with DirectoryTarget(path, sync=asked.sync) as target:
        raw = ConvertOptions(target_format="raw", sync=asked.sync, threads=asked.threads, limits=asked.limits)
        convert(root, target.part / "ami", options=raw)
        _write(target.part / "aki", kernel)
        _write(target.part / "ari", ramdisk)
        target.part.chmod(0o755)
        target.commit()


def _write(path: Path, source: ByteSource) -> None:
    try:
        with path.open("xb") as file:
            for at in range(0, source.size, _STEP):
                file.write(source.read(at, min(_STEP, source.size - at)))
    except OSError as error:
        raise TargetError(f"cannot be written: {os.strerror(error.errno or 0)}", file=str(path)) from error
