"""What an importer would refuse of a bare disk image: the same rules as `--for`, of convert/targets.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.convert import lint_vmdk
from diskmorph.convert.lint_facts import vmdk_facts
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
        if opened.format == "vmdk" and len(opened.layers) == 1:
            yield from _of_vmdk(opened, profile, str(path), mend)


_VMDK_RULES = (
    ("vmdk-version", {"esxi", "aws"}, lint_vmdk.versions),
    ("vmdk-trailing", {"esxi", "aws"}, lint_vmdk.ends),
    ("vmdk-adapter", {"esxi"}, lint_vmdk.adapters),
)


def _of_vmdk(opened: Opened, profile: Profile, name: str, mend: str) -> Iterator[tuple[str, str, str, str]]:
    source = opened.disk.files[0]
    facts = vmdk_facts(source)
    if facts is None:
        return
    vmdk = lint_vmdk.Judged(name, source.size, facts, mend)
    for rule, targets, judge in _VMDK_RULES:
        if profile.name in targets:
            yield from ((rule, *found) for found in judge(vmdk))


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
