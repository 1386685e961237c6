"""Checking and repairing VHDX: each kind of damage is found where it lies, and what can be mended is."""

import struct
import tracemalloc
import uuid

import pytest
import vhdxmade
from vhdxmade import BAT_AT, FULL, HEADERS, LOG, PARTIAL, TABLES, UNMAPPED, ZEROED, Made, log_entry, put_log

from diskmorph.formats.allocator import Identity, NewParent
from diskmorph.formats.check import ERROR, WARNING, CheckReport
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.registry import OpenContext
from diskmorph.formats.source import BytesSource, FileSource
from diskmorph.formats.vhdx import check_image, open_image

from testkit import MIB, content, data, little_disk, run, write_image

SIZE = 4 * MIB
LINK = {"parent_linkage": "{x}", "relative_path": "p"}


def made(**words):
    words.setdefault("blocks", {n: (FULL, data(("check", n), MIB), None) for n in range(4)})
    return Made(SIZE, words.pop("blocks"), **words)


def check(image, repair=None):
    return check_image(BytesSource(bytes(image), "x.vhdx"), OpenContext(), repair)


def found(image):
    return [(f.structure, f.offset, f.severity) for f in check(image).findings]


def patched(image, at, piece):
    image = bytearray(image)
    image[at : at + len(piece)] = piece
    return image


def mended(image, repair="all"):
    image = bytearray(image)
    for patch in check(image, repair).patches:
        assert patch.why
        if patch.offset + len(patch.data) > len(image):
            image.extend(bytes(patch.offset + len(patch.data) - len(image)))
        image[patch.offset : patch.offset + len(patch.data)] = patch.data
    return image


def bat(number, value):
    return BAT_AT + 8 * number, struct.pack("<Q", value)


