"""The VHDX log: which entries are replayed, in memory, and which logs are refused."""

import hashlib
import struct
import time
import uuid

import pytest
import vhdxmade
from hypothesis import given
from hypothesis import strategies as st
from vhdxmade import BAT_AT, FULL, HEADERS, LOG, LOG_AT, METADATA_AT, TABLES, Made, log_entry, put_log

from diskmorph.formats import vhdx
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.registry import OpenContext, open_disk
from diskmorph.formats.source import BytesSource
from diskmorph.formats.vhdx.log import PATCH, ReplayedSource, _resolved

from testkit import KIB, MIB, data, run

SIZE = 4 * MIB
FIRST = 4 * MIB  # where the first block of the file lies


def base(**header):
    blocks = {n: (FULL, data(("log", n), MIB), None) for n in range(4)}
    return Made(SIZE, blocks, header={"log": LOG, **header}).build()


def want():
    return bytearray(b"".join(data(("log", n), MIB) for n in range(4)))


def opened(image, **limits):
    return vhdx.open_image(BytesSource(bytes(image), "x.vhdx"), OpenContext(limits=Limits(**limits)))


def sector(seed):
    return data(seed, 4096)


def refused(image, kind=FormatError, **place):
    with pytest.raises(kind) as caught:
        opened(image)
    for name, value in place.items():
        assert getattr(caught.value, name) == value, (name, str(caught.value))
    return caught.value


def read(image):
    disk = checked(opened(image))
    return disk.read(0, disk.size)


def test_changes_are_replayed_in_memory_and_the_file_stays_as_it_is(tmp_path):
    image, expected = base(), want()
    put_log(image, 0, log_entry(5, [(FIRST + 8192, sector(1)), (FIRST + MIB, 8192)], size=len(image)))
    expected[8192 : 8192 + 4096] = sector(1)
    expected[MIB : MIB + 8192] = bytes(8192)
    path = tmp_path / "dirty.vhdx"
    path.write_bytes(image)
    before = hashlib.sha256(image).digest()
    with open_disk(path) as disk:
        assert disk.read(0, disk.size) == expected
        assert any("log" in warning for warning in disk.info.warnings)
        assert disk.info.features["log_pending"] is True
        for start, length in ((8191, 3), (8192 + 4095, 2), (8200, 1), (MIB - 1, 2), (MIB + 8190, 4), (8190, 5000)):
            assert disk.read(start, length) == expected[start : start + length]
    assert hashlib.sha256(path.read_bytes()).digest() == before


def test_bat_metadata_and_region_table_are_read_after_the_replay():
    image = base()
    pieces = []
    for at in (BAT_AT, METADATA_AT, METADATA_AT + 65536, TABLES[0], TABLES[1]):
        pieces.append((at, bytes(image[at : at + 4096])))
        image[at : at + 4096] = bytes(4096)
    put_log(image, 0, log_entry(5, pieces, size=len(image)))
    assert read(image) == want()


def test_no_replay_without_a_log_guid():
    image = base(log=uuid.UUID(int=0))
    put_log(image, 0, log_entry(5, [(FIRST, sector(1))], size=len(image)))
    assert read(image) == want()
    assert opened(image).info.warnings == ()
    assert read(base(log=uuid.UUID(int=0), log_version=9)) == want()


def test_entries_follow_each_other_and_later_changes_hold():
    image, expected = base(), want()
    at = 0
    for number in range(5):
        entry = log_entry(
            7 + number, [(FIRST, sector(number)), (FIRST + 4096 * number, sector(number))], size=len(image)
        )
        put_log(image, at, entry)
        at += len(entry)
        for spot in (0, 4096 * number):
            expected[spot : spot + 4096] = sector(number)
    assert read(image) == expected


def test_the_tail_says_where_the_replay_begins():
    image, expected = base(), want()
    first = log_entry(7, [(FIRST, sector("old"))], size=len(image))
    second = log_entry(8, [(FIRST + 4096, sector("new"))], tail=len(first), size=len(image))
    put_log(image, 0, first)
    put_log(image, len(first), second)
    expected[4096:8192] = sector("new")
    assert read(image) == expected


@pytest.mark.parametrize("at", [MIB - 4096, MIB - 8192, MIB - 12288])
def test_an_entry_goes_on_at_the_start_of_the_log(at):
    image, expected = base(), want()
    entry = log_entry(7, [(FIRST, sector(1)), (FIRST + 4096, sector(2))], tail=at, size=len(image))
    put_log(image, at, entry)
    after = (at + len(entry)) % MIB
    put_log(image, after, log_entry(8, [(FIRST + 4096, sector(3))], tail=at, size=len(image)))
    expected[:8192] = sector(1) + sector(3)
    assert read(image) == expected


