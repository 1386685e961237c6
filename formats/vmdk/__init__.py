"""VMDK: VMware's virtual disks, of one file or many (docs/formats/vmdk.md)."""

from diskmorph.formats.vmdk.check import check_image
from diskmorph.formats.vmdk.reader import open_image
from diskmorph.formats.vmdk.settings import OPTIONS, SUBFORMATS
from diskmorph.formats.vmdk.writer import new_allocator

__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
