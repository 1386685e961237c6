"""Dirty bitmaps: which parts of a disk were written since some moment, as backup tools keep them in an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class DirtyBitmap:
    """A bitmap over a whole disk: one bit for each `granularity` bytes of it, the first the lowest of byte 0.

    `size`: its bytes; `auto`: writing goes on to be recorded. `read(offset, length)` returns bytes of it and raises
    FormatError where the image does not hold them.
    """

    name: str
    granularity: int
    size: int
    auto: bool
    read: Callable[[int, int], bytes]
