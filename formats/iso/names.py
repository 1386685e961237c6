"""Names as ISO 9660 and Joliet allow them, unique in their directory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_ISO_LENGTH = 30  # ECMA-119 7.5.1: name and extension together
_JOLIET_LENGTH = 64  # Joliet: 128 bytes
_OUTSIDE = re.compile(rb"[^A-Z0-9_]")
_JOLIET_OUTSIDE = re.compile("[\0-\x1f*/:;?\\\\]")


def _iso_parts(name: bytes, *, folder: bool) -> tuple[bytes, bytes]:
    word = name.upper()
    stem, dot, extension = (word, b"", b"") if folder else word.rpartition(b".")
    if not dot or not stem:
        stem, extension = word, b""
    stem, extension = _OUTSIDE.sub(b"_", stem), _OUTSIDE.sub(b"_", extension)[:8]
    return stem[: _ISO_LENGTH - len(extension)] or b"_", extension


def iso_names(names: Iterable[tuple[bytes, bool]]) -> list[bytes]:
    """Return an ISO 9660 file identifier for each (name, is a directory), in order, unique."""
    taken: set[bytes] = set()
    counters: dict[tuple[bytes, bytes], int] = {}
    result = []
    for name, folder in names:
        stem, extension = _iso_parts(name, folder=folder)
        word = _iso_join(stem, extension, folder=folder)
        while word in taken:
            number = counters[stem, extension] = counters.get((stem, extension), 0) + 1
            tail = b"%d" % number
            room = _ISO_LENGTH - len(extension) - len(tail)
            word = _iso_join(stem[:room] + tail, extension, folder=folder)
        taken.add(word)
        result.append(word)
    return result


def _iso_join(stem: bytes, extension: bytes, *, folder: bool) -> bytes:
    return stem if folder else stem + b"." + extension + b";1"


def iso_rank(name: bytes) -> tuple[bytes, bytes]:
    """Return the sort key of an identifier: name and extension, each padded by itself (ECMA-119 9.3)."""
    stem, _, extension = name.partition(b";")[0].partition(b".")
    return stem.ljust(_ISO_LENGTH + 1), extension.ljust(_ISO_LENGTH + 1)


def joliet_names(names: Iterable[tuple[bytes, bool]]) -> list[bytes]:
    """Return a Joliet identifier (UTF-16, most significant byte first) for each (name, is a directory), unique."""
    taken: set[bytes] = set()
    counters: dict[str, int] = {}
    result = []
    for name, folder in names:
        text = _JOLIET_OUTSIDE.sub("_", name.decode("utf-8", "replace"))
        word = _joliet_join(text, "", folder=folder)
        while word in taken:
            number = counters[text] = counters.get(text, 0) + 1
            word = _joliet_join(text, f"_{number}", folder=folder)
        taken.add(word)
        result.append(word)
    return result


def _joliet_join(text: str, tail: str, *, folder: bool) -> bytes:
    stem, dot, extension = ("", "", "") if folder else text.rpartition(".")
    if not stem or len(extension) > 16:
        stem, dot, extension = text, "", ""
    end = (tail + dot + extension).encode("utf-16-be")
    head = stem.encode("utf-16-be")[: 2 * _JOLIET_LENGTH - len(end)]
    if len(head) >= 2 and 0xD8 <= head[-2] <= 0xDB:
        head = head[:-2]  # not half a surrogate pair
    return head + end  # no version: readers that show names as they are stored would show it


def joliet_rank(name: bytes) -> tuple[bytes, bytes]:
    """Return the sort key of a Joliet identifier."""
    stem, _, extension = name.partition(b"\0;")[0].partition(b"\0.")
    return stem.ljust(256, b"\0"), extension.ljust(256, b"\0")
