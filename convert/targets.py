"""`--for TARGET`: the disk shape that a cloud or hypervisor takes, as data.

FORMATS.md of each product: Azure wants a fixed VHD of whole MiB, Compute Engine a whole number of GiB, ESXi a
streamOptimized VMDK with a SCSI adapter, Hyper-V VHDX, VirtualBox VDI, OpenStack and Proxmox qcow2.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diskmorph.formats.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.convert.options import ConvertOptions

_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Profile:
    """What a target takes: the format with its options, sizes as multiples of `multiple` bytes, a name for people."""

    name: str
    title: str
    format: str
    options: Mapping[str, str] = field(default_factory=dict)
    multiple: int = 512
    compress: str | None = None
    formats: tuple[str, ...] = ()
    """Other formats that the target takes as well, when `-O` asks for one."""


PROFILES: tuple[Profile, ...] = (
    Profile("azure", "Azure", "vhd", {"subformat": "fixed"}, _MIB),
    Profile("gcp", "Google Compute Engine", "raw", {}, _GIB),
    Profile("aws", "AWS (VM Import)", "vmdk", {"subformat": "streamOptimized"}, 512, None, ("raw", "vhd", "vhdx")),
    Profile("openstack", "OpenStack", "qcow2", {}, 512, None, ("raw",)),
    Profile("esxi", "VMware ESXi", "vmdk", {"subformat": "streamOptimized", "adapter_type": "lsilogic"}),
    Profile("virtualbox", "VirtualBox", "vdi"),
    Profile("hyperv", "Hyper-V", "vhdx", {}, _MIB, None, ("vhd",)),
    Profile("proxmox", "Proxmox VE", "qcow2", {}, 512, None, ("raw",)),
)


def profile_named(name: str) -> Profile:
    """Return the profile of that name. Raises OptionError."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    known = ", ".join(profile.name for profile in PROFILES)
    raise OptionError(f"unknown target {name!r} for --for", hint=f"one of {known}")


def applied(options: ConvertOptions) -> tuple[ConvertOptions, Profile | None]:
    """Return the options with what `options.profile` says filled in; what the user asked for himself stays.

    Raises OptionError where the target does not take the format that was asked for.
    """
    if options.profile is None:
        return options, None
    profile = profile_named(options.profile)
    wanted = options.target_format or profile.format
    if wanted == profile.format:
        words = {**profile.options, **options.format_options}
        return replace(options, target_format=wanted, format_options=words), profile
    if wanted not in profile.formats:
        takes = " or ".join((profile.format, *profile.formats))
        raise OptionError(f"{profile.title} does not take {wanted}", hint=f"it takes {takes}")
    return replace(options, target_format=wanted), profile


def padded(size: int, profile: Profile | None) -> int:
    """Return the size that the target wants for a disk of `size` bytes."""
    return size if profile is None else -(-size // profile.multiple) * profile.multiple
