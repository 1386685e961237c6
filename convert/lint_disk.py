"""What an importer would refuse of a bare disk image: the same rules as `--for`, of convert/targets.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.convert.opening import open_source
from diskmorph.convert.targets import PROFILES, padded, profile_named

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from diskmorph.convert.opening import Opened
    from diskmorph.convert.targets import Profile
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.policy import Allowed

DISK_TARGETS = tuple(profile.name for profile in PROFILES if profile.shape not in {"wsl", "firecracker"})
"""Targets that take disks."""


def disk_findings(
    path: str | os.PathLike[str], target: str, *, parents: Allowed = None, limits: Limits | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (rule, message, place, hint) for what the target would refuse. Raises what opening raises."""
    profile = profile_named(target)
    with open_source(path, parents=parents, limits=limits) as opened:
        mend = f"write it anew with `diskmorph convert --for {target}`"
        for rule, message in _judged(opened, profile):
            yield rule, message, str(path), mend


def _judged(opened: Opened, profile: Profile) -> Iterator[tuple[str, str]]:
    info = opened.info
    if len(opened.layers) > 1:
        yield "disk-parent", "is an overlay; importers take whole disks"
    if info is not None and "compressed_by" in info.features and profile.shape == "disk":
        yield "disk-wrapper", "is compressed as one file"
    if opened.format not in profile.formats:
        yield "disk-format", f"is {opened.format}; {profile.title} takes {profile.takes()}"
        return
    wanted = profile.formats[opened.format].get("subformat")
    if wanted is not None and info is not None and info.subformat != wanted:
        yield "disk-subformat", f"is {info.subformat}; {profile.title} takes {wanted}"
    if padded(opened.disk.size, profile) != opened.disk.size:
        yield "disk-size", f"has {opened.disk.size} bytes, which is no multiple of {profile.multiple}"
