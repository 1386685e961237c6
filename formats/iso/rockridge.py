"""Rock Ridge entries as they are written (RRIP 1.12, SUSP 1.12)."""

from __future__ import annotations

import stat
import time
from functools import lru_cache
from typing import TYPE_CHECKING

from diskmorph.formats.iso.schema import SHARING_PROTOCOL, DeviceNumber, Extension, PosixAttributes, RecordTime

if TYPE_CHECKING:
    from diskmorph.formats.tree import Node

_PART = 250  # what fits an entry behind its five bytes
_CONTINUE = 1
_SHORT_YEARS = range(1900, 2156)  # years of the 7-byte form
_FIRST, _LAST = -62_135_596_800, 253_402_300_799  # the years 1 to 9999, which is what the 17-byte form holds
_COMPONENTS = {b".": b"\x02\0", b"..": b"\x04\0"}

_ID = b"IEEE_1282"
_DESCRIPTION = b"THE IEEE 1282 PROTOCOL PROVIDES SUPPORT FOR POSIX FILE SYSTEM SEMANTICS."
_SOURCE = b"PLEASE CONTACT THE IEEE STANDARDS DEPARTMENT, PISCATAWAY, NJ, USA FOR THE 1282 SPECIFICATION."
_EXTENSION = Extension.build(
    {
        "length": 8 + len(_ID) + len(_DESCRIPTION) + len(_SOURCE),
        "id_length": len(_ID),
        "description_length": len(_DESCRIPTION),
        "source_length": len(_SOURCE),
        "id": _ID,
        "description": _DESCRIPTION,
        "source": _SOURCE,
    }
)


@lru_cache(maxsize=4096)
def record_time(seconds: int) -> bytes:
    """Return the 7-byte time in UTC (ECMA-119 9.1.5), cut to the years that it holds."""
    moment = time.gmtime(min(max(seconds, -2208988800), _LAST))
    year = min(moment.tm_year, _SHORT_YEARS[-1])
    return bytes(
        RecordTime.build(
            {
                "year": year - 1900,
                "month": moment.tm_mon,
                "day": moment.tm_mday,
                "hour": moment.tm_hour,
                "minute": moment.tm_min,
                "second": min(moment.tm_sec, 59),
                "zone": 0,
            }
        )
    )


def volume_time(seconds: float | None) -> dict[str, object]:
    """Return the 17-byte time in UTC (ECMA-119 8.4.26.1); None: unset."""
    if seconds is None:
        return {"digits": b"0" * 16, "zone": 0}
    return {"digits": _digits(int(seconds)), "zone": 0}


def _digits(seconds: int) -> bytes:
    """Return the 16 digits of a time in UTC, cut to the years that they hold."""
    moment = time.gmtime(min(max(seconds, _FIRST), _LAST))
    return b"%04d%02d%02d%02d%02d%02d00" % (*moment[:5], min(moment.tm_sec, 59))


@lru_cache(maxsize=4096)
def _times(seconds: int) -> bytes:
    if time.gmtime(min(max(seconds, _FIRST), _LAST)).tm_year in _SHORT_YEARS:
        return b"TF\x1a\x01\x0e" + record_time(seconds) * 3  # modification, access, attributes
    return b"TF\x38\x01\x8e" + (_digits(seconds) + b"\0") * 3


@lru_cache(maxsize=4096)
def _attributes(mode: int, links: int, uid: int, gid: int, serial: int) -> bytes:
    return bytes(PosixAttributes.build({"mode": mode, "links": links, "uid": uid, "gid": gid, "serial": serial}))


def _name(name: bytes) -> list[bytes]:
    parts = [name[at : at + _PART] for at in range(0, len(name), _PART)]
    return [
        b"NM" + bytes((5 + len(part), 1, _CONTINUE if number < len(parts) - 1 else 0)) + part
        for number, part in enumerate(parts)
    ]


def _components(target: bytes) -> list[bytes]:
    """Return component records of a link's target; a long word becomes several that continue each other."""
    found = [b"\x08\0"] if target.startswith(b"/") else []
    for word in (target[1:] if found else target).split(b"/") if target != b"/" else []:
        special = _COMPONENTS.get(word)
        if special is not None:
            found.append(special)
            continue
        parts = [word[at : at + _PART - 2] for at in range(0, len(word), _PART - 2)] or [b""]
        found.extend(
            bytes((_CONTINUE if number < len(parts) - 1 else 0, len(part))) + part for number, part in enumerate(parts)
        )
    return found


def _link(target: bytes) -> list[bytes]:
    areas = [b""]
    for component in _components(target):
        if len(areas[-1]) + len(component) > _PART:
            areas.append(b"")
        areas[-1] += component
    return [
        b"SL" + bytes((5 + len(area), 1, _CONTINUE if number < len(areas) - 1 else 0)) + area
        for number, area in enumerate(areas)
    ]


def _device(major: int, minor: int) -> bytes:
    old = 0 < major < 0x1000000 and minor < 256
    pair = {"high": 0, "low": major << 8 | minor} if old else {"high": major, "low": minor}
    return bytes(DeviceNumber.build(pair))


def entries(node: Node, name: bytes, links: int, serial: int) -> list[bytes]:
    """Return the system use entries of a record; `name` is empty for `.` and `..`."""
    found = [_attributes(node.mode, links, node.uid, node.gid, serial), _times(node.mtime // 1_000_000_000)]
    if node.kind == stat.S_IFLNK:
        found += _link(node.target)
    elif node.kind in (stat.S_IFCHR, stat.S_IFBLK):
        found.append(_device(*node.rdev))
    return found + _name(name)


def root_entries(node: Node, links: int, serial: int) -> list[bytes]:
    """Return the system use entries of the root's own record: SP first (SUSP 5.3), ER at the end (SUSP 5.5)."""
    return [SHARING_PROTOCOL, *entries(node, b"", links, serial), bytes(_EXTENSION)]
