"""Targets that are URLs: s3://BUCKET/KEY, nbd:// and nbd+unix://.

Disks go through the usual pipeline: raw, fixed VHD and streamOptimized VMDK are sent to S3 as they are written, other
formats when they are complete. Packages, trees and compressed files are made in TMPDIR first.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.options import ConvertOptions, ConvertReport
from diskmorph.formats.errors import OptionError, UnsupportedError
from diskmorph.formats.remote import is_export

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskmorph.convert.options import Progress
    from diskmorph.convert.plan import Plan
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.output import Target

_SLACK = 16 << 20


def convert_to_url(
    source: str | os.PathLike[str] | Disk | Sequence[str | os.PathLike[str] | Disk],
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Convert to a URL. Raises OptionError for what a URL cannot be, and what `convert` raises."""
    from diskmorph.convert.job import convert  # noqa: PLC0415 - loads the pipeline
    from diskmorph.convert.routes import converter  # noqa: PLC0415 - which takes this module

    options = options or ConvertOptions()
    url = os.fspath(target)
    _require_fit(url, options)
    if is_export(url):
        if isinstance(source, list | tuple):
            raise OptionError("several sources make a package, which an NBD export is not")
        return convert(source, url, options=options, on_progress=on_progress)  # type: ignore[arg-type]
    from diskmorph.formats.remote.s3 import split  # noqa: PLC0415

    name = Path(split(url)[1]).name
    chosen = converter(source, name, options)
    if chosen is convert:
        return convert(source, url, options=options, on_progress=on_progress)  # type: ignore[arg-type]
    return _by_file(chosen, source, url, options, on_progress)


def _require_fit(url: str, options: ConvertOptions) -> None:
    if not is_export(url) and not url.lower().startswith("s3://"):
        raise OptionError(f"{url} cannot be written to", hint="s3://, nbd:// and nbd+unix:// can")
    if url.endswith("/") and not is_export(url):
        raise OptionError(f"{url} names a folder", hint="write s3://BUCKET/KEY")
    for asked, word in ((options.base, "-B"), (options.keep_chain, "--keep-chain")):
        if asked:
            raise OptionError(f"{word} writes overlays, which name their parents by path: {url} has none beside it")
    if options.device:
        raise OptionError("--device goes with the name of a block device")


def _by_file(
    chosen: Callable[..., ConvertReport],
    source: object,
    url: str,
    options: ConvertOptions,
    on_progress: Callable[[Progress], None] | None,
) -> ConvertReport:
    """Make the files in a folder of their own, then send them; the one that was named last."""
    from diskmorph.formats.remote.s3 import client  # noqa: PLC0415
    from diskmorph.formats.remote.s3_target import require_free, send_file  # noqa: PLC0415

    folder_url, _, name = url.rpartition("/")
    s3 = client()
    if not options.force:
        require_free(s3, url)
    with tempfile.TemporaryDirectory(prefix="diskmorph-") as folder:
        made = Path(folder) / name
        local = replace(options, sync=False)
        report = chosen(source, str(made), options=local, on_progress=on_progress)
        if options.dry_run:
            return replace(report, target=url)
        files = sorted(Path(folder).iterdir(), key=lambda path: path == made)
        if any(path.is_dir() for path in files):
            raise UnsupportedError("is a folder, which S3 has not", feature="folders in S3", file=url)
        for path in files:
            send_file(s3, path, f"{folder_url}/{path.name}", force=options.force)
    return replace(report, target=url)


def new_url_target(plan: Plan) -> Target:
    """Return what a plan with a URL as target writes to. Raises TargetError, UnsupportedError."""
    allocator, options = plan.allocator, plan.options
    if is_export(plan.target):
        if plan.format.name != "raw":
            raise UnsupportedError(
                f"an NBD export takes plain bytes, not {plan.format.name}",
                feature="formats in NBD exports",
                file=plan.target,
                hint="leave out -O, or let qemu-nbd serve an image of that format",
            )
        from diskmorph.formats.remote.nbd_target import NbdTarget  # noqa: PLC0415 - what is used is loaded

        return NbdTarget(plan.target, allocator.size, sync=options.sync)
    from diskmorph.formats.remote.s3_target import S3Target  # noqa: PLC0415

    most = allocator.size + allocator.size // 32 + _SLACK
    streamed = allocator.sequential and not options.verify  # a stream cannot be read back
    return S3Target(plan.target, allocator.members, most, streamed=streamed, force=options.force)
