"""POSIX ACLs between their xattr form (linux/posix_acl_xattr.h, version 2) and the text in `SCHILY.acl.*` records."""

from __future__ import annotations

import numpy as np

from diskmorph.formats.errors import FormatError
from diskmorph.formats.numbers import whole_number

ENTRY = np.dtype([("tag", "<u2"), ("perm", "<u2"), ("id", "<u4")])
VERSION = (2).to_bytes(4, "little")
MINIMAL = 4 + 3 * ENTRY.itemsize
"""Bytes of an ACL of owner, group and others, which says no more than a mode."""
_NO_ID = 0xFFFFFFFF
_TAGS = {("user", False): 1, ("user", True): 2, ("group", False): 4, ("group", True): 8}
_PLAIN_TAGS = {"mask": 16, "other": 32}
_WORDS = {1: "user:", 2: "user:", 4: "group:", 8: "group:", 16: "mask:", 32: "other:"}
_SHORT = {"u": "user", "g": "group", "m": "mask", "o": "other"}

XATTRS = {b"SCHILY.acl.access": b"system.posix_acl_access", b"SCHILY.acl.default": b"system.posix_acl_default"}


def from_text(text: bytes) -> bytes | None:
    """Return the xattr of an ACL text such as `user::rw-,user:lp:r--:7`; None where a name comes without its number.

    Raises FormatError for text that is no ACL.
    """
    rows = []
    for line in text.decode("utf-8", "replace").replace("\n", ",").split(","):
        words = line.split("#", 1)[0].strip().split(":")
        if words == [""]:
            continue
        found = _entry(words)
        if found is None:
            return None
        rows.append(found)
    rows.sort(key=lambda row: (row[0], row[2]))  # as the kernel has them: by kind, then by number
    return VERSION + np.array(rows, ENTRY).tobytes()


def _entry(words: list[str]) -> tuple[int, int, int] | None:
    kind = _SHORT.get(words[0], words[0])
    words = [kind, "", words[1]] if kind in _PLAIN_TAGS and len(words) == 2 else words
    if len(words) not in {3, 4}:
        raise FormatError(f"an ACL has the entry {':'.join(words)!r}", structure="SCHILY.acl")
    who, letters = words[1], words[2]
    tag = _PLAIN_TAGS.get(kind) or _TAGS.get((kind, bool(who)))
    if tag is None or set(letters) - set("rwx-"):
        raise FormatError(f"an ACL has the entry {':'.join(words)!r}", structure="SCHILY.acl")
    perm = 4 * ("r" in letters) + 2 * ("w" in letters) + ("x" in letters)
    if not who:
        return tag, perm, _NO_ID
    number = whole_number(words[3] if len(words) == 4 else who, _NO_ID - 1)
    return None if number is None else (tag, perm, number)


def permission_bits(value: bytes) -> int | None:
    """Return the nine bits of the mode that goes with an access ACL: its mask stands for the group, if there is one."""
    if value[:4] != VERSION or (len(value) - 4) % ENTRY.itemsize:
        return None
    found: dict[int, int] = {tag: perm & 7 for tag, perm, _ in np.frombuffer(value, ENTRY, offset=4).tolist()}
    if not {1, 4, 32} <= set(found):
        return None
    return found[1] << 6 | found.get(16, found[4]) << 3 | found[32]


def to_text(value: bytes) -> bytes | None:
    """Return the text of an ACL's xattr, by numbers; None if it is not of version 2."""
    if value[:4] != VERSION or (len(value) - 4) % ENTRY.itemsize:
        return None
    lines = []
    for tag, perm, number in np.frombuffer(value, ENTRY, offset=4).tolist():
        if tag not in _WORDS or perm > 7:
            return None
        who = str(number) if tag in {2, 8} else ""
        letters = "".join(letter if perm & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        lines.append(f"{_WORDS[tag]}{who}:{letters}")
    return ",".join(lines).encode()
