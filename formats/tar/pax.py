"""PAX extended header records (POSIX.1-2017 pax, "pax Extended Header"), and those of Schily tar and libarchive."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from diskmorph.formats.errors import FormatError
from diskmorph.formats.numbers import whole_number
from diskmorph.formats.tar import acl

if TYPE_CHECKING:
    from diskmorph.formats.tree import Node

Pax = dict[bytes, bytes]

LONGEST_TIME = 16
"""Digits of seconds: a year of more than ten digits is no date to the C library."""

_XATTR, _LIBARCHIVE = b"SCHILY.xattr.", b"LIBARCHIVE.xattr."
_NO_NUL = (b"path", b"linkpath", b"GNU.sparse.name")
_SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


def _damaged(problem: str, file: str, at: int, **place: object) -> FormatError:
    return FormatError(problem, file=file, format="tar", structure="pax record", offset=at, **place)  # type: ignore[arg-type]


def parse_records(body: bytes, file: str, at: int) -> Pax:
    r"""Return the records `LENGTH KEY=VALUE\n` of an extended header whose body lies at offset `at` of `file`.

    The repeated pairs of GNU sparse format 0.0 are joined into the one map of format 0.1.
    """
    records: Pax = {}
    place, end = 0, len(body)
    while place < end:
        space = body.find(b" ", place, place + 20)
        digits = body[place:space]
        if space < 0 or not digits.isdigit():
            if not body[place:].strip(b"\0"):
                break
            raise _damaged("an extended header is damaged", file, at + place, expected="a length")
        stop = place + int(digits)
        key, equals, value = body[space + 1 : stop - 1].partition(b"=")
        if stop > end or not equals or not key or body[stop - 1 : stop] != b"\n":
            raise _damaged("an extended header is damaged", file, at + place, expected="KEY=VALUE and a newline")
        if key in _NO_NUL and b"\0" in value:
            raise _damaged("a name holds a NUL", file, at + place)
        if key in _SPARSE_PAIR:
            earlier = records.get(b"GNU.sparse.map")
            value = value if earlier is None else earlier + b"," + value
            key = b"GNU.sparse.map"
        records[key] = value
        place = stop
    return records


def apply(pax: Pax, node: Node, name: bytes, file: str, at: int, lost: list[str]) -> None:
    """Set what records say of owner, time and xattrs; what cannot be kept is told in `lost`."""
    for key in (b"uid", b"gid"):
        text = pax.get(key)
        if text:
            number = whole_number(text, 0xFFFFFFFF)
            if number is None:
                raise _damaged("an extended header is damaged", file, at, field=key.decode(), found=text[:40])
            setattr(node, key.decode(), number)
    if pax.get(b"mtime"):
        node.mtime = nanoseconds(pax[b"mtime"], file, at)
    xattrs: dict[bytes, bytes] = {}
    for key, value in pax.items():
        if key.startswith(_XATTR):
            xattrs[_unescaped(key[len(_XATTR) :])] = value
        elif key.startswith(_LIBARCHIVE):
            xattrs.setdefault(unquote_to_bytes(key[len(_LIBARCHIVE) :]), _decoded(value, file, at))
        elif key == b"RHT.security.selinux":
            xattrs.setdefault(b"security.selinux", value.rstrip(b"\0") + b"\0")
        elif key in acl.XATTRS and value:
            _apply_acl(xattrs, acl.XATTRS[key], value, name, lost)
    if xattrs:
        node.xattrs = xattrs
        access = xattrs.get(b"system.posix_acl_access")
        if access is not None and (bits := acl.permission_bits(access)) is not None:
            node.mode = node.mode & ~0o777 | bits  # as the kernel does when the ACL is set


def xattr_key(name: bytes) -> bytes:
    """Return the key of an attribute's record, `=` as `%3D` and `%` as `%25` where reading it back would need that.

    GNU tar escapes so, too; `=` would end the key. Other names stand as they are, as everyone writes them.
    """
    if b"=" in name or b"%3D" in name or b"%25" in name:
        name = name.replace(b"%", b"%25").replace(b"=", b"%3D")
    return _XATTR + name


def _unescaped(name: bytes) -> bytes:
    return name.replace(b"%3D", b"=").replace(b"%25", b"%")


def _apply_acl(xattrs: dict[bytes, bytes], key: bytes, value: bytes, name: bytes, lost: list[str]) -> None:
    found = acl.from_text(value)
    if found is None:
        lost.append(f"the ACL of {name!r}: it names users without their numbers")
    elif key == b"system.posix_acl_default" or len(found) > acl.MINIMAL:  # the mode says the least one
        xattrs.setdefault(key, found)


def _decoded(value: bytes, file: str, at: int) -> bytes:
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    except binascii.Error as error:
        raise _damaged("an extended attribute is damaged", file, at, expected="base64") from error


def nanoseconds(text: bytes, file: str, at: int) -> int:
    """Return a decimal time such as `1700000000.123456789` in nanoseconds; digits beyond are cut off."""
    whole, _, part = text.partition(b".")
    digits = whole.removeprefix(b"-")
    if len(digits) > LONGEST_TIME or not (digits + part).isdigit():
        raise _damaged("an extended header is damaged", file, at, field="mtime", found=text[:40])
    value = int(digits or b"0") * 10**9 + int(part[:9].ljust(9, b"0"))
    return -value if text.startswith(b"-") else value


def record(key: bytes, value: bytes) -> bytes:
    """Return one record, its length counting its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def time_text(value: int) -> bytes:
    """Return nanoseconds as a decimal time, without trailing zeroes."""
    sign, value = ("-", -value) if value < 0 else ("", value)
    whole, part = divmod(value, 10**9)
    fraction = f".{part:09d}".rstrip("0") if part else ""
    return f"{sign}{whole}{fraction}".encode()
