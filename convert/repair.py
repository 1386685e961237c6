"""Planning a repair: patches are judged on the image as it would be, before a byte of it is written.

A repair is refused where it would leave more wrong than it found, or where data that could be read would be lost or
written over: no format's own repair is trusted with somebody's only copy.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.convert.buffers import meet
from diskmorph.convert.mended import MendedSource
from diskmorph.formats.errors import DiskmorphError, IntegrityError
from diskmorph.formats.extents import DATA, EXTENT, PLAIN, clip, stops
from diskmorph.formats.rows import joined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.check import CheckReport, Patch
    from diskmorph.formats.registry import FormatModule, OpenContext
    from diskmorph.formats.source import ByteSource

_ROUNDS = 4
"""Checks of the mended image: what one round mends may uncover what the next mends."""
_HINT = "nothing was written; `convert` what can be read into a new image"


def plan_repair(
    module: FormatModule, source: ByteSource, context: OpenContext, repair: str, found: CheckReport
) -> list[Patch]:
    """Return the patches of a repair, all rounds of it; `found` is the check that proposed the first.

    Raises IntegrityError where the repair would do harm.
    """
    patches = list(found.patches)
    if not patches:
        return patches
    for _ in range(_ROUNDS):
        mended = MendedSource(source, patches)
        after = _check(module, mended, context, repair)
        if after is None or after.corruptions > found.corruptions:
            raise _harm(source, "leave more wrong than it found", found, after)
        if not after.patches:
            break
        patches += after.patches
    else:
        raise _harm(source, "not come to an end", found, after)
    _require_kept(module, source, mended, context)
    return patches


def _check(module: FormatModule, source: ByteSource, context: OpenContext, repair: str) -> CheckReport | None:
    """Return the check of the mended image, None where it cannot be read."""
    try:
        return module.check_image(source, context, repair)
    except DiskmorphError:
        return None


def _harm(source: ByteSource, what: str, found: CheckReport, after: CheckReport | None) -> IntegrityError:
    return IntegrityError(
        f"is not repaired: it would {what}",
        file=source.name,
        format=found.format,
        expected=f"at most {found.corruptions} corruptions",
        found="an image that cannot be read" if after is None else f"{after.corruptions} corruptions",
        hint=_HINT,
    )


def _require_kept(module: FormatModule, source: ByteSource, mended: MendedSource, context: OpenContext) -> None:
    """Raise IntegrityError where data that could be read would be lost, or written over.

    Entries that are wrong may lead elsewhere afterwards, and what was missing may be found: but data stays data.
    """
    after = _Ahead(_extents(module, mended, context))
    for rows in _extents(module, source, context):
        start, stop = int(rows["start"][0]), int(stops(rows[-1:])[0])
        then = after.part(start, stop)
        if not len(then) or int(stops(then[-1:])[0]) < stop:
            raise _harmful(source, f"the disk could not be read from {start} on any more")
        data, empty = rows[rows["kind"] == DATA], then[then["kind"] != DATA]
        lost = meet(data["start"], stops(data), empty["start"], stops(empty))[2]
        if len(lost):
            raise _harmful(source, f"the disk's data at {int(lost[0])} would be lost")
        own = then[(then["kind"] == DATA) & (then["codec"] == PLAIN) & (then["file"] == 0)]
        over = own["offset"][mended.touches(own["offset"], own["offset"] + own["length"])]
        if len(over):
            raise _harmful(source, f"data of the disk at byte {int(over[0])} of the file would be written over")


def _harmful(source: ByteSource, what: str) -> IntegrityError:
    return IntegrityError(f"is not repaired: {what}", file=source.name, hint=_HINT)


def _extents(module: FormatModule, source: ByteSource, context: OpenContext) -> Iterator[NDArray[np.void]]:
    """Yield the batches of an image that are not empty, up to where it can be read; `source` stays open."""
    with contextlib.suppress(DiskmorphError):
        disk = module.open_image(source, context)
        try:
            for batch in disk.extents():
                if len(batch):
                    yield batch
        finally:
            for other in disk.files[1:]:
                other.close()


class _Ahead:
    """Cuts batches anew: `part` by part, in ascending order."""

    def __init__(self, batches: Iterator[NDArray[np.void]]) -> None:
        self._batches = batches
        self._held = np.zeros(0, EXTENT)

    def part(self, start: int, stop: int) -> NDArray[np.void]:
        """Return the rows of a range, fewer where the batches end."""
        held = [self._held]
        while not len(held[-1]) or int(stops(held[-1][-1:])[0]) < stop:
            batch = next(self._batches, None)
            if batch is None:
                break
            held.append(batch)
        whole = joined(held)
        self._held = whole[stops(whole) > np.uint64(stop)]
        return clip(whole, start, stop)
