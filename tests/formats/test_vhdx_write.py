"""Writing VHDX: layout, options, sizes, differencing files."""

import struct
import tempfile
import time
import tracemalloc
import uuid
from itertools import pairwise
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskmorph.formats.allocator import RUN, Identity, NewImage, NewParent
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.extents import ABSENT, DATA, DEFLATE, HOLE, ZERO
from diskmorph.formats.registry import OpenContext, open_disk
from diskmorph.formats.source import FileSource
from diskmorph.formats.vhdx import new_allocator, open_image
from diskmorph.formats.vhdx.headers import parse_regions, region_copies
from diskmorph.formats.vhdx.metadata import read_metadata
from diskmorph.formats.vhdx.schema import METADATA_REGION
from diskmorph.formats.views import Overlay, Zero

from testkit import GIB, MIB, TIB, content, data, drive, little_disk, pattern_disk, run, write_image

LINK = "11111111-2222-3333-4444-555555555555"


def image(size, *, parent=None, sector_size=512, codec=None, seed=b"seed", **options):
    return NewImage(size, "x.vhdx", sector_size, options, codec, None, parent, Identity(seed))


def parent(name="base.vhdx", **words):
    return NewParent(name, words.pop("format", "vhdx"), 9 * MIB, words.pop("identity", {"data write guid": LINK}))


def runs(*rows):
    table = np.zeros(len(rows), RUN)
    for number, (start, length, kind) in enumerate(rows):
        table[number] = (start, length, 0, kind, 0)
    return table


