"""The files of a container image by name, whether they lie in a directory or in a tar archive."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from diskmorph.formats.errors import DiskmorphError
from diskmorph.formats.tar import members

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource

# What may stand in an image archive: index and manifest, blobs, and the older one directory a layer.
_NAMES = re.compile(
    rb"(?:\./)?(?:|manifest\.json|repositories|oci-layout|index\.json|blobs(?:/.*)?|(?:sha256:)?[0-9a-f]{64}(?:[./].*)?)/?"
)
_MOST = 10_000


def archive_format(source: ByteSource) -> str | None:
    """Return "docker-archive" or "oci-archive" if this plain tar archive holds a container image, else None.

    An archive with both kinds of index (docker save since version 25) counts as a docker-archive.
    """
    names = set()
    try:
        for count, member in enumerate(members(source)):
            if count > _MOST or not _NAMES.fullmatch(member.name):
                return None
            names.add(member.name.removeprefix(b"./"))
    except DiskmorphError:
        pass  # a damaged archive is what its sound part says
    if b"manifest.json" in names:
        return "docker-archive"
    return "oci-archive" if {b"index.json", b"oci-layout"} & names else None
