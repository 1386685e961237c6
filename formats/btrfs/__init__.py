"""btrfs file systems of one device, read as trees: subvolumes, compression by zlib, lzo and zstd."""

from __future__ import annotations

from diskmorph.formats.btrfs.reader import read_btrfs

__all__ = ["read_btrfs"]
