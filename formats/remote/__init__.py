"""Sources that are not local files: http(s)://, s3://, nbd:// and nbd+unix://. What is used is loaded."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from diskmorph.formats.errors import OptionError

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource

_URL = re.compile(r"^(https?|s3|nbd|nbds|nbd\+unix)://", re.IGNORECASE)


def is_url(name: str | os.PathLike[str]) -> bool:
    """Return whether a name that the user gave is a URL that can be read; names inside images are never asked."""
    return isinstance(name, str) and _URL.match(name) is not None


def is_export(name: str | os.PathLike[str]) -> bool:
    """Return whether a name that the user gave is that of an NBD export."""
    return isinstance(name, str) and name.lower().startswith(("nbd://", "nbd+unix://"))


def open_url(url: str) -> ByteSource:
    """Open a URL that the user named. Raises SourceError, OptionError (a scheme that is not supported)."""
    scheme = url.partition("://")[0].lower()
    if scheme in {"http", "https"}:
        from diskmorph.formats.remote.http import HttpSource  # noqa: PLC0415 - what is used is loaded

        return HttpSource(url)
    if scheme == "s3":
        from diskmorph.formats.remote.s3 import S3Source  # noqa: PLC0415

        return S3Source(url)
    if scheme in {"nbd", "nbd+unix"}:
        from diskmorph.formats.remote.nbd import NbdSource  # noqa: PLC0415

        return NbdSource(url)
    raise OptionError(f"{scheme}:// is not supported", hint="http, https, s3, nbd and nbd+unix are")
