"""Long and short names of FAT directories."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.errors import TargetError
from diskmorph.formats.fat import schema as s

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHORT = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~")
_FORBIDDEN = frozenset('"*/:<>?\\|') | {chr(code) for code in range(32)}


def long_name(name: bytes) -> str:
    """Return a name of a tree as FAT holds it. Raises TargetError for what it cannot hold."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise TargetError(f"FAT cannot hold the name {name!r}: it is not UTF-8") from None
    if set(text) & _FORBIDDEN or text.endswith((" ", ".")) or len(text.encode("utf-16-le")) > 510:
        raise TargetError(f"FAT cannot hold the name {text!r}")
    return text


def short_name(text: str, taken: set[bytes]) -> tuple[bytes, bool]:
    """Return the short name, 11 bytes, that stands for a name, and whether it says all of it; note it in `taken`."""
    base, dot, suffix = text.rpartition(".") if "." in text[1:] else (text, "", "")
    plain = _plain(base, 8, suffix, 3) if not dot or suffix else None
    if plain is not None and plain not in taken:
        taken.add(plain)
        return plain, True
    stem, tail = _squeezed(base)[:6] or b"_", _squeezed(suffix)[:3]
    for number in range(1, 1_000_000):
        mark = b"~%d" % number
        candidate = (stem[: 8 - len(mark)] + mark).ljust(8) + tail.ljust(3)
        if candidate not in taken:
            taken.add(candidate)
            return candidate, False
    raise TargetError("a FAT directory has too many names that are alike")


def _plain(base: str, most: int, suffix: str, longest: int) -> bytes | None:
    if not 1 <= len(base) <= most or len(suffix) > longest or not base.isascii() or not suffix.isascii():
        return None
    both = base.encode() + suffix.encode()
    return base.encode().ljust(8) + suffix.encode().ljust(3) if set(both) <= _SHORT else None


def _squeezed(text: str) -> bytes:
    found = text.upper().replace(" ", "").replace(".", "").encode("ascii", "replace")
    return bytes(byte if byte in _SHORT else ord("_") for byte in found)


def long_entries(text: str, short: bytes) -> bytes:
    """Return the entries that hold a long name, as they lie before the short one's."""
    units = text.encode("utf-16-le")
    if len(units) % (2 * s.LONG_UNITS):
        units += b"\0\0"
        units += b"\xff" * (-len(units) % (2 * s.LONG_UNITS))
    count = len(units) // (2 * s.LONG_UNITS)
    checksum = s.short_checksum(short)
    parts = []
    for number in range(count, 0, -1):
        part = units[(number - 1) * 26 : number * 26]
        order = number | (0x40 if number == count else 0)
        fields = {"order": order, "checksum": checksum, "first": part[:10], "middle": part[10:22], "last": part[22:]}
        parts.append(s.LONG.build(fields))
    return b"".join(parts)


def read_short(name: bytes, case: int) -> str:
    """Return a short name as text, small letters where `case` says so."""
    if name[0] == 0x05:  # stands for 0xE5, which marks deleted entries
        name = b"\xe5" + name[1:]
    base, suffix = (part.decode("cp437").rstrip(" ") for part in (name[:8], name[8:]))
    base = base.lower() if case & 8 else base
    suffix = suffix.lower() if case & 16 else suffix
    return f"{base}.{suffix}" if suffix else base


def read_long(parts: Sequence[bytes], short: bytes) -> str | None:
    """Return the name of long entries (in the order in which they lie), None if they do not belong to `short`."""
    count = len(parts)
    checksum = s.short_checksum(short)
    for index, part in enumerate(parts):
        order = part[0] & 0x3F
        if order != count - index or part[13] != checksum or bool(part[0] & 0x40) != (index == 0):
            return None
    units = b"".join(part[1:11] + part[14:26] + part[28:32] for part in reversed(parts))
    for at in range(0, len(units), 2):
        if units[at : at + 2] == b"\0\0":
            units = units[:at]
            break
    return units.decode("utf-16-le", "replace") or None
