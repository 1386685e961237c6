"""Units that lie side by side are read in one call, and no more than that, whatever the tables say."""

from __future__ import annotations

import numpy as np
import pytest

from diskmorph.convert.ahead import read_ahead
from diskmorph.formats.errors import SourceError
from diskmorph.formats.extents import DATA, DEFLATE, EXTENT
from diskmorph.formats.source import BytesSource, HeldSource

from testkit import data

MIB = 1 << 20
CONTENT = data("ahead", 10 * MIB)


class Counted(BytesSource):
    """Bytes that note what is read of them."""

    def __init__(self) -> None:
        super().__init__(CONTENT, "counted")
        self.reads: list[tuple[int, int]] = []

    def pread(self, offset: int, buffer: memoryview) -> int:
        self.reads.append((offset, len(buffer)))
        return super().pread(offset, buffer)


def rows(*places: tuple[int, int, int]):
    table = np.zeros(len(places), EXTENT)
    table["file"], table["offset"], table["stored"] = np.array(places).T
    table["kind"], table["codec"] = DATA, DEFLATE
    return table


def test_neighbours_share_one_call_in_whatever_order_the_disk_has_them():
    source = Counted()
    held = read_ahead([source], rows((0, 5000, 900), (0, 1000, 2000), (0, 3000, 2000)))
    assert source.reads == [(1000 - 64, 5900 - 1000 + 64)]
    assert held[0] is held[1] is held[2]
    assert bytes(held[0].view(5000, 900)) == CONTENT[5000:5900]
    assert len(source.reads) == 1


def test_what_lies_apart_or_alone_is_left_to_its_reader():
    source, other = Counted(), Counted()
    table = rows((0, 0, 100), (0, 200_000, 100), (1, 100, 100), (0, 200_100, 50), (0, 9 * MIB, 10))
    held = read_ahead([source, other], table)
    assert [one is not None for one in held] == [False, True, False, True, False]
    assert source.reads == [(200_000 - 64, 150 + 64)]
    assert not other.reads


class Scratched(Counted):
    """Bytes of which some cannot be read, as on a failing disk."""

    def pread(self, offset: int, buffer: memoryview) -> int:
        if offset <= 3000 < offset + len(buffer):
            raise SourceError("cannot be read: Input/output error", file=self.name, offset=3000)
        return super().pread(offset, buffer)


def test_a_fault_in_a_gap_that_nobody_needs_is_nobodys():
    source = Scratched()
    assert read_ahead([source], rows((0, 1000, 500), (0, 5000, 500))) == [None, None]
    assert source.read(1000, 500) == CONTENT[1000:1500]


@pytest.mark.parametrize("stored", [3 * MIB, (1 << 32) - 1])
def test_sizes_that_tables_claim_take_no_memory(stored):
    source = Counted()
    assert read_ahead([source], rows((0, 0, stored), (0, 10, stored), (0, 2 * MIB, stored))) == [None] * 3
    assert not source.reads


def test_units_beyond_the_end_are_left_to_their_reader_who_says_so():
    source = Counted()
    held = read_ahead([source], rows((0, len(CONTENT) - 10, 100), (0, len(CONTENT) - 5, 100)))
    assert bytes(held[0].view(len(CONTENT) - 5, 100)) == CONTENT[-5:]
    assert read_ahead([source], rows((0, 20 * MIB, 10), (0, 20 * MIB + 10, 10))) == [None, None]


@pytest.mark.parametrize(
    ("offset", "length"), [(100, 50), (90, 20), (140, 20), (0, 5), (100, 0), (len(CONTENT) - 3, 9)]
)
def test_a_held_source_reads_like_the_whole(offset, length):
    held = HeldSource(BytesSource(CONTENT, "whole"), 100, memoryview(CONTENT)[100:150])
    assert held.size == len(CONTENT)
    assert held.name == "whole"
    assert bytes(held.view(offset, length)) == CONTENT[offset : offset + length]
    assert held.read_upto(offset, length) == CONTENT[offset : offset + length]
