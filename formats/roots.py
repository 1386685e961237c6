"""Finds the root file system of a disk, and merges what its fstab mounts on it (/boot, /usr, /var, ...)."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diskmorph.formats import fsprobe, gpt
from diskmorph.formats.errors import DiskmorphError, FormatError, SourceError
from diskmorph.formats.limits import Limits
from diskmorph.formats.views import Slice
from diskmorph.formats.volumes import open_volume, readable, unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.fsprobe import FileSystem
    from diskmorph.formats.gpt import Partition
    from diskmorph.formats.lvm import LogicalVolume, VolumeGroup
    from diskmorph.formats.tree import Tree

# Discoverable Partitions Specification; the machine's own architecture comes first.
ROOT_TYPES = {
    "x86_64": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "aarch64": "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
    "i686": "44479540-F297-41B2-9AF7-D131D5F0458A",
    "armv7l": "69DAD710-2CE4-4E3C-B16C-21A1D49ABED3",
    "riscv64": "72EC70A6-CF74-40E6-BD49-4BDA08E8F224",
    "ppc64le": "C31C45E6-3F39-412E-80FB-4809C4980599",
    "s390x": "5EEAD9A9-FE09-4A1E-A1D7-520D00531306",
}
_ENCRYPTED = ("luks", "bitlocker", "mdraid", "lvm2")
_LARGEST_TEXT = 1 << 20
_NOT_MERGED = (b"/", b"/proc", b"/sys", b"/dev", b"/run", b"/tmp")


@dataclass(frozen=True, slots=True)
class Volume:
    """A partition, a logical volume of a group, or a whole disk (neither), and the file system that it holds.

    `failure`: why it cannot be read: a logical volume's type, damaged LVM2 metadata.
    """

    disk: Disk
    partition: Partition | None
    filesystem: FileSystem | None
    logical: LogicalVolume | None = None
    group: VolumeGroup | None = None
    failure: DiskmorphError | None = None

    @property
    def label(self) -> str:
        """What `--partition` calls it: a number, or GROUP/NAME; empty for a whole disk."""
        if self.logical is not None:
            return f"{self.logical.group}/{self.logical.name}"
        return "" if self.partition is None else str(self.partition.number)

    def open(self, limits: Limits | None) -> Tree:
        """Return its tree."""
        if self.failure is not None:
            raise self.failure
        return open_volume(self.disk, limits=limits)


def volumes_of(disk: Disk, limits: Limits | None = None) -> list[Volume]:
    """Return the partitions of a disk with what they hold, and the logical volumes on them.

    Of a disk without a partition table the disk itself comes first.
    """
    found = _partitions(disk)
    held = [volume for volume in found if volume.filesystem is not None and volume.filesystem.type == "lvm2"]
    if not held:
        return found
    from diskmorph.formats.lvm import groups_of  # noqa: PLC0415 - loaded where there are physical volumes

    groups = groups_of([volume.disk for volume in held], limits or Limits(), name=disk.name)
    failures = {id(held[number]): error for number, error in groups.failures.items()}
    found = [replace(volume, failure=failures.get(id(volume))) for volume in found]
    for group in groups.groups:
        for logical in group.volumes:
            inside = None if logical.disk is None else fsprobe.probe(logical.disk)
            found.append(Volume(logical.disk or disk, None, inside, logical, group, logical.failure))
    return found


def _partitions(disk: Disk) -> list[Volume]:
    whole = fsprobe.probe(disk)
    if whole is not None and readable(whole) and whole.type != "iso9660":
        return [Volume(disk, None, whole)]
    table = gpt.read_table(disk)
    if table is None or not table.partitions:
        return [Volume(disk, None, whole)]
    found = []
    for partition in table.partitions:
        if partition.stop > disk.size or not partition.length or partition.type in {"0x05", "0x0f", "0x85"}:
            continue
        part = Slice(disk, partition.start, partition.length, f"{disk.name}, partition {partition.number}")
        found.append(Volume(part, partition, fsprobe.probe(part)))
    return found


def open_root(disk: Disk, *, partition: int | str | None = None, limits: Limits | None = None) -> Tree:
    """Return the tree of a disk's root file system, with what its fstab mounts on it from the same disk.

    `partition` decides, by the number of a partition or the GROUP/NAME of a logical volume, and nothing is merged. The
    tree owns the disk. Raises SourceError (no such partition, no root found), UnsupportedError (encryption, RAID and
    the like, by name), FormatError.
    """
    volumes = volumes_of(disk, limits)
    if partition is not None:
        return _chosen(disk, volumes, str(partition)).open(limits)
    if len(volumes) == 1 and volumes[0].partition is None:
        return volumes[0].open(limits)
    root = _root_of(disk, volumes, limits)
    for volume, place in _mounts(root, volumes):
        _merge(root, volume, place, limits)
    return root


def _chosen(disk: Disk, volumes: Sequence[Volume], wanted: str) -> Volume:
    found = [volume for volume in volumes if volume.label and volume.label == wanted.removeprefix("/dev/")]
    if len(found) > 1:
        raise SourceError(f"has two logical volumes {wanted}", file=disk.name)
    if not found:
        names = ", ".join(volume.label for volume in volumes if volume.label)
        what = "logical volume" if "/" in wanted else "partition"
        raise SourceError(f"has no {what} {wanted}", file=disk.name, hint=f"it has {names or 'none'}")
    return found[0]


def _root_of(disk: Disk, volumes: Sequence[Volume], limits: Limits | None) -> Tree:
    own = ROOT_TYPES.get(platform.machine())
    for types in ({own}, set(ROOT_TYPES.values())):
        typed = [v for v in volumes if v.partition is not None and v.partition.type in types]
        if typed:
            return typed[0].open(limits)
    candidates = [v for v in volumes if readable(v.filesystem)]
    trees: list[Tree] = []
    failure: DiskmorphError | None = None
    for volume in candidates:
        try:
            tree = volume.open(limits)
            if tree.find("etc/fstab") is not None and _has_release(tree):
                return tree
            trees.append(tree)
        except FormatError as error:
            failure = error
    likely = [tree for tree in trees if _has_release(tree) or tree.find("etc/passwd") is not None]
    if likely:
        return likely[0]
    failure = failure or next((volume.failure for volume in volumes if volume.failure is not None), None)
    if failure is not None:
        raise failure
    _require_open(volumes)
    if len(trees) == 1:
        return trees[0]
    raise _no_root(disk, volumes)


def _require_open(volumes: Sequence[Volume]) -> None:
    """Raise UnsupportedError if a root may lie in what cannot be looked into."""
    entered = {id(member.disk) for v in volumes if v.group is not None for member in v.group.members}
    for volume in volumes:
        held = volume.filesystem
        if held is not None and held.type in _ENCRYPTED and id(volume.disk) not in entered:
            raise unsupported(held.type, volume.disk.name)


def _no_root(disk: Disk, volumes: Sequence[Volume]) -> SourceError:
    held = ", ".join(f"{v.label}: {v.filesystem.type if v.filesystem else 'nothing known'}" for v in volumes if v.label)
    return SourceError(
        "has no partition that looks like a root", file=disk.name, hint=f"choose by --partition N ({held})"
    )


def _has_release(tree: Tree) -> bool:
    return any(tree.find(name) is not None for name in ("etc/os-release", "usr/lib/os-release"))


def os_of(tree: Tree) -> dict[str, str] | None:
    """Return `id`, `version_id` and `name` (PRETTY_NAME) of a root's os-release; None where there is none."""
    found = os_release(tree)
    if not found:
        return None
    return {
        "id": found.get("ID", "linux"),
        "version_id": found.get("VERSION_ID", ""),
        "name": found.get("PRETTY_NAME", ""),
    }


