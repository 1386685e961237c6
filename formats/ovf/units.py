"""Sizes in OVF: programmatic units (DSP0004 annex C) and the words that older writers used."""

from __future__ import annotations

import re

from diskmorph.formats import numbers
from diskmorph.formats.machine import Property

LARGEST = 1 << 62
_MOST = 10**19 - 1
_BASES = {"": 1, "byte": 1, "bytes": 1, "b": 1, "bit": None, "bits": None}
# OVF 0.9 and its descendants mean powers of 1024 by all of these.
_WORDS = {
    word: 1 << (10 * power)
    for power, words in enumerate(
        (
            (),
            ("kilobyte", "kilobytes", "kibibyte", "kibibytes", "kb", "kib", "k"),
            ("megabyte", "megabytes", "mebibyte", "mebibytes", "mb", "mib", "m"),
            ("gigabyte", "gigabytes", "gibibyte", "gibibytes", "gb", "gib", "g"),
            ("terabyte", "terabytes", "tebibyte", "tebibytes", "tb", "tib", "t"),
        )
    )
    for word in words
}
_FACTOR = re.compile(r"\*\s*(\d{1,19})\s*(?:\^\s*(\d{1,2}))?\s*")
_REFERENCE = re.compile(r"\$\{([^{}]+)\}")


def unit_factor(text: str | None) -> int | None:
    """Return the bytes that one unit stands for: `byte * 2^20`, `byte * 2 ^ 20`, `MegaBytes`; None if not understood.

    No unit at all is the byte (DSP0243 9.1).
    """
    word, _, rest = (text or "").strip().partition("*")
    base = _BASES.get(word.strip().lower(), _WORDS.get(word.strip().lower()))
    if base is None:
        return None
    factor, at = base, 0
    rest = f"*{rest}" if "*" in (text or "") else ""
    while at < len(rest):
        found = _FACTOR.match(rest, at)
        if found is None:
            return None
        factor *= int(found[1]) ** int(found[2] or 1)
        if factor > LARGEST:
            return None
        at = found.end()
    return factor


def best_unit(size: int) -> tuple[int, str]:
    """Return the number and unit that a size in bytes is written as: the largest of GiB and MiB that divides it."""
    for power in (30, 20):
        if size and size % (1 << power) == 0:
            return size >> power, f"byte * 2^{power}"
    return size, "byte"


def whole_number(text: str | None) -> int | None:
    """Return the number that digits say, or None; signs, fractions and absurd lengths are no numbers."""
    return numbers.whole_number((text or "").strip(), _MOST)


def resolve(text: str, properties: dict[str, Property]) -> str | None:
    """Return `text` with each `${key}` replaced by that property's value; None where one has no value."""
    missing = False

    def value(found: re.Match[str]) -> str:
        nonlocal missing
        known = properties.get(found[1])
        if known is None or known.value is None:
            missing = True
            return ""
        return known.value

    said = _REFERENCE.sub(value, text)
    return None if missing else said