class TestClean:
    @pytest.mark.parametrize("options", [{}, {"subformat": "fixed"}, {"block_size": "1M"}, {"log_size": "3M"}], ids=str)
    def test_what_we_write(self, options, tmp_path):
        path, *_ = write_image("vhdx", little_disk(), tmp_path / "x.vhdx", options=options)
        with FileSource(path) as source:
            report = check_image(source, OpenContext(), "all")
        assert (report.findings, report.patches, report.clean) == ([], [], True)

    def test_a_differencing_file(self, tmp_path):
        parent = NewParent("base.vhdx", "vhdx", SIZE, {"data write guid": str(uuid.UUID(int=1))})
        path, *_ = write_image("vhdx", little_disk(), tmp_path / "x.vhdx", parent=parent, identity=Identity(b"x"))
        with FileSource(path) as source:
            assert check_image(source, OpenContext()).findings == []

    @pytest.mark.parametrize("options", ["subformat=dynamic", "subformat=dynamic,block_size=1M", "subformat=fixed"])
    def test_what_qemu_img_writes_has_no_errors(self, options, tmp_path):
        raw, path = tmp_path / "d.raw", tmp_path / "d.vhdx"
        raw.write_bytes(content(little_disk()))
        run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, path)
        with FileSource(path) as source:
            assert check_image(source, OpenContext()).clean

    def test_scattered_writes_of_qemu_io(self, tmp_path):
        path = tmp_path / "d.vhdx"
        run("qemu-img", "create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "9G")
        words = [w for at in (8192, 5000, 4096, 100, 4095) for w in ("-c", f"write -P 1 {at}M 4k")]
        run("qemu-io", "-f", "vhdx", *words, path)
        with FileSource(path) as source:
            assert check_image(source, OpenContext()).clean


class TestCopies:
    @pytest.mark.parametrize("at", [*HEADERS, *TABLES])
    @pytest.mark.parametrize("field", [0, 4, 20])
    def test_a_damaged_copy_is_an_error_that_is_mended(self, at, field):
        good = made().build()
        bad = patched(good, at + field, b"\xaa\x55")
        name = {
            HEADERS[0]: "header 1",
            HEADERS[1]: "header 2",
            TABLES[0]: "region table 1",
            TABLES[1]: "region table 2",
        }
        assert found(bad) == [(name[at], at, ERROR)]
        assert check(bad).corruptions == 1
        assert check(bad, "leaks").patches == []
        whole = mended(bad)
        assert found(whole) == []
        assert open_image(BytesSource(bytes(whole)), OpenContext()).read(0, SIZE) == data_of()

    def test_a_mended_header_is_newer_and_its_file_is_another(self):
        bad = patched(made().build(), HEADERS[1] + 20, b"\xaa")
        heads = [struct.unpack_from("<Q16s16s", mended(bad), at + 8) for at in HEADERS]
        assert sorted(head[0] for head in heads) == [8, 9]
        assert len({head[1] for head in heads}) == 1
        assert heads[0][1] != uuid.UUID(int=1).bytes_le
        assert {head[2] for head in heads} == {vhdxmade.DATA_WRITE.bytes_le}

    @pytest.mark.parametrize("pair", [HEADERS, TABLES])
    def test_what_cannot_be_read_cannot_be_checked(self, pair):
        bad = made().build()
        for at in pair:
            bad[at + 20] ^= 1
        with pytest.raises(FormatError):
            check(bad)

    def test_region_tables_that_differ(self):
        image = made().build()
        entries = [
            ("BAT", BAT_AT, MIB, 1),
            ("metadata", vhdxmade.METADATA_AT, MIB, 1),
            (uuid.UUID(int=1), 64 * MIB, MIB, 0),
        ]
        image[TABLES[1] : TABLES[1] + 65536] = vhdxmade.region_table(entries)
        assert found(image) == [("region table 2", TABLES[1], ERROR)]
        assert found(mended(image)) == []

    def test_equal_sequence_numbers_are_a_warning(self):
        image = made().build()
        image[HEADERS[1] : HEADERS[1] + 4096] = image[HEADERS[0] : HEADERS[0] + 4096]
        assert found(image) == [("header", HEADERS[0] + 8, WARNING)]
        assert check(image).clean


def data_of():
    return b"".join(data(("check", n), MIB) for n in range(4))


class TestLog:
    def logged(self, changes, **words):
        image = made(header={"log": LOG}).build()
        put_log(image, 0, log_entry(7, changes, size=len(image), **words))
        return image

    def test_a_pending_log_is_a_warning_and_is_replayed_by_repair(self, tmp_path):
        clean = made().build()
        image = self.logged(
            [(BAT_AT, bytes(clean[BAT_AT : BAT_AT + 4096])), (TABLES[0], bytes(clean[TABLES[0] :][:4096]))]
        )
        image[BAT_AT : BAT_AT + 4096] = bytes(4096)
        image[TABLES[0] : TABLES[0] + 4096] = bytes(4096)
        assert found(image) == [("log", MIB, WARNING)]
        assert check(image).clean
        whole = mended(image)
        disk = open_image(BytesSource(bytes(whole)), OpenContext())
        assert disk.info.warnings == ()
        assert disk.read(0, SIZE) == data_of()
        assert found(whole) == []
        path = tmp_path / "x.vhdx"
        path.write_bytes(whole)
        assert "No errors" in run("qemu-img", "check", path).stdout

    def test_headers_are_mended_last(self):
        patches = check(self.logged([(4 * MIB, bytes(4096))]), "all").patches
        assert [patch.offset for patch in patches] == [4 * MIB, HEADERS[0], HEADERS[1]]

    def test_what_was_replayed_is_stored_before_the_log_is_emptied(self):
        bad = patched(self.logged([(4 * MIB, bytes(4096)), (5 * MIB, bytes(4096))]), TABLES[1], b"\xaa")
        patches = check(bad, "all").patches
        assert [(patch.offset, patch.sync) for patch in patches] == [
            (4 * MIB, False),
            (5 * MIB, False),
            (TABLES[1], False),
            (HEADERS[0], True),
            (HEADERS[1], True),
        ]

    def test_every_state_on_the_way_can_be_read(self):
        image = self.logged([(4 * MIB + 4096, data("new", 4096)), (5 * MIB, 8192)])
        want = open_image(BytesSource(bytes(image)), OpenContext()).read(0, SIZE)
        for patch in check(image, "all").patches:
            image[patch.offset : patch.offset + len(patch.data)] = patch.data
            assert open_image(BytesSource(bytes(image)), OpenContext()).read(0, SIZE) == want

    def test_the_file_is_extended(self):
        image = self.logged([])
        put_log(image, 0, log_entry(7, [], size=len(image), last=len(image) + MIB))
        assert len(mended(image)) == len(image) + MIB

    def test_a_replay_too_large_for_a_journal_is_refused(self):
        image = made(header={"log": LOG}).build()
        put_log(image, 0, log_entry(7, [(8 * MIB, 100 * MIB)], size=len(image), last=200 * MIB))
        assert check(image).clean
        with pytest.raises(UnsupportedError, match="too much"):
            check(image, "all")

    def test_a_log_that_cannot_be_replayed_cannot_be_checked(self):
        with pytest.raises(FormatError):
            check(made(header={"log": LOG}).build())

    def test_an_unknown_version_of_an_empty_log_is_a_warning(self):
        assert found(made(header={"log_version": 3}).build()) == [("header", HEADERS[1] + 64, WARNING)]


class TestBat:
    @pytest.mark.parametrize(
        ("value", "severity", "words"),
        [
            (4 * MIB | FULL, ERROR, "where another block"),  # block 0 lies there
            (MIB | FULL, ERROR, "where another block or region"),  # the log
            (BAT_AT | FULL, ERROR, "where another block or region"),
            (0 | FULL, ERROR, "header section"),
            (8 * MIB | FULL, ERROR, "beyond the end"),
            (0xFFFF_FFFF_FFF0_0000 | FULL, ERROR, "beyond the end"),
            (4, ERROR, "state is not valid"),
            (5 * MIB | PARTIAL, ERROR, "state is not valid"),
            (5 * MIB | 0x80 | FULL, WARNING, "reserved bits"),
            (5 * MIB | ZEROED, WARNING, "has an offset"),
            (5 * MIB | UNMAPPED, WARNING, "has an offset"),
        ],
    )
    def test_each_fault_is_found_at_its_entry(self, value, severity, words):
        image = patched(made().build(), *bat(1, value))
        (finding,) = check(image).findings
        assert (finding.structure, finding.offset, finding.severity) == ("BAT", BAT_AT + 8, severity)
        assert words in finding.message
        assert check(image).clean is (severity == WARNING)

    def test_blocks_that_overlap_in_part(self):
        block = 2 * MIB
        image = Made(4 * MIB, {0: (FULL, b"0", None), 1: (FULL, b"1", None)}, block=block).build()
        assert found(image) == []
        assert found(patched(image, *bat(1, 5 * MIB | FULL))) == [("BAT", BAT_AT + 8, ERROR)]

    def test_blocks_of_different_batches_that_overlap(self):
        image = Made(140_000 * MIB, {0: (FULL, b"0", None)})
        raw = image.build()
        place = struct.unpack_from("<Q", raw, BAT_AT)[0]
        struct.pack_into("<Q", raw, image.entry_at(139_999), place)
        assert found(raw) == [("BAT", image.entry_at(139_999), ERROR)]

    def test_a_bitmap_entry_where_none_may_be_is_a_warning(self):
        """qemu-img 7.2 leaves such entries."""
        image = Made(4097 * MIB)
        raw = patched(image.build(), image.bitmap_entry_at(0), struct.pack("<Q", 5 * MIB | 6))
        assert found(raw) == [("BAT", image.bitmap_entry_at(0), WARNING)]

    def test_bitmaps_of_a_differencing_disk(self):
        image = made(blocks={1: (PARTIAL, b"1", b"\1")}, parent=LINK)
        raw = image.build()
        assert found(raw) == []
        at = image.bitmap_entry_at(0)
        for value, places in (
            (0, [image.entry_at(1)]),
            (3, [at, image.entry_at(1)]),
            (4 * MIB | 6, [at]),  # where block 1 lies
            (64 * MIB | 6, [at]),
            (6, [at]),
        ):
            findings = found(patched(raw, at, struct.pack("<Q", value)))
            assert sorted(findings) == sorted(("BAT", place, ERROR) for place in places), value

    def test_the_last_block_cut_behind_the_disks_end_is_a_warning(self):
        image = Made(MIB + 512, {1: (FULL, b"tail", None)}).build()
        del image[-4096:]
        assert found(image) == [("BAT", BAT_AT + 8, WARNING)]

    def test_a_region_over_the_log(self):
        image = made().build()
        entries = [("BAT", BAT_AT, MIB, 1), ("metadata", vhdxmade.METADATA_AT, MIB, 1), (uuid.UUID(int=1), MIB, MIB, 0)]
        for at in TABLES:
            image[at : at + 65536] = vhdxmade.region_table(entries)
        ((name, at, severity),) = found(image)
        assert name in {str(uuid.UUID(int=1)), "log"}
        assert (at, severity) == (MIB, ERROR)

    def test_findings_are_counted_beyond_what_is_listed(self):
        count = 5000
        image = Made(count * MIB).build()
        for number in range(4000):
            struct.pack_into("<Q", image, BAT_AT + 8 * number, 4)
        report = check(image)
        assert report.corruptions == 4000
        assert len(report.findings) == CheckReport.LIMIT
        assert report.omitted >= 1

    def test_a_file_larger_than_any(self):
        source = BytesSource(bytes(made().build()))
        source.size = 80 << 40
        with pytest.raises(UnsupportedError):
            check_image(source, OpenContext())

    def test_the_largest_disk_is_checked_in_little_memory(self, tmp_path):
        image = Made(64 << 40, block=32 * MIB)
        raw = image.build()
        struct.pack_into("<Q", raw, image.entry_at((2 << 20) - 1), 1 << 46 | FULL)
        path = tmp_path / "big.vhdx"
        with open(path, "wb") as file:
            file.write(raw)
            file.truncate((1 << 46) // 8)
        with FileSource(path) as source:
            tracemalloc.start()
            findings = check_image(source, OpenContext()).findings
            assert tracemalloc.get_traced_memory()[1] < 100 * MIB
            tracemalloc.stop()
        assert [(f.offset, "beyond" in f.message) for f in findings] == [(image.entry_at((2 << 20) - 1), True)]
