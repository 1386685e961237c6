"""Checking VMDK: nothing to say of sound images, each wound told once, tables restored from their other copy."""

import struct

import pytest
import vmdkmade
from vmdkmade import ZEROED, Hosted, Stream

import diskmorph
from diskmorph.formats.check import ERROR, LEAK, WARNING
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.registry import OpenContext, load, open_disk, require_format
from diskmorph.formats.source import FileSource
from diskmorph.formats.views import Regions

from testkit import KIB, MIB, content, data, little_disk, run, write_image

GRAIN = 64 * KIB
VMDK = load(require_format("vmdk"))


def check(path, repair=None):
    return VMDK.check_image(FileSource(path), OpenContext(), repair)


def put(path, raw):
    path.write_bytes(raw)
    return path


def patched(raw, *pieces):
    image = bytearray(raw)
    for offset, piece in pieces:
        image[offset : offset + len(piece)] = piece
    return bytes(image)


def u32(number):
    return struct.pack("<I", number)


class Places:
    """Where the structures of a hosted image lie, in bytes."""

    def __init__(self, raw):
        self.rgd, self.gd, self.overhead = (word * 512 for word in struct.unpack_from("<QQQ", raw, 48))
        self.table = struct.unpack_from("<I", raw, self.gd)[0] * 512
        self.redundant = struct.unpack_from("<I", raw, self.rgd)[0] * 512


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    disk = Regions()
    disk.add_disk(little_disk(3 * MIB))
    disk.pad_to(69 * MIB)
    disk.add_disk(little_disk(MIB))
    path, *_ = write_image("vmdk", disk, tmp_path_factory.mktemp("sound") / "disk.vmdk")
    return path.read_bytes()


@pytest.fixture
def sound(image, tmp_path):
    return put(tmp_path / "disk.vmdk", image)


@pytest.mark.parametrize(
    "subformat", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]
)
def test_qemus_images_are_clean(subformat, tmp_path):
    raw, path = put(tmp_path / "a.raw", content(little_disk(3 * MIB))), tmp_path / "a.vmdk"
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, path)
    assert check(path).findings == []


def test_the_zeroes_that_qemu_leaves_behind_a_stream(tmp_path):
    raw, path = put(tmp_path / "a.raw", content(little_disk(3 * MIB))), tmp_path / "a.vmdk"
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
    report = check(path)
    assert report.corruptions == 0
    assert [finding.severity for finding in report.findings] == [WARNING]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert [finding.severity for finding in check(path).findings] == [LEAK]


