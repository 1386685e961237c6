"""`--for TARGET`: the shape that a cloud or hypervisor takes, as data, and what taking that shape changes.

Of each product's documentation: Azure wants a fixed VHD of whole MiB, Compute Engine a tarball of whole GiB, ESXi a
streamOptimized VMDK with a SCSI adapter, Hyper-V VHDX, VirtualBox VDI (it opens VMDK and VHD too), OpenStack and
Proxmox qcow2, KubeVirt a container image that holds a qcow2, Vagrant and Incus tarballs round one, WSL a root file
system in a tar archive, Firecracker a kernel and a root image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.formats.errors import OptionError
from diskmorph.formats.probe import format_of_suffix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.convert.options import ConvertOptions

_MIB, _GIB = 1 << 20, 1 << 30
_STREAM = {"subformat": "streamOptimized"}
_ESXI = {"subformat": "streamOptimized", "adapter_type": "lsilogic"}


@dataclass(frozen=True, slots=True)
class Profile:
    """What a target takes.

    - `name`, `title`: for the command line, for people.
    - `formats`: the formats that it takes with the options that they must have, the default first.
    - `multiple`: sizes are multiples of so many bytes.
    - `shape`: what stands round the disk: "disk" (nothing), or a shape of convert/cloud.py; `packages`: OVA too.
    """

    name: str
    title: str
    formats: Mapping[str, Mapping[str, str]]
    multiple: int = 512
    shape: str = "disk"
    packages: bool = False

    @property
    def format(self) -> str:
        """The format that is written when nothing else was asked for."""
        return next(iter(self.formats))

    def takes(self) -> str:
        """Return its formats for people."""
        return " or ".join(self.formats)


PROFILES: tuple[Profile, ...] = (
    Profile("azure", "Azure", {"vhd": {"subformat": "fixed"}}, _MIB),
    Profile("gcp", "Compute Engine", {"raw": {}}, _GIB, "gcp"),
    Profile("aws", "AWS (VM Import)", {"vmdk": _STREAM, "raw": {}, "vhd": {}, "vhdx": {}}, packages=True),
    Profile("openstack", "OpenStack", {"qcow2": {}, "raw": {}}),
    Profile("esxi", "VMware ESXi", {"vmdk": _ESXI}, packages=True),
    Profile("virtualbox", "VirtualBox", {"vdi": {}, "vmdk": {}, "vhd": {}}, packages=True),
    Profile("hyperv", "Hyper-V", {"vhdx": {}, "vhd": {}}, _MIB),
    Profile("proxmox", "Proxmox VE", {"qcow2": {}, "raw": {}}, packages=True),
    Profile("kubevirt", "KubeVirt", {"qcow2": {}}, shape="kubevirt"),
    Profile("vagrant-libvirt", "Vagrant (libvirt)", {"qcow2": {}}, shape="vagrant"),
    Profile("incus", "Incus", {"qcow2": {}}, shape="incus"),
    Profile("wsl", "WSL", {"tar": {}}, shape="wsl"),
    Profile("firecracker", "Firecracker", {"raw": {}}, shape="firecracker"),
)


def profile_named(name: str) -> Profile:
    """Return the profile of that name. Raises OptionError."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    known = ", ".join(profile.name for profile in PROFILES)
    raise OptionError(f"unknown target {name!r} for --for", hint=f"one of {known}")


def applied(options: ConvertOptions, target: str = "") -> tuple[ConvertOptions, Profile | None]:
    """Return the options with what `options.profile` says filled in; what the user asked for himself stays.

    The format is the one asked for, else the one that the suffix of `target` names where the product takes it, else
    the product's first. Raises OptionError where it does not take the format that was asked for, or an option's value.
    """
    if options.profile is None:
        return options, None
    profile = profile_named(options.profile)
    wanted = options.target_format or _by_suffix(target, profile) or profile.format
    if wanted not in profile.formats:
        raise OptionError(f"{profile.title} does not take {wanted}", hint=f"it takes {profile.takes()}")
    must = profile.formats[wanted]
    for word, value in must.items():
        if options.format_options.get(word, value) != value:
            raise OptionError(
                f"{profile.title} does not take {word}={options.format_options[word]}", hint=f"{word}={value}"
            )
    return replace(options, target_format=wanted, format_options={**must, **options.format_options}), profile


def _by_suffix(target: str, profile: Profile) -> str | None:
    found = format_of_suffix(target)
    return found.name if found is not None and found.name in profile.formats else None


def padded(size: int, profile: Profile | None) -> int:
    """Return the size that the target wants for a disk of `size` bytes."""
    return size if profile is None else -(-size // profile.multiple) * profile.multiple


def changes(profile: Profile | None, options: ConvertOptions, target: str, before: int, after: int) -> tuple[str, ...]:
    """Return, for people, what the target's rules change: format and options, and the size in bytes.

    `options` are those that `applied` returned.
    """
    if profile is None:
        return ()
    words = ", ".join(f"{word}={value}" for word, value in profile.formats[options.target_format or ""].items())
    said = [f"for {profile.title}: {options.target_format}{f' ({words})' if words else ''}"]
    named = format_of_suffix(target)
    if named is not None and profile.shape == "disk" and named.name != options.target_format:
        said.append(
            f"{Path(target).name} is called like {named.name}, but {profile.title} takes {options.target_format}"
        )
    if after != before and after % profile.multiple == 0 and before % profile.multiple:
        said.append(
            f"the disk grows from {before} to {after} bytes: {profile.title} takes multiples of {profile.multiple}"
        )
    return tuple(said)
