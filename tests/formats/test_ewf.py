"""Reading Expert Witness images: as ewfacquire writes them in each of its formats; damage names its place."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from contract.cases.ewf import DISKS, Made, disk, handmade, old_volume, sealed, section, volume

from diskmorph.formats import ewf
from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, FormatError, PolicyError, SourceError, UnsupportedError
from diskmorph.formats.ewf import schema
from diskmorph.formats.ewf.segments import segment_name
from diskmorph.formats.limits import Limits
from diskmorph.formats.registry import OpenContext, identify, open_disk
from diskmorph.formats.source import BytesSource, FileSource

from testkit import KIB, MIB, DiskCase, content, data, little_disk, run

SIZE = 40 * KIB + 512


def check(path: Path) -> CheckReport:
    with FileSource(path) as source:
        return ewf.check_image(source, OpenContext(), "all")


def refused(path: Path, kind: type[DiskmorphError] = FormatError) -> DiskmorphError:
    begun = time.process_time()
    with pytest.raises(kind) as caught:
        content(open_disk(path, format="ewf"))
    assert time.process_time() - begun < 2
    assert Path(caught.value.file or "").parent == path.parent
    assert caught.value.offset is not None
    return caught.value


def places(blob: bytes) -> dict[str, int]:
    """Where the first section of each kind begins."""
    found: dict[str, int] = {}
    at = 13
    while True:
        kind = blob[at : at + 16].rstrip(b"\0").decode()
        found.setdefault(kind, at)
        if kind in {"next", "done"}:
            return found
        at = struct.unpack_from("<Q", blob, at + 16)[0]


def reseal(blob: bytearray, start: int, length: int) -> None:
    blob[start + length : start + length + 4] = struct.pack("<I", zlib.adler32(blob[start : start + length]))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return Made(disk(SIZE)).write(tmp_path / "d.E01")


# --- agreement


@pytest.mark.parametrize("packing", ["none", "fast", "empty-block"])
@pytest.mark.parametrize("kind", ["ftk", "encase2", "encase5", "encase6", "encase7", "linen7", "ewfx"])
def test_reads_what_ewfacquirestream_writes(kind: str, packing: str, tmp_path: Path) -> None:
    want = content(little_disk(2 * MIB + 512, seed=3))
    (tmp_path / "raw").write_bytes(want)
    command = f"ewfacquirestream -q -t {tmp_path}/d -f {kind} -c {packing} -S 1048576 -d sha1 < {tmp_path}/raw"
    run("sh", "-c", command)
    path = tmp_path / ("d.e01" if kind == "ewfx" else "d.E01")
    with FileSource(path) as source:
        assert identify(source)[0].name == "ewf"
    image = open_disk(path)
    assert content(checked(image)) == want
    assert image.info.features["md5"] == hashlib.md5(want).hexdigest()  # type: ignore[attr-defined]
    assert not check(path).findings


@pytest.mark.parametrize(("kind", "name"), [("smart", "d.s01"), ("ewf", "d.e01")])
def test_reads_the_first_specification_and_smart(kind: str, name: str, tmp_path: Path) -> None:
    want = content(little_disk(3 * MIB, seed=4))
    (tmp_path / "raw").write_bytes(want)
    run("ewfacquire", "-q", "-u", "-f", kind, "-c", "none", "-S", "1048576", "-t", tmp_path / "d", tmp_path / "raw")
    image = open_disk(tmp_path / name)
    assert len(image.files) > 1
    assert content(checked(image)) == want
    assert not check(tmp_path / name).findings


@pytest.mark.parametrize("words", [{}, {"per_file": 7, "per_chunk": 16}, {"old": True, "per_chunk": 64}], ids=str)
def test_ewfexport_reads_what_is_made_by_hand(words: dict, tmp_path: Path) -> None:
    """Its reader takes chunks of 16 sectors and more."""
    words = {"per_chunk": 16, **words}
    path, want = handmade(**words)(tmp_path)
    run("ewfexport", "-q", "-u", "-f", "raw", "-t", tmp_path / "back", path)
    assert (tmp_path / "back.raw").read_bytes() == want == content(open_disk(path))
    run("ewfverify", "-q", path)


@pytest.mark.parametrize("case", DISKS, ids=lambda case: case.name)
def test_the_check_is_content(case: DiskCase, tmp_path: Path) -> None:
    assert not check(case.make(tmp_path)[0]).findings


def test_sectors_that_could_not_be_read_are_told(tmp_path: Path) -> None:
    body = sealed(struct.pack("<I512x", 2)) + sealed(struct.pack("<IIII", 3, 4, 20, 1))
    path = Made(disk(SIZE), extra=[(b"error2", body)]).write(tmp_path / "d.E01")
    assert "5 sectors could not be read" in open_disk(path).info.warnings[0]  # type: ignore[attr-defined]
    assert [finding.severity for finding in check(path).findings] == [WARNING]


def test_a_disk_without_bytes(tmp_path: Path) -> None:
    path = Made(b"").write(tmp_path / "d.E01")
    assert open_disk(path).size == 0
    assert not check(path).findings


# --- segment files


def test_names_of_segment_files() -> None:
    wanted = {1: "a.E01", 2: "a.E02", 99: "a.E99", 100: "a.EAA", 125: "a.EAZ", 126: "a.EBA", 775: "a.EZZ", 776: "a.FAA"}
    assert {number: segment_name("a.E01", number) for number in wanted} == wanted
    assert segment_name("x.y.s01", 100) == "x.y.saa"
    assert segment_name("a.E01", 100 + 22 * 676 - 1) == "a.ZZZ"
    for name, number in (("a.E01", 100 + 22 * 676), ("a.raw", 2), ("aE01", 2), ("a.101", 2)):
        with pytest.raises(UnsupportedError):
            segment_name(name, number)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    return Made(disk(SIZE), per_file=4).write(tmp_path / "d.E01")


def test_a_missing_segment_file_is_named(several: Path) -> None:
    (several.parent / "d.E03").unlink()
    with pytest.raises(SourceError, match="E03"):
        open_disk(several)


def test_segment_files_are_opened_beside_the_first_alone(several: Path, tmp_path: Path) -> None:
    """Links lead elsewhere: they take leave, like extents of VMDK."""
    away = tmp_path / "away"
    away.mkdir()
    (several.parent / "d.E02").rename(away / "d.E02")
    (several.parent / "d.E02").symlink_to(away / "d.E02")
    with pytest.raises(PolicyError) as caught:
        open_disk(several)
    assert caught.value.option == "--allow-parent"
    assert content(open_disk(several, parents=away)) == disk(SIZE)
    with pytest.raises(DiskmorphError):
        open_disk(BytesSource(several.read_bytes()), format="ewf")


def test_a_segment_file_of_another_place_is_refused(several: Path) -> None:
    folder = several.parent
    with pytest.raises(FormatError, match="not the first segment"):
        open_disk(folder / "d.E02", format="ewf")
    (folder / "d.E02").write_bytes((folder / "d.E03").read_bytes())
    error = refused(several)
    assert (error.field, error.expected, error.found) == ("number", 2, 3)


def test_a_segment_file_of_another_set_is_refused(several: Path) -> None:
    other = volume(11, SIZE // 512, 8, 512, set_id=b"another image...")
    blob = bytearray((several.parent / "d.E02").read_bytes())
    at = places(blob)["data"] + 76
    blob[at : at + len(other)] = other
    (several.parent / "d.E02").write_bytes(blob)
    assert refused(several).field == "set_id"


def test_a_loop_of_segment_files_ends(tmp_path: Path) -> None:
    path = Made(disk(64 * KIB), per_file=1).write(tmp_path / "d.E01")
    with pytest.raises(FormatError, match="too many segment"):
        open_disk(path, limits=Limits(members=10))


# --- damage


@pytest.mark.parametrize(
    ("head", "what"),
    [(b"LVF\x09\x0d\x0a\xff\0", "L01"), (b"EVF2\x0d\x0a\x81\0", "Ex01"), (b"ADCRYPT\0", "AD encryption")],
)
def test_relatives_are_refused_by_name(head: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "d.bin").write_bytes(head + bytes(5000))
    with pytest.raises(UnsupportedError, match=what):
        open_disk(tmp_path / "d.bin")


@pytest.mark.parametrize(
    ("sectors", "per_chunk", "sector", "field"),
    [
        (81, 8, 0, "sector"),
        (81, 8, 768, "sector"),
        (81, 8, 1 << 20, "sector"),
        (81, 0, 512, "chunk_sectors"),
        (81, 1 << 31, 512, "chunk_sectors"),
        (1 << 62, 8, 512, "sectors"),
        (200, 8, 512, "entries"),
        (1 << 40, 8, 512, "entries"),
    ],
)
def test_an_impossible_volume_is_refused(sectors: int, per_chunk: int, sector: int, field: str, tmp_path: Path) -> None:
    said = volume(11, sectors, per_chunk, sector)
    path = Made(disk(SIZE), volume=said).write(tmp_path / "d.E01")
    assert refused(path).field == field


def test_a_missing_or_second_volume_is_refused(tmp_path: Path) -> None:
    path = Made(disk(SIZE), no_volume=1).write(tmp_path / "d.E01")
    assert refused(path).structure == "section volume"
    path = Made(disk(SIZE), extra=[(b"volume", old_volume(1, 1, 1, 512))]).write(tmp_path / "d.E01")
    assert "another one" in str(refused(path))


@pytest.mark.parametrize("field", [(16, 0), (16, 1 << 60), (16, 13), (24, 99), (24, 1 << 63)])
@pytest.mark.parametrize("kind", ["header", "volume", "sectors", "table"])
def test_a_damaged_section_is_refused(kind: str, field: tuple[int, int], image: Path) -> None:
    """Where a section's size and its successor differ, each would lead to an image of its own."""
    blob = bytearray(image.read_bytes())
    at = places(blob)[kind]
    struct.pack_into("<Q", blob, at + field[0], field[1])
    image.write_bytes(blob)
    assert refused(image).field == "checksum"
    reseal(blob, at, 72)
    image.write_bytes(blob)
    error = refused(image)
    assert error.structure == f"section {kind}"
    assert error.field == {16: "next", 24: "size"}[field[0]] or field == (16, 13)


