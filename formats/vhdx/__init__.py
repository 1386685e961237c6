"""VHDX: Hyper-V's disk format since 2012, by [MS-VHDX]."""

from diskmorph.formats.vhdx.check import check_image
from diskmorph.formats.vhdx.reader import open_image
from diskmorph.formats.vhdx.writer import OPTIONS, SUBFORMATS, new_allocator

__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
