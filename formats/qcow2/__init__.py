"""qcow2, QEMU's copy-on-write format, versions 2 and 3 (docs/formats/qcow2.md)."""

from diskmorph.formats.qcow2.check import check_image
from diskmorph.formats.qcow2.options import OPTIONS, SUBFORMATS
from diskmorph.formats.qcow2.reader import open_image
from diskmorph.formats.qcow2.writer import new_allocator

__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