def test_a_damaged_table_is_replaced_by_its_copy_and_found(image: Path) -> None:
    blob = bytearray(image.read_bytes())
    at = places(blob)["table"] + 76 + 24
    blob[at + 1] ^= 0xFF
    image.write_bytes(blob)
    assert content(open_disk(image)) == disk(SIZE)
    report = check(image)
    assert [finding.structure for finding in report.findings] == ["section table"]
    at = places(blob)["table2"] + 76 + 24
    blob[at + 1] ^= 0xFF
    image.write_bytes(blob)
    assert refused(image).field == "checksum"
    assert not check(image).clean


@pytest.mark.parametrize("entry", [0, 1 << 31, 0x7FFF_FFFF, 0xFFFF_FFFF, 20])
def test_chunks_outside_of_their_section_are_refused(entry: int, tmp_path: Path) -> None:
    path = Made(disk(SIZE), mirror=False).write(tmp_path / "d.E01")
    blob = bytearray(path.read_bytes())
    at = places(blob)["table"] + 76 + 24
    struct.pack_into("<I", blob, at + 4, entry)
    reseal(blob, at, 20)
    path.write_bytes(blob)
    error = refused(path)
    assert error.structure == "section table"
    assert str(error.field).startswith("entry")


def test_a_table_with_too_many_entries_is_refused(image: Path) -> None:
    blob = bytearray(image.read_bytes())
    at = places(blob)["table"] + 76
    struct.pack_into("<I", blob, at, 0xFFFF_FFFF)
    reseal(blob, at, 20)
    image.write_bytes(blob)
    assert refused(image).field == "entries"


