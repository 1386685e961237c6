"""Container images: OCI layouts and archives, docker-archives; read with their layers merged, written reproducibly."""

from __future__ import annotations

from diskmorph.formats.oci.archive import archive_format
from diskmorph.formats.oci.image import Image, Layer, open_image

__all__ = ["Image", "Layer", "archive_format", "open_image"]
