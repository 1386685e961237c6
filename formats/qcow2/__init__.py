"""qcow2, QEMU's copy-on-write format, versions 2 and 3 (docs/formats/qcow2.md)."""

from diskmorph.formats.qcow2.reader import open_image

__all__ = ["open_image"]
