"""VHDX: Hyper-V's disk format since 2012, by [MS-VHDX]."""

from diskmorph.formats.vhdx.reader import open_image

__all__ = ["open_image"]
