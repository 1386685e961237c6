"""Damaged grain directories of VMDK: what is read, what is found, and that a repair never costs a grain."""

import struct

import numpy as np
import pytest
import vmdkmade
from vmdkmade import Hosted

from diskmorph.formats.check import ERROR, WARNING
from diskmorph.formats.errors import FormatError
from diskmorph.formats.registry import OpenContext, load, open_disk, require_format
from diskmorph.formats.source import BytesSource

from testkit import KIB, content, data

GRAIN = 64 * KIB
TABLE = 2048
VMDK = load(require_format("vmdk"))
TEXT = vmdkmade.words(['RW 196608 SPARSE "x.vmdk"'])


def made(grains=None, **more):
    """A disk of three tables: grains in the first and last, the second empty."""
    grains = grains or {n: data(n, GRAIN) for n in (0, 1, 2, 1100, 1101)}
    return Hosted(128 * 1536, grains, text=TEXT, **more)


def u32(*numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


def patched(raw, *pieces):
    image = bytearray(raw)
    for offset, piece in pieces:
        image[offset : offset + len(piece)] = piece
    return bytes(image)


class Places:
    """Bytes where the directories and their tables lie; sectors of the grains of the first table."""

    def __init__(self, raw):
        self.rgd, self.gd = (word * 512 for word in struct.unpack_from("<QQ", raw, 48))
        self.tables = [entry * 512 for entry in struct.unpack_from("<3I", raw, self.gd)]
        self.redundant = [entry * 512 for entry in struct.unpack_from("<3I", raw, self.rgd)]
        self.grains = struct.unpack_from("<3I", raw, self.tables[0])


def check(raw, repair=None):
    return VMDK.check_image(BytesSource(raw), OpenContext(), repair)


def mended(raw):
    """Repair until nothing is proposed any more."""
    for _ in range(5):
        patches = check(raw, "all").patches
        if not patches:
            return raw
        raw = patched(raw, *((patch.offset, patch.data) for patch in patches))
    raise AssertionError("repairs without end")


def errors(raw):
    return [finding for finding in check(raw).findings if finding.severity == ERROR]


def read(raw, folder):
    path = folder / "x.vmdk"
    path.write_bytes(raw)
    with open_disk(path) as disk:
        return content(disk), disk.info.warnings


@pytest.fixture(params=["random", "zeroes"])
def disk(request):
    grains = {n: data(n, GRAIN) if request.param == "random" else bytes(GRAIN) for n in (0, 1, 2, 1100, 1101)}
    return made(grains)


def test_a_directory_entry_in_a_grain_is_restored_and_no_grain_is_written_to(disk, tmp_path):
    good = disk.build()
    at = Places(good)
    for directory in (at.gd, at.rgd):
        for entry in range(3):
            hurt = patched(good, (directory + 4 * entry, u32(at.grains[1] + 39)))
            assert read(hurt, tmp_path)[0] == disk.content()
            assert len(errors(hurt)) == 1
            assert mended(hurt) == good


def test_an_entry_in_a_grain_where_the_layout_says_nothing(tmp_path):
    """Tables in reverse: a wrong entry is known by the other directory's grains alone."""
    grains = {n: data(n, GRAIN) for n in (0, 1, 2, 700, 701, 1100, 1101, 1600)}
    disk = Hosted(128 * 2048, grains, text=TEXT.replace("196608", "262144"), sparse_tables=True)
    good = disk.build()
    at = Places(good)
    assert check(good).findings == []
    hurt = patched(good, (at.gd, u32(at.grains[1] + 39)))
    assert errors(hurt)
    assert all(patch.offset < at.grains[0] * 512 for patch in check(hurt, "all").patches)
    assert read(mended(hurt), tmp_path)[0] == disk.content()
    hurt = patched(good, (at.rgd, u32(at.grains[1] + 39)))
    assert errors(hurt)
    assert mended(hurt) == hurt


def test_a_lost_entry_costs_no_other_table(tmp_path):
    """The redundant copy of another table lacks a grain: the primary's stays in use, the difference is told."""
    disk = made()
    good = disk.build()
    at = Places(good)
    for lost in (0, 0x7FFFFFFF):
        hurt = patched(good, (at.gd + 8, u32(lost)), (at.redundant[0] + 4, u32(0)))
        found, warnings = read(hurt, tmp_path)
        assert found == disk.content()
        assert "1 other tables" in warnings[0]
        assert any("grain 1 " in finding.message for finding in errors(hurt))
        assert mended(hurt) == good


def test_a_lost_table_whose_copies_differ_stays_what_is_read(tmp_path):
    """The redundant copy, which lacks a grain, is all that is read: the primary's table may be right, or older."""
    disk = made()
    good = disk.build()
    at = Places(good)
    hurt = patched(good, (at.gd, u32(0)), (at.redundant[0] + 4, u32(0)))
    before = read(hurt, tmp_path)[0]
    assert mended(hurt) == hurt
    assert errors(hurt)
    assert read(hurt, tmp_path)[0] == before
    assert mended(patched(good, (at.rgd, u32(0)), (at.tables[0] + 4, u32(0)))) == good


def test_a_lost_table_that_is_zeroed_too():
    good = made().build()
    at = Places(good)
    for directory, table in ((at.gd, at.tables[0]), (at.rgd, at.redundant[0])):
        assert mended(patched(good, (directory, bytes(12)), (table, bytes(TABLE)))) == good


@pytest.mark.parametrize("side", ["gd", "rgd"])
def test_swapped_entries_are_put_back(side, tmp_path):
    disk = made({n: data(n, GRAIN) for n in (0, 1, 2, 600, 601, 602, 1100)})
    good = disk.build()
    at = Places(good)
    place = getattr(at, side)
    first, second = struct.unpack_from("<2I", good, place)
    hurt = patched(good, (place, u32(second, first)))
    assert read(hurt, tmp_path)[0] == disk.content()
    assert errors(hurt)
    assert mended(hurt) == good


def test_swapped_entries_where_the_layout_says_nothing():
    grains = {n: data(n, GRAIN) for n in (0, 1, 600, 601, 1100, 1600)}
    good = Hosted(128 * 2048, grains, text=TEXT.replace("196608", "262144"), sparse_tables=True).build()
    at = Places(good)
    for place in (at.gd, at.rgd):
        first, second = struct.unpack_from("<2I", good, place)
        hurt = patched(good, (place, u32(second, first)))
        assert errors(hurt)
        assert mended(hurt) == hurt


def test_differing_entries_are_left_alone_where_nothing_shows_which_is_right():
    good = made().build() + bytes(GRAIN)
    at = Places(good)
    spare = len(good) // 512 - 128
    swapped = u32(at.grains[1], at.grains[0])
    for table in (at.tables[0], at.redundant[0]):
        for piece in (u32(spare), swapped, u32(at.grains[0] + 1024 * 128)):
            hurt = patched(good, (table, piece))
            if len(piece) == 4 and piece != u32(spare):
                continue
            assert errors(hurt)
            assert mended(hurt) == hurt


def test_a_table_shared_by_both_directories_is_a_warning():
    good = made().build()
    at = Places(good)
    hurt = patched(good, (at.rgd, u32(at.tables[0] // 512)))
    assert [finding.severity for finding in check(hurt).findings] == [WARNING]
    assert "both" in check(hurt).findings[0].message


@pytest.mark.parametrize("field", [48, 56])
def test_the_place_of_a_directory_is_found_again(field, tmp_path):
    disk = made()
    good = disk.build()
    at = Places(good)
    for sector in (1 << 50, at.tables[0] // 512, at.redundant[0] // 512, at.grains[1], at.grains[1] + 39):
        hurt = patched(good, (field, struct.pack("<Q", sector)))
        assert read(hurt, tmp_path)[0] == disk.content()
        assert errors(hurt)
        assert mended(hurt) == good


def test_no_single_flipped_bit_of_the_metadata_costs_a_grain(tmp_path):
    """Directories and first tables, each bit: what is read after a repair is the disk, or what was read before."""
    disk = made({n: data(n, 4 * KIB) for n in (0, 1, 2, 1100, 1101)}, grain=8)
    good = disk.build()
    at = Places(good)
    start = at.grains[0] * 512
    spots = [place + 4 * n for place in (at.gd, at.rgd) for n in range(3)]
    spots += [place + 4 * n for place in (at.tables[0], at.redundant[0], at.tables[2]) for n in (0, 1, 77)]
    for spot, bit in [(spot, bit) for spot in spots for bit in range(32)]:
        hurt = bytearray(good)
        hurt[spot + bit // 8] ^= 1 << bit % 8
        result = mended(bytes(hurt))
        assert result[start:] == good[start:], (spot, bit)
        assert result in (good, bytes(hurt)), (spot, bit)
        if spot < at.gd + 12 and spot >= at.gd:
            assert result == good


def test_random_wounds_never_write_into_grains(tmp_path):
    chance = np.random.default_rng(7)
    good = made().build()
    at = Places(good)
    start = at.grains[0] * 512
    for _ in range(200):
        hurt = bytearray(good)
        for _ in range(int(chance.integers(1, 4))):
            hurt[int(chance.integers(at.rgd, at.tables[2] + TABLE))] ^= 1 << int(chance.integers(0, 8))
        try:
            result = mended(bytes(hurt))
        except FormatError:  # both directories are damaged
            continue
        assert result[start:] == good[start:]
