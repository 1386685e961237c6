"""tar archives as trees: ustar, GNU and PAX headers read; deterministic PAX archives written as disks of ranges."""

from __future__ import annotations

from diskmorph.formats.tar.reader import Member, members, read_tar
from diskmorph.formats.tar.schema import is_tar
from diskmorph.formats.tar.writer import TarOptions, tar_disk

__all__ = ["Member", "TarOptions", "is_tar", "members", "read_tar", "tar_disk"]