def test_a_torn_last_entry_is_left_out():
    image, expected = base(), want()
    first = log_entry(7, [(FIRST, sector(1))], size=len(image))
    torn = bytearray(log_entry(8, [(FIRST, sector(2))], size=len(image)))
    torn[5000] ^= 1
    put_log(image, 0, first)
    put_log(image, len(first), torn)
    expected[:4096] = sector(1)
    assert read(image) == expected


def test_the_newest_sequence_wins_over_stale_ones_and_over_other_logs():
    image, expected = base(), want()
    put_log(image, 0, log_entry(90, [(FIRST, sector("stale"))], size=len(image)))
    put_log(image, 64 * KIB, log_entry(100, [(FIRST, sector("now"))], tail=64 * KIB, size=len(image)))
    put_log(
        image,
        128 * KIB,
        log_entry(200, [(FIRST, sector("other"))], tail=128 * KIB, size=len(image), log=uuid.UUID(int=3)),
    )
    put_log(image, 192 * KIB, log_entry(300, [(FIRST, sector("no tail"))], tail=4096, size=len(image)))
    expected[:4096] = sector("now")
    assert read(image) == expected


def test_sequence_numbers_of_64_bits():
    image, expected = base(), want()
    put_log(image, 0, log_entry(0xABCD_1234_5678_9ABC, [(FIRST, sector(1))], size=len(image)))
    expected[:4096] = sector(1)
    assert read(image) == expected


def test_an_entry_of_many_descriptors():
    image, expected = base(), want()
    changes = [(FIRST + 4096 * n, sector(n)) for n in range(140)]  # descriptors fill more than one sector
    put_log(image, 0, log_entry(7, changes, size=len(image)))
    for number in range(140):
        expected[4096 * number : 4096 * (number + 1)] = sector(number)
    assert read(image) == expected


def test_an_entry_without_descriptors_is_a_valid_log():
    image = base()
    put_log(image, 0, log_entry(7, [], size=len(image)))
    assert read(image) == want()


class TestSizes:
    def test_a_file_shorter_than_when_its_log_was_written_is_refused(self):
        image = base()
        put_log(image, 0, log_entry(7, [(FIRST, sector(1))], size=len(image) + 1))
        refused(image, structure="log entry", field="flushed_file_offset", offset=LOG_AT + 48, found=len(image))

    def test_a_file_is_extended_to_where_its_structures_end(self):
        image = base()
        last = len(image) + MIB
        bat = bytearray(image[BAT_AT : BAT_AT + 4096])
        struct.pack_into("<Q", bat, 24, len(image) | FULL)
        changes = [(BAT_AT, bytes(bat)), (len(image) + 4096, sector(9))]
        put_log(image, 0, log_entry(7, changes, size=len(image), last=last))
        expected = want()
        expected[3 * MIB :] = bytes(4096) + sector(9) + bytes(MIB - 8192)
        assert read(image) == expected

    def test_an_impossible_size(self):
        image = base()
        put_log(image, 0, log_entry(7, [], size=len(image), last=1 << 63))
        refused(image, field="last_file_offset")

    def test_a_log_larger_than_the_limit(self):
        image = base()
        put_log(image, 0, log_entry(7, [], size=len(image)))
        with pytest.raises(UnsupportedError, match="larger than the limit"):
            opened(image, log_bytes=MIB - 1)

    @pytest.mark.parametrize(
        "header",
        [{"log_length": 0}, {"log_length": 4096}, {"log_at": 0}, {"log_at": MIB + 4096}, {"log_at": 1 << 50}],
    )
    def test_a_log_in_no_place(self, header):
        refused(base(**header), structure="header 2")


