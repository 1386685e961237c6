"""LVM2 volume groups, read: linear logical volumes as disks."""

from __future__ import annotations

from diskmorph.formats.lvm.group import Groups, LogicalVolume, VolumeGroup, groups_of

__all__ = ["Groups", "LogicalVolume", "VolumeGroup", "groups_of"]
