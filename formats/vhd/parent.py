"""What a differencing VHD says of its parent: its unique id, and names by locators ("Parent Locator Entries")."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from diskmorph.formats.disk import ParentRef
from diskmorph.formats.errors import FormatError
from diskmorph.formats.vhd.schema import MAC_URL, WINDOWS_ABSOLUTE, WINDOWS_RELATIVE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.source import ByteSource

_MOST_LOCATOR = 64 << 10  # bytes; a Windows path has at most 32,767 characters
_WINDOWS_ROOT = re.compile(r"([A-Za-z]:|//)")  # a drive letter, or a share


def parent_of(header: Any, header_offset: int, source: ByteSource) -> ParentRef:
    """Return the parent that a dynamic header (at `header_offset`) names. Raises FormatError: a locator out of bounds.

    Names come in this order: relative to the image, absolute, the header's own, a Mac URL; what has a drive letter is
    of no use but for its last part, which is tried beside the image at last.
    """
    by_platform: dict[bytes, list[str]] = {}
    for platform, raw in locators(header, header_offset, source):
        by_platform.setdefault(platform, []).append(_decoded(platform, raw))
    words = [*by_platform.get(WINDOWS_RELATIVE, ()), *by_platform.get(WINDOWS_ABSOLUTE, ())]
    words.append(header.parent_name.decode("utf-16-be", "replace").split("\0")[0])
    paths = [word.replace("\\", "/") for word in words] + by_platform.get(MAC_URL, [])
    rooted = [path for path in paths if _WINDOWS_ROOT.match(path)]
    names = [path.removeprefix("./") for path in paths if path not in rooted]
    names += [re.split("[/:]", path)[-1] for path in rooted]
    known = tuple(dict.fromkeys(name for name in names if name))
    return ParentRef(known, "vhd", {"uuid": (str(header.parent_uuid),)})


def locators(header: Any, header_offset: int, source: ByteSource) -> Iterator[tuple[bytes, bytes]]:
    """Yield (platform code, data) of the locators that can be understood. Raises FormatError: out of bounds."""
    for number, locator in enumerate(header.locators):
        if locator.platform not in {WINDOWS_RELATIVE, WINDOWS_ABSOLUTE, MAC_URL}:
            continue
        if locator.length > _MOST_LOCATOR or locator.offset + locator.length > source.size:
            raise FormatError(
                "a parent locator lies beyond the end of the file",
                structure=f"parent locator {number}",
                field="offset",
                offset=header_offset + 576 + 24 * number,
                expected=f"at most {_MOST_LOCATOR} bytes within {source.size}",
                found=f"{locator.length} bytes at {locator.offset}",
            )
        yield locator.platform, source.read(locator.offset, locator.length)


def _decoded(platform: bytes, raw: bytes) -> str:
    if platform != MAC_URL:
        return raw.decode("utf-16-le", "replace").split("\0")[0]
    url = raw.decode("utf-8", "replace").split("\0")[0]
    try:
        return unquote(urlsplit(url).path) if url.startswith("file:") else url
    except ValueError:  # "file://[x": no address, and so no name of a file
        return ""