class TestDamage:
    def test_a_log_without_a_valid_entry_is_refused(self):
        image = base()
        refused(image, structure="log", offset=LOG_AT)
        entry = bytearray(log_entry(7, [(FIRST, sector(1))], size=len(image)))
        entry[5000:5004] = b"\0\1\2\3"
        put_log(image, 0, entry)
        refused(image, structure="log", found="none")

    def test_an_unknown_version_of_the_log(self):
        image = base(log_version=1)
        put_log(image, 0, log_entry(7, [(FIRST, sector(1))], size=len(image)))
        refused(image, UnsupportedError, field="log_version", offset=HEADERS[1] + 64)

    def rebuilt(self, change, changes=None):
        image = base()
        entry = bytearray(log_entry(7, list(changes or [(FIRST, sector(1))]), size=len(image)))
        change(entry)
        put_log(image, 0, vhdxmade.sealed(entry))
        return image

    @pytest.mark.parametrize(
        ("at", "piece", "structure"),
        [
            (64, b"junk", "log descriptor"),
            (88, struct.pack("<Q", 8), "log descriptor"),
            (4096, b"junk", "log data sector"),
            (4100, struct.pack("<I", 1), "log data sector"),
            (8188, struct.pack("<I", 8), "log data sector"),
            (80, struct.pack("<Q", FIRST + 512), "log descriptor"),
            (80, struct.pack("<Q", HEADERS[0]), "log descriptor"),
            (80, struct.pack("<Q", HEADERS[1]), "log descriptor"),
            (80, struct.pack("<Q", LOG_AT), "log descriptor"),
            (80, struct.pack("<Q", 1 << 50), "log descriptor"),
            (24, struct.pack("<I", 2), "log descriptor"),
        ],
    )
    def test_entries_that_contradict_themselves_are_refused(self, at, piece, structure):
        def change(entry):
            entry[at : at + len(piece)] = piece

        assert refused(self.rebuilt(change), structure=structure).offset >= LOG_AT

    def test_fewer_sectors_than_descriptors(self):
        image = base()
        entry = bytearray(log_entry(7, [(FIRST, sector(1)), (FIRST, sector(2))], size=len(image)))
        del entry[8192:]
        struct.pack_into("<I", entry, 8, 8192)
        put_log(image, 0, vhdxmade.sealed(entry))
        refused(image, structure="log entry", field="descriptor_count")

    @pytest.mark.parametrize("length", [1, 4095, 1 << 62])
    def test_zeroes_of_a_length_that_cannot_be(self, length):
        refused(self.rebuilt(lambda entry: None, ((FIRST, length),)), structure="log descriptor")

    @pytest.mark.parametrize("length", [0, 100, 4096 * 300, 0xFFFFF000])
    def test_an_entry_of_a_length_that_cannot_be(self, length):
        refused(self.rebuilt(lambda entry: struct.pack_into("<I", entry, 8, length)), structure="log")

    def test_more_descriptors_than_the_entry_has_room_for(self):
        refused(self.rebuilt(lambda entry: struct.pack_into("<I", entry, 24, 0xFFFFFFFF)), structure="log")

    def test_entries_that_overlap_everywhere_take_no_time(self):
        length = 64 * MIB
        image = bytearray(Made(SIZE, header={"log": LOG}).build())
        head = struct.pack("<4sIIIQII16sQQ", b"loge", 0, length, 0, 7, 1, 0, LOG.bytes_le, 0, 0)
        log = head.ljust(4096, b"\0") * (length // 4096)
        for at in HEADERS:
            image[at : at + 4096] = vhdxmade.header(9, log=LOG, log_at=8 * MIB, log_length=length)
        began = time.perf_counter()
        refused(image.ljust(8 * MIB, b"\0") + log, structure="log", field="entry_length")
        assert time.perf_counter() - began < 10


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=25))
def test_overlapping_changes_resolve_to_the_last(spans):
    changes = [(start, start + length, number + 1, 0, 0) for number, (start, length) in enumerate(spans)]
    model = [0] * 50
    for start, stop, number, _, _ in changes:
        model[start:stop] = [number] * (stop - start)
    rows = _resolved(changes)
    found = [0] * 50
    assert (rows["stop"][:-1] <= rows["start"][1:]).all()
    for row in rows:
        found[int(row["start"]) : int(row["stop"])] = [int(row["sector"])] * int(row["stop"] - row["start"])
    assert found == model


def test_a_replayed_source_without_changes_is_the_file():
    source = ReplayedSource(BytesSource(b"abc"), _resolved([]), 5, [])
    assert _resolved([]).dtype == PATCH
    assert source.read(0, 5) == b"abc\0\0"
    assert source.pread(5, memoryview(bytearray(1))) == 0


@pytest.mark.parametrize("at", [0, 64 * KIB])  # qemu 7.2 loses the older part of a sequence that wraps
def test_qemu_img_replays_our_logs_alike(at, tmp_path):
    path, raw = tmp_path / "d.vhdx", tmp_path / "d.raw"
    image = base()
    bat = bytes(image[BAT_AT : BAT_AT + 4096])
    image[BAT_AT : BAT_AT + 4096] = bytes(4096)
    first = log_entry(7, [(BAT_AT, bat), (FIRST + 4096, 8192)], tail=at, size=len(image))
    put_log(image, at, first)
    put_log(image, (at + len(first)) % MIB, log_entry(8, [(FIRST, sector(2))], tail=at, size=len(image)))
    path.write_bytes(image)
    found = read(image)
    assert found[:12288] == sector(2) + bytes(8192)
    run("qemu-img", "check", "-r", "all", "-f", "vhdx", path)
    run("qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw)
    assert found == raw.read_bytes()
