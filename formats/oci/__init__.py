"""Container images: OCI layouts and archives, docker-archives; read with their layers merged, written reproducibly."""

from __future__ import annotations

from diskmorph.formats.oci.archive import archive_format

__all__ = ["archive_format"]
