"""Reading a target back before it gets its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.compare import compare_disks
from diskmorph.convert.opening import open_source
from diskmorph.formats.errors import IntegrityError, OptionError
from diskmorph.formats.output import FileMember
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.source import ByteSource, FileSource
from diskmorph.formats.views import Slice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diskmorph.convert.options import Progress
    from diskmorph.convert.plan import Plan
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.output import Target


class _Unnamed(FileSource):
    """A file that is being written and has no name yet, read as if it had."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(f"/proc/self/fd/{descriptor}", shared=True)
        self.name = str(path)
        self._named = path

    @property
    def path(self) -> Path:
        """Return the path that the file will have."""
        return self._named


@dataclass(frozen=True)
class _TargetOpener(Opener):
    """Opens a target's other members by the names that they will have."""

    members: Mapping[str, int] = field(default_factory=dict)

    def sibling(self, name: str, near: ByteSource, what: str = "extent") -> FileSource:
        """See Opener."""
        found = self.members.get(name)
        if found is None or near.path is None:
            return super().sibling(name, near, what)
        return _Unnamed(found, near.path.parent / name)


def verify(
    plan: Plan, target: Target, sizes: Sequence[int], on_progress: Callable[[Progress], None] | None = None
) -> None:
    """Read the target back, whole, and compare it with the source. Raises IntegrityError where they differ."""
    members = list(target.members)
    remote = members[0].reread() if len(members) == 1 else None
    if remote is not None:
        _verify_remote(plan, remote, on_progress)
        return
    if not all(member.fileno() is not None for member in members):
        raise OptionError("standard output cannot be read back", hint="leave out --verify, or write to a file")
    for member, size in zip(members, sizes, strict=True):
        if isinstance(member, FileMember):
            member.resize(size)
    descriptors = {Path(member.name).name: member.fileno() or 0 for member in members}
    backing = Path(plan.base.name) if plan.base is not None else None
    passphrase = plan.options.target_passphrase or plan.options.parents.passphrase
    parents = Parents(plan.options.parents.allow, backing, shared=True, passphrase=passphrase)
    opener = _TargetOpener(parents, plan.options.limits, members=descriptors)
    first = _Unnamed(members[0].fileno() or 0, Path(members[0].name))
    with open_source("", format=plan.format.name, limits=plan.options.limits, opener=opener, source=first) as written:
        if written.disk.size < plan.disk.size:
            raise IntegrityError(
                "what was written is shorter", file=plan.target, expected=plan.disk.size, found=written.disk.size
            )
        _require_same(plan, written.disk, on_progress)


def _verify_remote(plan: Plan, source: ByteSource, on_progress: Callable[[Progress], None] | None) -> None:
    """Compare what lies at the beginning of something that may be larger."""
    with open_source("", format=plan.format.name, limits=plan.options.limits, source=source) as written:
        _require_same(plan, Slice(written.disk, 0, plan.disk.size), on_progress)


def _require_same(plan: Plan, written: Disk, on_progress: Callable[[Progress], None] | None) -> None:
    result = compare_disks(plan.disk, written, max_ranges=1, threads=plan.options.threads, on_progress=on_progress)
    if not result.identical:
        raise IntegrityError(
            "what was written does not read back as the source",
            file=plan.target,
            offset=result.first_difference,
        )
