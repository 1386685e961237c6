"""XFS file systems, versions 4 and 5, read as trees."""

from __future__ import annotations

from diskmorph.formats.xfs.reader import read_xfs

__all__ = ["read_xfs"]
