"""VMDK: VMware's virtual disks, of one file or many (docs/formats/vmdk.md)."""

from diskmorph.formats.vmdk.reader import open_image

__all__ = ["open_image"]
