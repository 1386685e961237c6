"""Virtual PC, Hyper-V and Azure disk images: fixed, dynamic, differencing."""

from diskmorph.formats.vhd.check import check_image
from diskmorph.formats.vhd.reader import open_image
from diskmorph.formats.vhd.writer import OPTIONS, SUBFORMATS, new_allocator

__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
