"""What `info` tells of LVM2 on a disk: volume groups, what they lie on, their logical volumes and what those hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import DiskmorphError
from diskmorph.formats.roots import volumes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.lvm import VolumeGroup
    from diskmorph.formats.roots import Volume


def describe(disk: Disk, warnings: list[str]) -> tuple[dict[str, Any], ...]:
    """Return the volume groups on a disk as docs/json.md has them; what cannot be read becomes a warning."""
    try:
        volumes = volumes_of(disk)
    except DiskmorphError as error:
        warnings.append(f"the logical volumes cannot be read: {error}")
        return ()
    warnings.extend(f"LVM2: {volume.failure}" for volume in volumes if volume.failure is not None)
    groups = {id(volume.group): volume.group for volume in volumes if volume.group is not None}
    return tuple(_group(group, volumes) for group in groups.values())


def _group(group: VolumeGroup, volumes: Sequence[Volume]) -> dict[str, Any]:
    partitions = {id(volume.disk): volume.partition for volume in volumes if volume.logical is None}
    members = []
    for member in group.members:
        partition = partitions.get(id(member.disk))
        members.append(
            {
                "uuid": member.uuid,
                "size": member.extents * group.extent_size,
                "missing": member.disk is None,
                "partition": partition and partition.number,
            }
        )
    return {
        "name": group.name,
        "uuid": group.uuid,
        "extent_size": group.extent_size,
        "physical_volumes": members,
        "logical_volumes": [_logical(volume) for volume in volumes if volume.group is group],
    }


def _logical(volume: Volume) -> dict[str, Any]:
    logical, found = volume.logical, volume.filesystem
    assert logical is not None  # noqa: S101 - what has a group is logical
    return {
        "name": logical.name,
        "uuid": logical.uuid,
        "size": logical.size,
        "type": logical.kind,
        "readable": volume.failure is None,
        "filesystem": found and found.type,
        "filesystem_label": found and found.label,
        "filesystem_uuid": found and found.uuid,
    }
