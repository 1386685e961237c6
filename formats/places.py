"""Whether blocks of an image lie at the same place of the file: for the checks of formats with one table of places."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

_WINDOW = 1 << 20  # distinct places held at once: 8 MiB
_SOME = 16


class Shared(NamedTuple):
    """How many places overlap the one before them, the first few of those, how many distinct places there are."""

    overlapping: int
    some: tuple[int, ...]
    distinct: int


def shared_places(batches: Callable[[], Iterable[NDArray[np.uint64]]], stride: int) -> Shared:
    """Find places (in any unit) that lie less than `stride` behind another one.

    `batches` yields all places in any order, and is called once for every million of them: so many are held at
    once, below 100 MiB whatever the table says. Where millions are at one place, the count stops growing.
    """
    overlapping = distinct = low = 0
    some: list[int] = []
    last = -stride
    while True:
        places, repeated, complete = _lowest(batches(), low)
        near = places[np.diff(places.astype(np.int64), prepend=last) < stride]
        both = np.sort(np.concatenate((repeated, near)))
        overlapping, distinct = overlapping + len(both), distinct + len(places)
        some += both[: _SOME - len(some)].tolist()
        if complete:
            return Shared(overlapping, tuple(some), distinct)
        last = int(places[-1])
        low = last + 1


def _lowest(batches: Iterable[NDArray[np.uint64]], low: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64], bool]:
    """Return the lowest distinct places from `low`, sorted; those that came again; whether these are all there are."""
    held: list[NDArray[np.uint64]] = []
    again: list[NDArray[np.uint64]] = []
    waiting, high = 0, None
    for batch in batches:
        part = batch[(batch >= low) if high is None else (batch >= low) & (batch < high)]
        held.append(part)
        waiting += len(part)
        if waiting > _WINDOW:
            places = _distinct(held, again)
            if len(places) > _WINDOW:
                high = int(places[_WINDOW])
                places = places[:_WINDOW].copy()
            held, waiting = [places], 0
    places = _distinct(held, again)
    if len(places) > _WINDOW:
        high = int(places[_WINDOW])
        places = places[:_WINDOW]
    repeated = np.concatenate([*again, places[:0]])
    return places, repeated if high is None else repeated[repeated < high], high is None


def _distinct(held: list[NDArray[np.uint64]], again: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    places = np.concatenate(held) if held else np.zeros(0, np.uint64)
    held.clear()  # before sorting: they are as large as what was made of them
    places.sort()
    keep = np.ones(len(places), bool)
    keep[1:] = places[1:] != places[:-1]
    if sum(map(len, again)) < _WINDOW:
        again.append(places[~keep])
    return places[keep]