def bat(raw):
    entries = {}
    for at in range(3 * MIB, 4 * MIB, 8):
        value = struct.unpack_from("<Q", raw, at)[0]
        if value:
            entries[(at - 3 * MIB) // 8] = (value & 0xFFFFF, value >> 20)
    return entries


class TestLayout:
    def test_every_structure_is_where_hyper_v_puts_it(self, tmp_path):
        disk = pattern_disk(5 * MIB, [(0, 10, b"a"), (2 * MIB, MIB, ZERO), (4 * MIB, 10, b"b")])
        path, *_ = write_image("vhdx", disk, tmp_path / "x.vhdx", options={"block_size": "1M"})
        raw = path.read_bytes()
        assert raw[:28] == b"vhdxfile" + "diskmorph".encode("utf-16-le") + b"\0\0"
        for number, at in enumerate((0x10000, 0x20000)):
            head = raw[at : at + 4096]
            fields = struct.unpack_from("<4sIQ16s16s16sHHIQ", head)
            assert (fields[0], fields[2]) == (b"head", number + 1)
            assert fields[5:] == (bytes(16), 0, 1, MIB, MIB)
            assert fields[1] == google_crc32c.value(head[:4] + bytes(4) + head[8:])
            assert not any(head[80:])
        for at in (0x30000, 0x40000):
            table = raw[at : at + 65536]
            assert table[:4] == b"regi"
            assert struct.unpack_from("<I", table, 4)[0] == google_crc32c.value(table[:4] + bytes(4) + table[8:])
        assert raw[MIB : 2 * MIB] == bytes(MIB)
        assert raw[2 * MIB : 2 * MIB + 8] == b"metadata"
        assert bat(raw) == {0: (6, 4), 2: (2, 0), 4: (6, 5)}
        assert len(raw) == 6 * MIB

    def test_a_fixed_file_has_every_block_in_order(self, tmp_path):
        path, *_ = write_image("vhdx", little_disk(5 * MIB), tmp_path / "x.vhdx", options={"subformat": "fixed"})
        raw = path.read_bytes()
        assert bat(raw) == {0: (6, 4), 1: (6, 6), 2: (6, 8)}
        assert len(raw) == 10 * MIB
        assert raw[4 * MIB : 9 * MIB] == content(little_disk(5 * MIB))

    def test_headers_come_last_and_nothing_comes_twice(self):
        allocator = new_allocator(image(300 * MIB, block_size="1M"))
        allocator.place(runs((0, 200 * MIB, DATA), (200 * MIB, 100 * MIB, ZERO)))
        writes = [*allocator.begin(), *allocator.settle(200 * MIB), *allocator.finish()]
        assert [write.offset for write in writes[-2:]] == [0x10000, 0x20000]
        spans = sorted((write.offset, write.offset + len(write.data)) for write in writes)
        assert all(low[1] <= high[0] for low, high in pairwise(spans))
        assert {write.member for write in writes} == {0}

    def test_identity_alone_decides_the_bytes(self):
        def finished(seed):
            return list(new_allocator(image(MIB, seed=seed)).finish())

        assert finished(b"a") == finished(b"a")
        assert finished(b"a") != finished(b"b")
        assert finished(None) != finished(None)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"subformat": "thin"}, OptionError),
            ({"block_size": "512K"}, OptionError),
            ({"block_size": "512M"}, OptionError),
            ({"block_size": "3M"}, OptionError),
            ({"log_size": "1048577"}, OptionError),
            ({"log_size": "0"}, OptionError),
            ({"logical_sector_size": "520"}, OptionError),
            ({"physical_sector_size": "1024"}, OptionError),
            ({"blocksize": "1M"}, OptionError),
        ],
    )
    def test_what_is_refused(self, options, error):
        with pytest.raises(error):
            new_allocator(image(MIB, **options))

    def test_compression_is_refused(self):
        with pytest.raises(OptionError, match="compressed"):
            new_allocator(image(MIB, codec=DEFLATE))

    def test_at_most_64_tebibytes(self):
        assert new_allocator(image(64 * TIB)).size == 64 * TIB
        with pytest.raises(TargetError, match="too large"):
            new_allocator(image(64 * TIB + 1))

    @pytest.mark.parametrize(
        ("size", "block"), [(1, 2), (2 * TIB, 2), (2 * TIB + 1, 8), (8 * TIB, 8), (8 * TIB + 1, 32), (64 * TIB, 32)]
    )
    def test_the_default_block_grows_with_the_disk(self, size, block):
        assert new_allocator(image(size)).unit == block * MIB

    @pytest.mark.parametrize("options", [{}, {"logical_sector_size": "512"}, {"physical_sector_size": "512"}])
    def test_sectors(self, options, tmp_path):
        path = tmp_path / "x.vhdx"
        allocator = new_allocator(NewImage(10_000, path.name, 4096, options))
        drive(allocator, Zero(10_000), tmp_path)
        logical = int(options.get("logical_sector_size", 4096))
        with FileSource(path) as source:
            metadata = read_metadata(source, parse_regions(region_copies(source)[0])[METADATA_REGION])
        assert metadata.sector_size == logical == allocator.sector_size
        assert metadata.physical_sector_size == int(options.get("physical_sector_size", 4096))
        assert metadata.size == allocator.size == -(-10_000 // logical) * logical

    def test_log_size_moves_what_follows(self, tmp_path):
        path, *_ = write_image("vhdx", little_disk(MIB), tmp_path / "x.vhdx", options={"log_size": "5M"})
        raw = path.read_bytes()
        assert struct.unpack_from("<IQ", raw, 0x10000 + 68) == (5 * MIB, MIB)
        assert raw[6 * MIB : 6 * MIB + 8] == b"metadata"
        run("qemu-img", "check", "-f", "vhdx", path)


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "block", "expected"),
        [
            (0, "1M", 4 * MIB),
            (1, "1M", 5 * MIB),
            (4096 * MIB, "1M", 4100 * MIB),
            (131_000 * MIB, "1M", (4 + 131_000) * MIB),
            (131_072 * MIB, "1M", (5 + 131_072) * MIB),  # 131,072 blocks and 31 bitmap entries: a second MiB of BAT
            (64 * TIB, "32M", 64 * TIB + (3 + 17) * MIB),
        ],
    )
    def test_full_disks(self, size, block, expected):
        for subformat in ("fixed", "dynamic"):
            allocator = new_allocator(image(size, block_size=block, subformat=subformat))
            if size:
                allocator.place(runs((0, size, DATA)))
            assert allocator.sizes() == (expected,)

    def test_the_largest_disk_is_measured_in_little_time_and_memory(self):
        allocator = new_allocator(image(64 * TIB))
        tracemalloc.start()
        began = time.perf_counter()
        allocator.place(runs((0, 32 * TIB, DATA), (32 * TIB, 16 * TIB, HOLE), (48 * TIB, 16 * TIB, ZERO)))
        assert allocator.sizes() == (32 * TIB + 20 * MIB,)
        writes = sum(len(write.data) for write in allocator.finish())
        assert writes < 14 * MIB  # the entries of the hole are not written
        assert time.perf_counter() - began < 10
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
        tracemalloc.stop()

    def test_settled_pages_are_given_back(self):
        allocator = new_allocator(image(2 * TIB, block_size="1M"))
        tracemalloc.start()
        total = 0
        for at in range(0, 2 * TIB, 64 * GIB):
            allocator.place(runs((at, 64 * GIB, DATA)))
            total += sum(len(write.data) for write in allocator.settle(at + 64 * GIB))
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        tracemalloc.stop()
        assert total >= 2 * TIB // MIB * 8