WOUNDS = {
    "a directory entry beyond the file": lambda at: [(at.gd + 4, u32(0x7FFFFFFF))],
    "a directory entry zeroed": lambda at: [(at.gd, bytes(4))],
    "a directory all zeroed": lambda at: [(at.gd, bytes(12))],
    "two directory entries alike": lambda at: [(at.gd + 4, u32(at.table // 512))],
    "the redundant directory beyond the file": lambda at: [(at.rgd + 8, u32(0x7FFFFFFF))],
    "the redundant directory zeroed": lambda at: [(at.rgd, bytes(12))],
    "an entry beyond the file": lambda at: [(at.table, u32(0x7FFFFFFF))],
    "an entry zeroed": lambda at: [(at.table, bytes(4))],
    "an entry in the header": lambda at: [(at.table, u32(1))],
    "an entry in the tables": lambda at: [(at.table, u32(at.table // 512))],
    "a redundant entry beyond the file": lambda at: [(at.redundant, u32(0x7FFFFFFF))],
    "a redundant entry zeroed": lambda at: [(at.redundant, bytes(4))],
    "a table zeroed": lambda at: [(at.table, bytes(2048))],
}


@pytest.mark.parametrize("wound", WOUNDS)
def test_a_wound_is_found_and_healed_from_the_other_copy(wound, sound):
    good = sound.read_bytes()
    hurt = patched(good, *WOUNDS[wound](Places(good)))
    assert hurt != good
    report = check(put(sound, hurt), "all")
    assert report.corruptions
    assert not report.clean
    assert any(finding.severity == ERROR for finding in report.findings)
    assert put(sound, patched(hurt, *((p.offset, p.data) for p in report.patches))).read_bytes() == good
    assert check(sound).findings == []
    assert check(put(sound, hurt)).patches == []
    assert check(sound, "leaks").patches == []


def test_a_grain_used_twice(sound):
    good = sound.read_bytes()
    at = Places(good)
    entries = [struct.unpack_from("<I", good, at.table + 4 * n)[0] for n in range(512)]
    first, second = [n for n, entry in enumerate(entries) if entry][:2]
    for where, value in ((first, second), (second, first)):
        hurt = patched(good, (at.table + 4 * where, u32(entries[value])))
        report = check(put(sound, hurt), "all")
        assert any("another grain" in finding.message for finding in report.findings)
        assert patched(hurt, *((p.offset, p.data) for p in report.patches)) == good


def test_a_grain_used_twice_in_both_copies_is_left_alone(sound):
    good = sound.read_bytes()
    at = Places(good)
    entry = good[at.table : at.table + 4]
    hurt = patched(good, (at.table + 40, entry), (at.redundant + 40, entry))
    report = check(put(sound, hurt), "all")
    assert report.corruptions == 1
    assert report.patches == []


def test_the_place_of_the_directory_is_damaged(sound):
    good = sound.read_bytes()
    hurt = patched(good, (56, struct.pack("<Q", 1 << 50)))
    report = check(put(sound, hurt), "all")
    assert report.corruptions
    put(sound, patched(hurt, *((p.offset, p.data) for p in report.patches)))
    with open_disk(sound) as disk:
        assert disk.info.warnings == ()


def test_an_unclean_shutdown_is_told_and_cleared(sound):
    good = sound.read_bytes()
    report = check(put(sound, patched(good, (72, b"\1"))), "all")
    assert [(f.severity, f.offset) for f in report.findings] == [(WARNING, 72)]
    assert report.clean
    assert patched(sound.read_bytes(), *((p.offset, p.data) for p in report.patches)) == good


def test_zeroed_grains_are_no_grains(tmp_path):
    text = vmdkmade.words(['RW 1024 SPARSE "x.vmdk"'])
    grains = {0: data(0, GRAIN), 1: ZEROED, 2: ZEROED}
    path = tmp_path / "x.vmdk"
    assert check(put(path, Hosted(1024, grains, text=text, version=2, flags=7).build())).findings == []
    report = check(put(path, Hosted(1024, grains, text=text).build()))
    assert report.corruptions == 2
    assert "metadata" in report.findings[0].message


def test_grains_off_the_grid(tmp_path):
    text = vmdkmade.words(['RW 1024 SPARSE "x.vmdk"'])
    raw = Hosted(1024, {n: data(n, GRAIN) for n in range(4)}, text=text, flags=1).build()
    at = Places(raw)
    table = struct.unpack_from("<4I", raw, at.table)
    over = patched(raw, (at.table + 4, u32(table[1] + 1)))
    report = check(put(tmp_path / "x.vmdk", over))
    assert [finding.severity for finding in report.findings] == [WARNING, ERROR]
    assert "overlaps" in report.findings[1].message
    apart = patched(raw, (at.table + 12, u32(table[3] + 1))) + bytes(512)
    report = check(put(tmp_path / "x.vmdk", apart))
    assert [finding.severity for finding in report.findings] == [WARNING]


def test_many_findings_are_counted(sound):
    good = sound.read_bytes()
    at = Places(good)
    hurt = patched(good, (at.table, u32(0x7FFFFFFF) * 512))
    report = check(put(sound, hurt))
    assert report.corruptions >= 1024
    assert len(report.findings) <= report.LIMIT


class TestSplit:
    def make(self, folder):
        path, extent = write_image(
            "vmdk", little_disk(3 * MIB), folder / "disk.vmdk", options={"subformat": "twoGbMaxExtentSparse"}
        )
        return path, extent

    def test_findings_name_the_extent(self, tmp_path):
        path, extent = self.make(tmp_path)
        raw = extent.read_bytes()
        put(extent, patched(raw, (Places(raw).table, u32(0x7FFFFFFF))))
        report = check(path, "all")
        assert report.corruptions
        assert all("disk-s001.vmdk" in finding.message for finding in report.findings)
        assert report.patches == []

    def test_missing_and_short_extents(self, tmp_path):
        path, extent = self.make(tmp_path)
        raw = extent.read_bytes()
        put(extent, raw[: len(raw) // 2])
        assert any("disk-s001.vmdk" in finding.message for finding in check(path).findings)
        put(extent, raw[:100])
        assert "disk-s001.vmdk" in check(path).findings[0].message
        extent.unlink()
        report = check(path)
        assert report.corruptions == 1
        assert "does not exist" in report.findings[0].message
        flat = vmdkmade.descriptor(tmp_path / "flat.vmdk", ['RW 100 FLAT "f.bin" 0'], "monolithicFlat")
        put(tmp_path / "f.bin", bytes(99 * 512))
        assert check(flat).corruptions == 1

    def test_an_extent_alone(self, tmp_path):
        _, extent = self.make(tmp_path)
        assert [finding.severity for finding in check(extent).findings] == [WARNING]


class TestDescriptor:
    def findings(self, folder, lines, create_type="custom", **more):
        put(folder / "a.bin", bytes(512))
        return check(vmdkmade.descriptor(folder / "disk.vmdk", lines, create_type, **more)).findings

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ({"create_type": "monolithicSparse"}, "FLAT"),
            ({"create_type": "wonderful"}, "wonderful"),
            ({"more": ["what is this"]}, "what is this"),
            ({"more": ['ddb.longContentID = "0123456789abcdef0123456787654321"']}, "longContentID"),
            ({"more": ['ddb.adapterType = "punch cards"']}, "punch cards"),
        ],
        ids=str,
    )
    def test_warnings(self, tmp_path, words, message):
        (finding,) = self.findings(tmp_path, ['RW 1 FLAT "a.bin" 0'], **words)
        assert message in finding.message
        assert finding.severity == WARNING

    def test_a_parent_without_a_name(self, tmp_path):
        (finding,) = self.findings(tmp_path, ['RW 1 FLAT "a.bin" 0'], parent="11111111")
        assert finding.severity == ERROR

    def test_refusals_stay_refusals(self, tmp_path):
        with pytest.raises(UnsupportedError):
            self.findings(tmp_path, ['RW 1 VMFSRDM "a.bin"'])
        with pytest.raises(FormatError):
            check(put(tmp_path / "x.vmdk", b"nothing"))


class TestStream:
    def make(self, **more):
        text = vmdkmade.words(['RW 81920 SPARSE "x.vmdk"'], "streamOptimized")
        return Stream(81920, {0: data(0, GRAIN), 1: b"b", 2: b"c", 600: b"d"}, text=text, **more).build()

    def marker(self, raw, number):
        gd = struct.unpack_from("<Q", raw, len(raw) - 1024 + 56)[0] * 512
        table = struct.unpack_from("<I", raw, gd)[0] * 512
        return struct.unpack_from("<I", raw, table + 4 * number)[0] * 512

    @pytest.mark.parametrize("form", ["footer", "header"])
    def test_sound_ones(self, tmp_path, form):
        assert check(put(tmp_path / "x.vmdk", self.make(form=form))).findings == []

    def test_what_follows_the_end(self, tmp_path):
        for form in ("footer", "header"):
            raw = self.make(form=form)
            (finding,) = check(put(tmp_path / "x.vmdk", raw + bytes(1000))).findings
            assert (finding.severity, finding.offset) == (WARNING, len(raw))

    def test_markers(self, tmp_path):
        raw = self.make()
        at = self.marker(raw, 1)
        for piece, structure in (
            ((at, struct.pack("<Q", 5)), "grain marker"),
            ((at + 8, u32(0)), "grain marker"),
            ((at + 8, u32(1000)), "grain"),
        ):
            report = check(put(tmp_path / "x.vmdk", patched(raw, piece)))
            assert report.corruptions >= 1
            assert report.findings[0].structure == structure

    def test_content(self, tmp_path):
        raw = self.make()
        for at in (30, 12 + struct.unpack_from("<I", raw, self.marker(raw, 0) + 8)[0] - 1):
            spot = self.marker(raw, 0) + at
            report = check(put(tmp_path / "x.vmdk", patched(raw, (spot, bytes([raw[spot] ^ 1])))))
            assert report.corruptions == 1
            assert not report.clean

    def test_two_entries_for_one_grain(self, tmp_path):
        raw = self.make()
        gd = struct.unpack_from("<Q", raw, len(raw) - 1024 + 56)[0] * 512
        table = struct.unpack_from("<I", raw, gd)[0] * 512
        report = check(put(tmp_path / "x.vmdk", patched(raw, (table + 4, raw[table : table + 4]))))
        assert report.corruptions == 2

    def test_a_table_without_its_marker(self, tmp_path):
        raw = self.make()
        gd = struct.unpack_from("<Q", raw, len(raw) - 1024 + 56)[0] * 512
        table = struct.unpack_from("<I", raw, gd)[0] * 512
        report = check(put(tmp_path / "x.vmdk", patched(raw, (table - 512 + 12, u32(9)))))
        assert [finding.severity for finding in report.findings] == [WARNING]


class TestEsx:
    def test_sound_ones(self, tmp_path):
        cowd = vmdkmade.cowd(9000, {n: data(n, 512) for n in (0, 5, 4096, 8999)}, order=[3, 1, 0, 2])
        wide = vmdkmade.sesparse(8 * 5000, {0: data(0, 4096), 1: ZEROED, 2: "unmapped", 4999: b"x"})
        for raw in (cowd, wide):
            assert [finding.severity for finding in check(put(tmp_path / "x.vmdk", raw)).findings] == [WARNING]

    def test_wounds(self, tmp_path):
        cowd = vmdkmade.cowd(9000, {n: data(n, 512) for n in (0, 5)})
        table = struct.unpack_from("<I", cowd, 2048)[0] * 512
        report = check(put(tmp_path / "x.vmdk", patched(cowd, (table, cowd[table + 20 : table + 24]))))
        assert report.corruptions == 1
        wide = vmdkmade.sesparse(8 * 5000, {0: data(0, 4096)})
        table = struct.unpack_from("<Q", wide, 18 * 8)[0] * 512
        report = check(put(tmp_path / "x.vmdk", patched(wide, (table + 8, struct.pack("<Q", 7 << 60)))))
        assert report.corruptions == 1


def test_an_extent_of_a_split_disk_is_mended_by_itself(tmp_path):
    """`check --repair` of the descriptor says so, and mends nothing; that of the extent does."""
    (tmp_path / "a.raw").write_bytes(data("split", 3 * MIB))
    options = diskmorph.ConvertOptions(format_options={"subformat": "twoGbMaxExtentSparse"})
    diskmorph.convert(tmp_path / "a.raw", tmp_path / "a.vmdk", options=options)
    extent = tmp_path / "a-s001.vmdk"
    sound = extent.read_bytes()
    directory = int.from_bytes(sound[56:64], "little") * 512
    extent.write_bytes(sound[:directory] + b"\xff" * 4 + sound[directory + 4 :])
    told = diskmorph.check(tmp_path / "a.vmdk", repair="all")
    assert any("a-s001.vmdk" in finding["message"] and "--repair" in finding["message"] for finding in told.findings)
    assert diskmorph.check(extent, repair="all").clean
    assert extent.read_bytes() == sound
