"""ext2, ext3 and ext4 file systems: trees written as ext4 without copying what the files hold, and read back."""

from __future__ import annotations

from diskmorph.formats.ext4.writer import Ext4Options, Ext4Writer

__all__ = ["Ext4Options", "Ext4Writer"]
