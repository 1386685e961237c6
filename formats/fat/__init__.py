"""FAT file systems: FAT12, FAT16 and FAT32 read as trees, FAT16 and FAT32 written."""

from __future__ import annotations

from diskmorph.formats.fat.reader import read_fat
from diskmorph.formats.fat.writer import FatOptions, fat_disk

__all__ = ["FatOptions", "fat_disk", "read_fat"]