class TestDifferencing:
    def written(self, table, tmp_path, size=9 * MIB, **options):
        allocator = new_allocator(image(size, parent=parent(), block_size="1M", **options))
        assert allocator.overlay
        placed = allocator.place(table)
        raw = bytearray(allocator.sizes()[0])
        for write in [*allocator.settle(size), *allocator.finish()]:
            raw[write.offset : write.offset + len(write.data)] = write.data
        for row in placed[placed["kind"] == DATA]:
            piece = data(int(row["start"]), int(row["length"]))
            raw[int(row["offset"]) : int(row["offset"]) + len(piece)] = piece
        path = tmp_path / "x.vhdx"
        path.write_bytes(raw)
        return path, placed

    def test_states(self, tmp_path):
        table = runs(
            (0, MIB, DATA),
            (MIB, MIB, ABSENT),
            (2 * MIB, MIB, ZERO),
            (3 * MIB, 512, ABSENT),
            (3 * MIB + 512, 1024, DATA),
            (3 * MIB + 1536, MIB - 1536, ABSENT),
            (4 * MIB, 4096, ZERO),
            (4 * MIB + 4096, MIB - 4096, ABSENT),
            (5 * MIB, 4096, ZERO),
            (5 * MIB + 4096, MIB - 4096, DATA),
            (6 * MIB, 3 * MIB, ABSENT),
        )
        path, placed = self.written(table, tmp_path)
        raw = path.read_bytes()
        assert bat(raw) == {0: (6, 4), 2: (2, 0), 3: (7, 6), 4: (7, 7), 5: (6, 8), 4096: (6, 5)}
        bits = np.unpackbits(np.frombuffer(raw, np.uint8, MIB, 5 * MIB), bitorder="little")
        assert np.flatnonzero(bits[2048 * 3 : 2048 * 4]).tolist() == [1, 2]
        assert np.flatnonzero(bits[2048 * 4 : 2048 * 5]).tolist() == list(range(8))
        assert [tuple(row)[:3] for row in placed[placed["kind"] == ZERO][["start", "length", "offset"]].tolist()] == [
            (4 * MIB, 4096, 7 * MIB),
            (5 * MIB, 4096, 8 * MIB),
        ]

    def test_the_last_block_is_whole_where_the_disk_ends(self, tmp_path):
        size = 2 * MIB + 1000
        path, _ = self.written(runs((0, 2 * MIB, ABSENT), (2 * MIB, 1000, DATA)), tmp_path, size)
        assert bat(path.read_bytes()) == {2: (6, 4)}
        path, _ = self.written(
            runs((0, 2 * MIB, ABSENT), (2 * MIB, 512, ABSENT), (2 * MIB + 512, 488, DATA)), tmp_path, size
        )
        raw = path.read_bytes()
        assert bat(raw) == {2: (7, 5), 4096: (6, 4)}
        assert np.flatnonzero(
            np.unpackbits(np.frombuffer(raw, np.uint8, MIB, 4 * MIB), bitorder="little")
        ).tolist() == [4097]

    def test_each_chunk_has_its_bitmap_before_its_first_partial_block(self, tmp_path):
        size = 9 * GIB
        spots = [0, 4 * GIB - 512, 4 * GIB, 8 * GIB + 5 * MIB]
        rows, at = [], 0
        for spot in spots:
            if spot > at:
                rows.append((at, spot - at, ABSENT))
            rows.append((spot, 512, DATA))
            at = spot + 512
        rows.append((at, size - at, ABSENT))
        path, placed = self.written(runs(*rows), tmp_path, size)
        assert [int(offset) // MIB for offset in placed["offset"]] == [5, 6, 8, 10]
        assert {n: v for n, v in bat(path.read_bytes()).items() if n % 4097 == 4096} == {
            4096: (6, 4),
            2 * 4097 - 1: (6, 7),
            3 * 4097 - 1: (6, 9),
        }

    @given(st.data())
    @settings(max_examples=25)
    def test_any_pieces_read_back(self, draw):
        sectors = 3 * 2048
        cuts = sorted(draw.draw(st.sets(st.integers(1, sectors - 1), max_size=12)))
        kinds = draw.draw(
            st.lists(st.sampled_from((DATA, ZERO, ABSENT)), min_size=len(cuts) + 1, max_size=len(cuts) + 1)
        )
        table = runs(
            *(
                (low * 512, (high - low) * 512, kind)
                for low, high, kind in zip([0, *cuts], [*cuts, sectors], kinds, strict=True)
            )
        )
        below = data("below", 3 * MIB)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_image("vhdx", pattern_disk(3 * MIB, [(0, 3 * MIB, below)]), folder / "base.vhdx")
            path, placed = self.written(table, folder, 3 * MIB)
            want = bytearray(below)
            for start, length, kind in table[["start", "length", "kind"]].tolist():
                if kind == ZERO:
                    want[start : start + length] = bytes(length)
            for start, length, kind in placed[["start", "length", "kind"]].tolist():
                if kind == DATA:
                    want[start : start + length] = data(start, length)
            top = layer(path)
            with open_disk(folder / "base.vhdx") as base:
                assert content(checked(Overlay(top, base))) == want
            top.close()

    @pytest.mark.parametrize(
        ("name", "key", "value"),
        [
            ("base.vhdx", "relative_path", ".\\base.vhdx"),
            ("../vms/base.vhdx", "relative_path", "..\\vms\\base.vhdx"),
            ("sub/base.vhdx", "relative_path", ".\\sub\\base.vhdx"),
            ("/vms/base.vhdx", "absolute_win32_path", "\\vms\\base.vhdx"),
        ],
    )
    def test_the_locator_names_the_parent_as_windows_does(self, name, key, value, tmp_path):
        allocator = new_allocator(image(MIB, parent=parent(name)))
        paths = drive(allocator, Zero(MIB), tmp_path)
        with FileSource(paths[0]) as source:
            metadata = read_metadata(source, parse_regions(region_copies(source)[0])[METADATA_REGION])
        assert metadata.locator == {"parent_linkage": f"{{{LINK}}}", key: value}
        assert LINK in run("vhdiinfo", paths[0]).stdout
        assert layer(paths[0]).info.parent.names[0] == str(Path(name))

    @pytest.mark.parametrize("words", [{"format": "vhd"}, {"format": "raw", "identity": {}}, {"identity": {}}], ids=str)
    def test_only_vhdx_can_be_the_parent(self, words):
        with pytest.raises(OptionError, match="must be VHDX"):
            new_allocator(image(MIB, parent=parent(**words)))

    def test_a_fixed_file_has_no_parent(self):
        with pytest.raises(OptionError, match="no parent"):
            new_allocator(image(MIB, parent=parent(), subformat="fixed"))


def layer(path):
    return open_image(FileSource(path), OpenContext())


def test_peers_open_what_is_written(tmp_path):
    for number, options in enumerate(({}, {"subformat": "fixed"}, {"block_size": "16M", "log_size": "2M"})):
        path, *_ = write_image("vhdx", little_disk(), tmp_path / f"{number}.vhdx", options=options)
        info = run("vhdiinfo", path).stdout
        assert "VHDX" in info
        assert f"{little_disk().size} bytes" in info
        assert "No errors" in run("qemu-img", "check", "-f", "vhdx", path).stdout
        with open_disk(path) as disk:
            assert uuid.UUID(disk.info.features["virtual_disk_id"]).version == 4
            assert disk.info.subformat == options.get("subformat", "dynamic")
            assert disk.info.warnings == ()
