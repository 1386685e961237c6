"""What an ext4 is made of: geometry, cuts, extent trees, blocks of zeroes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from diskmorph.formats.ext4 import schema
from diskmorph.formats.ext4.geometry import backup_groups, lay_out, smallest
from diskmorph.formats.ext4.segments import SEGMENT, build_tree, cut, tree_blocks
from diskmorph.formats.ext4.zeroes import PIECE, without_zeroes
from diskmorph.formats.source import BytesSource

if TYPE_CHECKING:
    pass

MIB = 1 << 20


def test_geometry() -> None:
    assert backup_groups(30) == [1, 3, 5, 7, 9, 25, 27]
    assert backup_groups(1) == []
    for blocks in (5000, 32768, 32769, 40_000, 98_304, 1_000_000, 20_000_000):
        found = lay_out(blocks, blocks // 4)
        assert found.blocks <= blocks
        assert found.inodes >= blocks // 4
        places = np.concatenate([found.block_bitmaps, found.inode_bitmaps, found.inode_tables])
        assert len(set(places.tolist())) == len(places)
        assert int(found.blocks_of(np.array([found.free - 1]))[0]) < found.blocks
        runs = found.blocks_of(found.run_positions)
        assert (runs == found.run_starts).all()
    found = smallest(10_000, 500)
    assert 10_000 <= found.free - 1024 < 10_100


def test_cut() -> None:
    row, begin, length = cut(np.array([0, 10, 40]), np.array([10, 25, 5]), np.array([0, 10, 20, 30, 100]))
    assert list(zip(row.tolist(), begin.tolist(), length.tolist(), strict=True)) == [
        (0, 0, 10),
        (1, 10, 10),
        (1, 20, 10),
        (1, 30, 5),
        (2, 40, 5),
    ]
    row, begin, length = cut(np.array([0]), np.array([7]), np.array([], int))
    assert (row.tolist(), begin.tolist(), length.tolist()) == ([0], [0], [7])


@pytest.mark.parametrize(("extents", "blocks"), [(4, 0), (5, 1), (340, 1), (341, 2), (1360, 4), (1361, 5 + 1)])
def test_extent_trees(extents: int, blocks: int) -> None:
    assert tree_blocks(extents) == blocks
    rows = np.zeros(extents, SEGMENT)
    rows["block"], rows["count"], rows["at"] = np.arange(extents) * 2, 1, np.arange(extents) + (1 << 33)
    written: dict[int, bytes] = {}
    root = build_tree(rows, list(range(100, 100 + blocks)), 7, written.__setitem__)
    assert sorted(written) == list(range(100, 100 + blocks))
    found: list[tuple[int, int]] = []

    def walk(node: bytes) -> None:
        head = schema.EXTENT_HEADER.parse(node)
        for number in range(head.entries):
            raw = node[12 + 12 * number : 24 + 12 * number]
            if head.depth:
                walk(written[int.from_bytes(raw[4:8], "little")])
            else:
                one = schema.EXTENT.parse(raw)
                found.append((one.block, one.start_lo | one.start_hi << 32))

    walk(root.tobytes())
    assert found == list(zip(rows["block"].tolist(), rows["at"].tolist(), strict=True))


def test_zero_blocks_are_cut_out() -> None:
    random = np.random.default_rng(5)
    blocks = random.integers(0, 2, 6000)
    content = b"".join(bytes([1]) * 4096 if one else bytes(4096) for one in blocks.tolist())[:-1000]
    lengths = [0, 1, 511, 512, 4095, 4096, 4097, 100_000, 3_000_000, 9_000_000]
    pieces = np.zeros(len(lengths), PIECE)
    at = 0
    for number, length in enumerate(lengths):
        pieces[number] = (number, 0, length, at, 0)
        at += -(-length // 512) * 512
    pieces = pieces[pieces["length"] > 0]
    kept = without_zeroes(pieces, [BytesSource(content)], 4096)
    for piece in pieces:
        want = content[piece["offset"] : piece["offset"] + piece["length"]]
        found = bytearray(len(want))
        mine = kept[kept["owner"] == piece["owner"]]
        for one in mine:
            found[one["start"] : one["start"] + one["length"]] = content[one["offset"] : one["offset"] + one["length"]]
            assert one["start"] % 4096 == 0
        assert found == want
        zero = [k for k in range(0, len(want), 4096) if not any(want[k : k + 4096])]
        covered = sum(int(one["length"]) for one in mine)
        assert covered == len(want) - sum(len(want[k : k + 4096]) for k in zero)


def test_pieces_that_lie_askew_stay_whole() -> None:
    pieces = np.zeros(2, PIECE)
    pieces[0] = (0, 0, 8192, 100, 0)  # not on a sector of its source
    pieces[1] = (1, 512, 8192, 512, 0)  # not on a block of its file
    kept = without_zeroes(pieces, [BytesSource(bytes(20_000))], 4096)
    assert (kept == pieces).all()
