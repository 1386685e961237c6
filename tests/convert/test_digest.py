"""The hash tree: digests that must stay what they are, and giants that cost next to nothing."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from diskmorph.convert.digest import tree_digest
from diskmorph.formats.extents import HOLE, ZERO
from diskmorph.formats.views import Zero

from testkit import MIB, TIB, pattern_disk

EMPTY = {
    0: "c6c0aa07f27493d2f2e5cff56c890a353a20086d6c25ec825128e12ae752b2d9",
    1: "ef5f464056079ebafefc9f2ddcc9405475ba464ccd1d2234c41de669429e03bc",
    4 * MIB + 1: "788441cc503ecba73fa797ea0345e02e2eb8789d0f2393bc9e2e887bd97f3797",
    12 * MIB: "d8a3261f6dd49e1d478b12ed362c06d8d1aea0f66377835112e7985b3d47ba9f",
    28 * MIB + 512: "204c2d6b8b50210937f00f8e2382a71ceb95e4b866ac561621a9c1402e74e471",
    TIB + 7 * MIB + 13: "53a58272eaf81d1637bb7bccbd4e19afd9caa47f7dc673f3823e41cb52bd3baf",
    3 * TIB // 4: "5c2ba6b8ba89638593fcbc5dbde3795069816da8ff7cfc2bb6e72540361ac962",
}
FILLED = [
    (28 * MIB + 512, (0,), "1313674f786ab36692c93fca15475c5798108aea70e71e92418087eeab9a8a1a"),
    (28 * MIB + 512, (5 * MIB, 13 * MIB), "a64f13943c770b24ddf67deb95cced9494fc77090c07f160da1221a301ab7577"),
    (28 * MIB + 512, (28 * MIB,), "9e49983f2c1f73e270f62664c4d629b86aadeab69581efa4bcfcaaad1992360a"),
    (45 * MIB, (9 * MIB, 40 * MIB), "5d37bb2b261447660e6dea13f83357cb05c0338df63c73c878f28faf6057272e"),
    (
        65541 * MIB,
        (3 * MIB, 32769 * MIB, 65540 * MIB),
        "09bedf82cd6ad1950929b6e75e8b2ef97460905097a199328d33d54ffd6676cd",
    ),
]


@pytest.mark.parametrize("size", EMPTY)
def test_empty_disks(size: int) -> None:
    assert {tree_digest(Zero(size, kind=kind)).hex() for kind in (HOLE, ZERO)} == {EMPTY[size]}


@pytest.mark.parametrize(("size", "places", "want"), FILLED)
def test_disks_with_data(size: int, places: tuple[int, ...], want: str) -> None:
    disk = pattern_disk(size, [(at, 512, bytes([number + 1])) for number, at in enumerate(places)])
    for threads in (1, 3):
        assert tree_digest(disk, threads=threads).hex() == want


def test_a_giant_takes_no_memory() -> None:
    tracemalloc.start()
    begun = time.process_time()
    tree_digest(Zero(1 << 50), threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - begun < 5
    assert peak < 32 * MIB
