"""Whether blocks of an image lie at the same place of the file: for the checks of formats with one table of places."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

_WINDOW = 1 << 22  # places held at once: 32 MiB


class Shared(NamedTuple):
    """How many places overlap the one before them, the first few of those, how many distinct places there are."""

    overlapping: int
    some: tuple[int, ...]
    distinct: int


def shared_places(batches: Callable[[], Iterable[NDArray[np.uint64]]], stride: int, end: int) -> Shared:
    """Find places (any unit, below `end`) that lie less than `stride` behind another one.

    `batches` is called once for each window of the file and yields all places, in any order. Memory stays below
    100 MiB whatever the table says.
    """
    count, distinct, some = 0, 0, [0] * 0
    last = -stride
    for low in range(0, end, _WINDOW * stride):
        high = min(low + _WINDOW * stride, end)
        places, repeated = _window(batches(), low, high)
        distinct += len(places)
        near = np.flatnonzero(np.diff(places.astype(np.int64), prepend=last) < stride)
        both = np.concatenate((repeated, places[near]))
        count += len(both)
        some = (some + both[:16].tolist())[:16]
        last = int(places[-1]) if len(places) else last
    return Shared(count, tuple(sorted(some)), distinct)


def _window(
    batches: Iterable[NDArray[np.uint64]], low: int, high: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the distinct places within low..high, sorted, and those that came again (a few of them, if very many)."""
    held: list[NDArray[np.uint64]] = []
    again: list[NDArray[np.uint64]] = []
    waiting = 0
    for batch in batches:
        part = batch[(batch >= low) & (batch < high)]
        held.append(part)
        waiting += len(part)
        if waiting > _WINDOW // 4:
            held, waiting = [_distinct(held, again)], 0
        if len(held[0]) > _WINDOW:  # more than can lie there side by side: the count is not worth the memory
            break
    places = _distinct(held, again)
    return places, np.concatenate(again) if again else places[:0]


def _distinct(held: list[NDArray[np.uint64]], again: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    places = np.sort(np.concatenate(held)) if held else np.zeros(0, np.uint64)
    repeats = places[1:] == places[:-1]
    if repeats.any() and sum(map(len, again)) < _WINDOW:
        again.append(places[1:][repeats])
    keep = np.ones(len(places), bool)
    keep[1:] = ~repeats
    return places[keep]
