"""Disks in the shapes that importers take: a route for the profiles whose disk has something round it.

The disk itself goes through the usual pipeline, into a file without a name where it must be put into an archive
afterwards, since an archive's header says how long a member is.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.copy import run
from diskmorph.convert.job import transfer_of
from diskmorph.convert.options import ConvertOptions, ConvertReport, Moved, Progress
from diskmorph.convert.plan import STDOUT, make_plan
from diskmorph.convert.targets import profile_named
from diskmorph.formats.allocator import Identity
from diskmorph.formats.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.convert.plan import Plan
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.output import Target

    OnProgress = Callable[[Progress], None] | None


@dataclass(slots=True)
class Shaping:
    """One conversion into a shape: the inner disk's plan, the archive's path, the time that its members have."""

    plan: Plan
    target: str
    words: dict[str, str]
    mtime: int
    on_progress: OnProgress
    begun: float

    @property
    def options(self) -> ConvertOptions:
        """What was asked for."""
        return self.plan.options

    def tell(self, done: int) -> None:
        """Say how far it is, in bytes of what is put into the archive."""
        if self.on_progress is not None:
            self.on_progress(Progress("pack", done, max(self.plan.disk.size, done)))

    def write_inner(self, target: Target | None) -> tuple[Moved, tuple[int, ...]]:
        """Convert the disk into the target (None: only find out how large it is); verify it if that was asked for."""
        plan = self.plan
        moved = run(transfer_of(plan), target, None, self.on_progress)
        sizes = tuple(plan.allocator.sizes())
        plan.source.disk.verify_unchanged()
        if target is not None and self.options.verify:
            from diskmorph.convert.verify import verify  # noqa: PLC0415 - only when asked for

            verify(plan, target, sizes, self.on_progress)
        return moved, sizes

    def report(self, format: str, stored: int, moved: Moved, members: tuple[str, ...], *notes: str) -> ConvertReport:
        """Return what was done."""
        plan = self.plan
        digest = None
        if self.options.digest:
            from diskmorph.convert.digest import content_digest  # noqa: PLC0415 - only when asked for

            digest = content_digest(plan.disk)
        return ConvertReport(
            source=plan.source.name,
            target=self.target,
            format=format,
            virtual_size=plan.disk.size,
            stored_size=stored,
            bytes=moved,
            seconds=time.monotonic() - self.begun,
            verified=self.options.verify and not self.options.dry_run,
            lost=plan.lost,
            notes=(*plan.notes, *notes),
            digest=digest,
            members=members,
        )


def disk_to_shape(
    source: str | os.PathLike[str] | Disk,
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: OnProgress = None,
) -> ConvertReport:
    """Write a disk in the shape that `options.profile` names; otherwise as `convert`, and raises what that raises.

    `-o` words: `split` (incus), `name`, `architecture`, `description` beside those of the disk's format.
    """
    begun = time.monotonic()
    options = options or ConvertOptions()
    profile = profile_named(options.profile or "")
    name = os.fspath(target)
    if name == STDOUT or options.device or options.base is not None:
        raise OptionError(
            f"the shape for {profile.title} is a file of its own: neither a pipe, a device nor an overlay"
        )
    _refuse_trees(source)
    words = {key: value for key, value in options.format_options.items() if key in _WORDS}
    rest = {key: value for key, value in options.format_options.items() if key not in _WORDS}
    inner = Path(_path_of(name)).parent / f".{_stem(name)}.{profile.format}"
    with make_plan(source, inner, replace(options, format_options=rest)) as plan:
        plan.source.refuse_to_write(Path(_path_of(name)))
        mtime = int(Identity(b"shape" if options.reproducible else None).time())
        shaping = Shaping(plan, name, words, mtime, on_progress, begun)
        if profile.shape == "gcp":
            from diskmorph.convert.cloud_gcp import write_gcp  # noqa: PLC0415 - one of several

            return write_gcp(shaping)
        if profile.shape == "kubevirt":
            from diskmorph.convert.cloud_oci import write_kubevirt  # noqa: PLC0415

            return write_kubevirt(shaping)
        from diskmorph.convert.cloud_boxes import write_incus, write_vagrant  # noqa: PLC0415

        return write_vagrant(shaping) if profile.shape == "vagrant" else write_incus(shaping)


_WORDS = frozenset({"split", "name", "architecture", "description"})


def _path_of(target: str) -> str:
    """Return the path in `oci:DIR:TAG` and the like, or the name as it is."""
    for word in ("oci-archive:", "oci:"):
        if target.startswith(word):
            return target.removeprefix(word).split(":", 1)[0]
    return target


def _stem(target: str) -> str:
    return Path(_path_of(target)).name.split(".")[0][:100] or "disk"


def _refuse_trees(source: str | os.PathLike[str] | Disk) -> None:
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        raise UnsupportedError(
            "is a directory, not a disk",
            feature="trees",
            file=os.fspath(source),
            hint="`diskmorph build` makes a disk of it first",
        )
