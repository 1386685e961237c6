"""VirtualBox disk images: dynamic, static, differencing."""

from diskmorph.formats.vdi.check import check_image
from diskmorph.formats.vdi.reader import open_image
from diskmorph.formats.vdi.writer import OPTIONS, SUBFORMATS, new_allocator

__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