def os_release(tree: Tree) -> dict[str, str]:
    """Return the fields of a root's os-release; empty where there is none."""
    node = tree.find("etc/os-release") or tree.find("usr/lib/os-release")
    if node is None or node.kind != 0o100000 or node.size > _LARGEST_TEXT:
        return {}
    found = {}
    for line in node.read().decode("utf-8", "replace").splitlines():
        name, sign, value = line.strip().partition("=")
        if sign and name and not name.startswith("#"):
            found[name] = value.strip("\"'")
    return found


def _mounts(root: Tree, volumes: Sequence[Volume]) -> Iterator[tuple[Volume, bytes]]:
    """Yield the volumes that the root's fstab mounts, with their places, the outer before the inner."""
    node = root.find("etc/fstab")
    if node is None or node.kind != 0o100000 or node.size > _LARGEST_TEXT:
        return
    found = []
    for line in node.read().splitlines():
        words = line.split()
        if len(words) < 3 or words[0].startswith(b"#") or not words[1].startswith(b"/"):
            continue
        place = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 255]), words[1]).rstrip(b"/") or b"/"
        volume = next((v for v in volumes if _is(v, words[0].decode("utf-8", "replace"))), None)
        if volume is None or place in _NOT_MERGED or words[2] == b"swap":
            continue
        if volume.failure is None and readable(volume.filesystem):
            found.append((volume, place))
        else:
            kind = volume.logical.kind if volume.filesystem is None and volume.logical else None
            kind = kind or (volume.filesystem.type if volume.filesystem else "unknown")
            root.lost.append(f"{place.decode(errors='backslashreplace')}, mounted from {volume.label} ({kind})")
    yield from sorted(found, key=lambda mount: mount[1].count(b"/"))


def _is(volume: Volume, device: str) -> bool:
    """Return whether an fstab's first word means this volume."""
    partition, logical, held = volume.partition, volume.logical, volume.filesystem
    if logical is not None and device in logical.paths:
        return True
    if held is None or (partition is None and logical is None):
        return False
    device = device.removeprefix("/dev/disk/by-")
    kind, _, value = device.replace("/", "=", 1).partition("=") if "=" not in device else device.partition("=")
    value = value.strip('"')
    same = {
        "uuid": held.uuid,
        "label": held.label,
        "partuuid": partition.uuid if partition else None,
        "partlabel": (partition.name or None) if partition else None,
    }.get(kind.lower())
    if same is not None:
        return same.lower() == value.lower()
    if partition is None:
        return False
    return re.fullmatch(rf"/dev/(?:[svhx]+d[a-z]+|(?:nvme\dn\d|mmcblk\d)p){partition.number}", device) is not None


def _merge(root: Tree, volume: Volume, place: bytes, limits: Limits | None) -> None:
    tree = volume.open(limits)
    root.remove(place)
    root.put(place, tree.root)
    tree.root.children.pop(b"lost+found", None)
    root.lost.extend(tree.lost)
