"""Whole numbers that stand as text in images, archives, a server's answers and on the command line."""

from __future__ import annotations


def whole_number(text: str | bytes, most: int) -> int | None:
    """Return the number that decimal digits say, 0 to `most`; None for all else.

    Only ASCII digits count: no sign, no spaces, no digits of other scripts. Any length is safe.
    """
    if not text.isascii() or not text.isdigit():
        return None
    # str.isdigit takes what int() refuses ("²"), and int() refuses more than 4,300 digits.
    word = text.decode("ascii") if isinstance(text, bytes) else text
    digits = word.lstrip("0")
    if len(digits) > len(str(most)):
        return None
    value = int(digits or "0")
    return value if value <= most else None