def test_two_tables_that_name_the_last_chunk_are_refused(tmp_path: Path) -> None:
    class Twice(Made):
        def _table(self, out, first, chunks):
            if first:
                return
            at = len(out) + 76
            out.extend(section(b"sectors", len(out), zlib.compress(self.chunks[-1])))
            for _ in range(2):
                body = sealed(struct.pack("<I20x", 1)[:20]) + sealed(struct.pack("<I", at | 1 << 31))
                out.extend(section(b"table", len(out), body))

    path = Twice(disk(4 * KIB + 512), per_table=1).write(tmp_path / "d.E01")
    assert "also another one" in str(refused(path))


def test_damaged_chunks_are_refused_and_found(image: Path) -> None:
    rows = np.concatenate(list(open_disk(image).extents()))
    packed, plain = rows[rows["codec"] != 0][1], rows[rows["codec"] == 0][0]
    blob = bytearray(image.read_bytes())
    blob[int(packed["offset"]) + 5] ^= 0x55
    image.write_bytes(blob)
    error = refused(image)
    assert (error.structure, error.offset) == ("compressed data", int(packed["offset"]))
    assert [finding.offset for finding in check(image).findings] == [int(packed["offset"])]
    blob[int(packed["offset"]) + 5] ^= 0x55
    blob[int(plain["offset"]) + 5] ^= 0x55
    image.write_bytes(blob)
    assert [finding.structure for finding in check(image).findings] == ["chunk", "section hash", "section hash"]


