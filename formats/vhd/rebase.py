"""Another parent for a differencing VHD: its unique id, name and locators in the dynamic header."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from diskmorph.formats.check import Patch
from diskmorph.formats.errors import OptionError, UnsupportedError
from diskmorph.formats.fields import fields_of
from diskmorph.formats.vhd.footer import read_footers
from diskmorph.formats.vhd.schema import (
    DIFFERENCING,
    FOOTER_SIZE,
    HEADER,
    HEADER_SIZE,
    SECTOR,
    WINDOWS_ABSOLUTE,
    WINDOWS_RELATIVE,
    build_header,
)

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewParent
    from diskmorph.formats.source import ByteSource


def parent_patches(source: ByteSource, parent: NewParent) -> list[Patch]:
    """Return what makes `parent` the image's parent: locators first, then the header that points to them.

    Locators that do not fit where the old ones are go where the footer was, which moves behind them; its copy at the
    beginning holds meanwhile. Raises OptionError (it is no VHD, or its name no Unicode), UnsupportedError (a footer
    of 511 bytes).
    """
    if parent.format != "vhd" or "uuid" not in parent.identity:
        raise OptionError(f"a VHD's parent must be a VHD, not {parent.format}")
    footer = read_footers(source)
    at = int(footer.fields.data_offset)
    if footer.fields.type != DIFFERENCING:
        raise UnsupportedError("is no differencing VHD", feature="rebase", file=source.name, format="vhd")
    old = HEADER.parse(source.read(at, HEADER_SIZE))
    patches, locators = _locators(source, old, parent)
    fields = fields_of(old)
    name = parent.unicode_name().rsplit("/", 1)[-1].encode("utf-16-be")
    fields |= {
        "parent_uuid": uuid.UUID(parent.identity["uuid"]),
        "parent_timestamp": int(parent.identity.get("timestamp", 0)),
        "parent_name": name[:510].ljust(512, b"\0"),
        "locators": locators,
        "checksum": 0,
    }
    return [*patches, Patch(at, build_header(fields), f"the parent becomes {parent.name}", sync=True)]


def _locators(source: ByteSource, old: Any, parent: NewParent) -> tuple[list[Patch], list[dict[str, object]]]:
    """Return where the new names go, and the header's eight entries."""
    empty = {"platform": bytes(4), "space": 0, "length": 0, "reserved": 0, "offset": 0}
    rooms = [
        (int(entry.offset), _padded(int(entry.length)))
        for entry in old.locators
        if entry.length and entry.offset + _padded(int(entry.length)) <= source.size - FOOTER_SIZE
    ]
    entries: list[dict[str, object]] = []
    patches: list[Patch] = []
    left: list[tuple[bytes, bytes]] = []
    for platform, raw in _names(parent):
        room = next((room for room in rooms if len(raw) <= room[1]), None)
        if room is None:
            left.append((platform, raw))
            continue
        rooms.remove(room)
        patches.append(Patch(room[0], raw.ljust(room[1], b"\0"), "parent locator"))
        entries.append(empty | {"platform": platform, "space": room[1], "length": len(raw), "offset": room[0]})
    if left:
        more, moved = _behind(source, left)
        patches += moved
        entries += [empty | entry for entry in more]
    return patches, entries + [empty] * (8 - len(entries))


def _behind(source: ByteSource, left: list[tuple[bytes, bytes]]) -> tuple[list[dict[str, object]], list[Patch]]:
    """Return entries and bytes of names that go where the footer is, which is written behind them first."""
    start = at = source.size - FOOTER_SIZE
    if start % SECTOR:
        raise UnsupportedError(
            "has an old footer of 511 bytes and no room for the parent's name",
            feature="rebase",
            file=source.name,
            format="vhd",
            hint="write it anew with -o FILE",
        )
    entries: list[dict[str, object]] = []
    text = b""
    for platform, raw in left:
        space = _padded(len(raw))
        entries.append({"platform": platform, "space": space, "length": len(raw), "offset": at})
        text += raw.ljust(space, b"\0")
        at += space
    footer = source.read(start, FOOTER_SIZE)
    return entries, [Patch(at, footer, "the footer moves"), Patch(start, text, "parent locators", sync=True)]


def _names(parent: NewParent) -> list[tuple[bytes, bytes]]:
    found = []
    if not parent.name.startswith("/"):
        found.append((WINDOWS_RELATIVE, _windows(parent.name if parent.name.startswith("../") else f"./{parent.name}")))
    absolute = parent.name if parent.name.startswith("/") else str(parent.path) if parent.path is not None else None
    if absolute is not None:
        found.append((WINDOWS_ABSOLUTE, _windows(absolute)))
    return found


def _windows(path: str) -> bytes:
    return path.replace("/", "\\").encode("utf-16-le", "surrogatepass")


def _padded(length: int) -> int:
    return -(-length // SECTOR) * SECTOR