def test_wrong_hashes_are_found(tmp_path: Path) -> None:
    wrong = sealed(bytes(range(1, 17)) + bytes(16))
    path = Made(disk(SIZE)).write(tmp_path / "d.E01")
    blob = path.read_bytes()
    at = places(blob)["hash"]
    tail = section(b"hash", at, wrong)
    path.write_bytes(blob[:at] + tail + section(b"done", at + len(tail), b""))
    assert [finding.structure for finding in check(path).findings] == ["section hash"]


def test_sections_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diskmorph.formats.ewf import segments

    monkeypatch.setattr(segments, "_MOST_SECTIONS", 20)
    path = Made(disk(SIZE), extra=[(b"nothing", b"")] * 20).write(tmp_path / "d.E01")
    assert refused(path).found == "another one"


def test_cuts_are_refused(several: Path) -> None:
    for name in ("d.E01", "d.E03"):
        path = several.parent / name
        blob = path.read_bytes()
        for cut in (0, 12, 13, 50, 89, len(blob) // 2, len(blob) - 76, len(blob) - 1):
            path.write_bytes(blob[:cut])
            assert refused(several).structure
        path.write_bytes(blob)


def test_damage_anywhere_never_surprises(tmp_path: Path) -> None:
    path = Made(disk(9 * KIB), per_chunk=2, per_table=3).write(tmp_path / "d.E01")
    whole = path.read_bytes()
    rng = random.Random("fuzz")
    for _ in range(200):
        damaged = bytearray(whole)
        at = rng.choice(list(places(whole).values()))
        for _ in range(rng.randrange(1, 4)):
            damaged[min(at + rng.randrange(110), len(whole) - 1)] = rng.randrange(256)
        reseal(damaged, at, 72)
        path.write_bytes(damaged)
        with contextlib.suppress(DiskmorphError):
            content(open_disk(path, format="ewf"))


def test_declarations() -> None:
    assert (schema.FILE_HEADER_SIZE, schema.SECTION_SIZE, schema.VOLUME_SIZE, schema.OLD_VOLUME_SIZE) == (
        13,
        76,
        1052,
        94,
    )
    assert (schema.TABLE_SIZE, schema.HASH.sizeof(), schema.DIGEST.sizeof(), schema.ERRORS.sizeof()) == (
        24,
        36,
        80,
        520,
    )
    raw = data("entry", 8)
    assert int(np.frombuffer(raw, schema.ENTRY)[0]) == schema.ENTRY_STRUCT.parse(raw)
    row, parsed = np.frombuffer(raw, schema.ERROR)[0], schema.ERROR_STRUCT.parse(raw)
    assert (int(row["first"]), int(row["sectors"])) == (parsed.first, parsed.sectors)
