"""Reading Apple disk images: every kind of chunk as other programs read it; damage names its place."""

from __future__ import annotations

import random
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from contract.cases import dmg as made
from contract.cases.dmg import ADC, BZIP2, IGNORE, LZFSE, NAMES, RAW, SECTOR, XZ, ZERO, ZLIB, Part, parts, udif

import diskmorph
from diskmorph.formats import dmg
from diskmorph.formats.check import CheckReport
from diskmorph.formats.codecs import decode
from diskmorph.formats.disk import Disk, checked
from diskmorph.formats.dmg import schema
from diskmorph.formats.dmg.check import crc_of_zeroes
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.extents import ADC as ADC_CODEC
from diskmorph.formats.extents import DATA, HOLE
from diskmorph.formats.extents import ZERO as ZERO_KIND
from diskmorph.formats.limits import Limits
from diskmorph.formats.registry import OpenContext, identify, open_disk
from diskmorph.formats.source import FileSource

from testkit import KIB, MIB, content, data, qemu_same, run


def check(path: Path) -> CheckReport:
    with FileSource(path) as source:
        return dmg.check_image(source, OpenContext(), "all")


def opened(path: Path, **words: object) -> Disk:
    return open_disk(path, format="dmg", **words)  # type: ignore[arg-type]


def refused(path: Path, kind: type[DiskmorphError] = FormatError) -> DiskmorphError:
    begun = time.monotonic()
    with pytest.raises(kind) as caught:
        content(opened(path))
    assert time.monotonic() - begun < 2
    assert caught.value.file == str(path)
    assert caught.value.offset is not None
    return caught.value


# --- agreement


@pytest.mark.parametrize("kind", NAMES, ids=NAMES.get)
def test_7z_reads_the_same(kind: int, tmp_path: Path) -> None:
    """Its test holds the tables', the data fork's and the master checksum against what the chunks hold."""
    what = parts(kind)
    if kind == LZFSE:  # what does not compress, hdiutil stores as it is; 7z does not take LZFSE's plain blocks
        what = [
            Part("disk", [(kind, made.text(1, 64 * KIB)), (RAW, data(1, SECTOR)), (kind, made.text(2, 9 * SECTOR))])
        ]
    want = udif(tmp_path / "d.dmg", what)
    run("7z", "t", tmp_path / "d.dmg")
    run("sh", "-c", f"7z e -so {tmp_path}/d.dmg > {tmp_path}/d.raw")
    assert (tmp_path / "d.raw").read_bytes() == want
    assert content(checked(opened(tmp_path / "d.dmg"))) == want
    assert not check(tmp_path / "d.dmg").findings


@pytest.mark.parametrize("fork", [False, True], ids=["list", "fork"])
@pytest.mark.parametrize("kind", [RAW, ADC, ZLIB, BZIP2], ids=NAMES.get)
def test_dmg2img_reads_the_same(kind: int, fork: bool, tmp_path: Path) -> None:
    want = udif(tmp_path / "d.dmg", parts(kind, 16 * KIB), fork=fork)
    run("dmg2img", "-s", tmp_path / "d.dmg", tmp_path / "d.raw")
    assert (tmp_path / "d.raw").read_bytes() == want == content(opened(tmp_path / "d.dmg"))


@pytest.mark.parametrize("how", ["plain", "front", "fork"])
@pytest.mark.parametrize("kind", [RAW, ZLIB], ids=NAMES.get)
def test_qemu_reads_the_same(kind: int, how: str, tmp_path: Path) -> None:
    """The bytes before the data fork show that chunks count from it."""
    want = udif(tmp_path / "d.dmg", parts(kind), fork=how == "fork", front=b"f" * 777 if how == "front" else b"")
    (tmp_path / "d.raw").write_bytes(want)
    qemu_same(tmp_path / "d.raw", tmp_path / "d.dmg", "dmg")
    assert content(opened(tmp_path / "d.dmg")) == want


def test_zeroes_holes_and_data_stay_apart(tmp_path: Path) -> None:
    udif(tmp_path / "d.dmg", [Part("a", [(RAW, data(1, SECTOR)), (ZERO, 3), (IGNORE, 4)])])
    rows = np.concatenate(list(opened(tmp_path / "d.dmg").extents()))
    assert rows["kind"].tolist() == [DATA, ZERO_KIND, HOLE]
    assert rows["length"].tolist() == [SECTOR, 3 * SECTOR, 4 * SECTOR]


def test_it_is_known_by_content(tmp_path: Path) -> None:
    for kind, tail in ((BZIP2, b""), (XZ, b""), (RAW, bytes(100)), (ZLIB, bytes(511))):
        udif(tmp_path / "d.iso", parts(kind), tail=tail)
        with FileSource(tmp_path / "d.iso") as source:
            entry, found = identify(source)
        assert entry.name == "dmg"
        assert found[0].offset == (tmp_path / "d.iso").stat().st_size - 512 - len(tail)
    (tmp_path / "d.dmg").write_bytes(bytes(4096))
    with pytest.raises(FormatError, match="no dmg structure"):
        open_disk(tmp_path / "d.dmg")


def test_info(tmp_path: Path) -> None:
    for kind, name in ((ADC, "UDCO"), (ZLIB, "UDZO"), (BZIP2, "UDBZ"), (LZFSE, "ULFO"), (XZ, "ULMO"), (RAW, "UDRO")):
        udif(tmp_path / "d.dmg", parts(kind, 16 * KIB))
        info = opened(tmp_path / "d.dmg").info  # type: ignore[attr-defined]
        assert (info.subformat, info.features["tables"][0], info.parent) == (name, "MBR", None)


def test_lzfse_without_its_library_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    udif(tmp_path / "d.dmg", parts(LZFSE))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    error = refused(tmp_path / "d.dmg", UnsupportedError)
    assert error.hint is not None
    assert "LZFSE" in str(error)
    assert "diskmorph[lzfse]" in error.hint


# --- damage


def _edit(number: int, field: int, value: int):
    """Change a field of the chunk that comes after the comment of table `number`."""

    def change(table: int, rows: list) -> None:
        if table == number:
            row = list(rows[2])
            row[field] = value
            rows[2] = tuple(row)

    return change


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        (2, 5, "chunk table 2"),  # begins inside another
        (3, 1 << 60, "chunk table 2"),
        (3, 10, "chunk table 2"),  # leaves a gap
        (4, 1 << 40, "chunk table"),
        (4, (1 << 64) - 1, "chunk table"),
        (5, 0, "chunk table"),
        (5, 1 << 32, "chunk table"),
        (5, 1 << 31, "chunk table"),
    ],
)
def test_a_damaged_chunk_is_refused(field: int, value: int, found: str, tmp_path: Path) -> None:
    udif(tmp_path / "d.dmg", parts(ZLIB), change=_edit(2, field, value))
    assert refused(tmp_path / "d.dmg").structure == found


def test_chunks_that_share_a_place_are_alike(tmp_path: Path) -> None:
    """Chunk 1 and 3 are the same bytes: that they lie at one place is only of note, their lengths must agree."""
    unit = made.text(1, 4 * KIB)

    def change(sectors: int):
        def edit(_number: int, rows: list) -> None:
            rows[4] = (*rows[4][:3], sectors, rows[2][4], rows[2][5])

        return edit

    table = [Part("a", [(RAW, data(1, SECTOR)), (ZLIB, unit), (RAW, data(2, SECTOR)), (ZLIB, unit)])]
    want = udif(tmp_path / "d.dmg", table, change=change(8))
    assert content(opened(tmp_path / "d.dmg")) == want
    assert not check(tmp_path / "d.dmg").clean
    udif(tmp_path / "d.dmg", table, change=change(7), sectors=1 + 8 + 1 + 7)
    assert "lies where another one does" in str(refused(tmp_path / "d.dmg"))


def test_chunks_of_an_unknown_kind_are_refused_by_name(tmp_path: Path) -> None:
    udif(tmp_path / "d.dmg", parts(ZLIB), change=_edit(2, 0, 0x80000009))
    assert "0x80000009" in str(refused(tmp_path / "d.dmg", UnsupportedError))


def test_a_plain_chunk_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    udif(tmp_path / "d.dmg", parts(RAW), change=_edit(2, 5, 512))
    assert refused(tmp_path / "d.dmg").field == "stored"


@pytest.mark.parametrize(
    ("at", "value", "structure", "field"),
    [
        (32, 1 << 50, "trailer", "data_offset"),
        (216, 1 << 60, "trailer", "xml_offset"),
        (224, 1 << 62, "trailer", "xml_offset"),
        (224, 100, "property list", "resource-fork.blkx"),
        (492, 1 << 63, "trailer", "sectors"),
        (492, 3, "chunk table 3", "sectors"),
        (492, 1 << 40, "chunk table 3", "sectors"),
        (24, 1 << 63, "trailer", "data_offset"),
    ],
)
def test_a_damaged_trailer_is_refused(at: int, value: int, structure: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "d.dmg"
    udif(path, parts(ZLIB))
    blob = bytearray(path.read_bytes())
    struct.pack_into(">Q", blob, len(blob) - 512 + at, value)
    path.write_bytes(blob)
    error = refused(path)
    assert (error.structure, error.field) == (structure, field)


@pytest.mark.parametrize("words", [{"segments": 3}, {"version": 5}])
def test_what_is_not_read_is_refused_by_name(words: dict, tmp_path: Path) -> None:
    udif(tmp_path / "d.dmg", parts(ZLIB), **words)
    assert refused(tmp_path / "d.dmg", UnsupportedError).structure == "trailer"


def test_an_encrypted_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "d.img").write_bytes(b"encrcdsa" + bytes(9000))
    with pytest.raises(UnsupportedError, match="encrypted"):
        open_disk(tmp_path / "d.img")


ENTITIES = b'<!DOCTYPE plist [<!ENTITY a "aaaaaaaaaa">' + b"".join(
    b'<!ENTITY %c "%s">' % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(12)
)


@pytest.mark.parametrize(
    "xml",
    [
        lambda x: x.replace(b"<!DOCTYPE plist", ENTITIES + b"]><!--", 1).replace(b'dtd">', b"-->", 1),
        lambda x: x.replace(
            b"<!DOCTYPE plist PUBLIC", b'<!DOCTYPE plist [<!ENTITY z SYSTEM "file:///etc/passwd">]><x', 1
        ),
        lambda x: x[: len(x) // 2],
        lambda x: x.replace(b"blkx", b"blkz"),
        lambda x: x.replace(b"<data>", b"<string>").replace(b"</data>", b"</string>"),
        lambda x: x.replace(b"bWlza", b"AAAAA"),
        lambda x: b"<plist><dict>" * 100_000,
        lambda x: b"\xff\xfe" + x,
        lambda x: x.replace(b"<dict>", b"<array>", 1).replace(b"</dict>\n</plist>", b"</array>\n</plist>"),
        lambda x: b"<plist><date>never</date></plist>",
        lambda x: x.replace(b"<array>", b"<array>" + b"<true/>" * 200_000, 1),
        lambda x: x.replace(
            b"<array>", b"<array>" + b"<true " + b" ".join(b"a%d='>'" % i for i in range(200_000)) + b"/>"
        ),
        lambda x: x.replace(b"UTF-8", b"cp037"),
        lambda x: x.decode().encode("utf-16"),
    ],
)
def test_a_damaged_property_list_is_refused(xml, tmp_path: Path) -> None:
    udif(tmp_path / "d.dmg", parts(ZLIB), xml=xml)
    assert refused(tmp_path / "d.dmg").structure in {"property list", "chunk table 0"}


def test_lists_too_large_are_refused(tmp_path: Path) -> None:
    udif(tmp_path / "d.dmg", parts(ZLIB), xml=lambda x: x + b" " * (17 * MIB))
    assert refused(tmp_path / "d.dmg").structure == "property list"
    udif(tmp_path / "d.dmg", [Part("a", [(IGNORE, 1)])] * 5000)
    assert refused(tmp_path / "d.dmg").expected == "at most 4096"


def test_a_chunk_that_decodes_to_too_much_is_refused(tmp_path: Path) -> None:
    """The first by what its table says, the second as soon as it passes what its table says."""
    udif(tmp_path / "d.dmg", [Part("a", [(ZLIB, bytes(5 * MIB))])])
    assert "too large" in str(refused(tmp_path / "d.dmg"))
    with opened(tmp_path / "d.dmg", limits=Limits(decoded_unit=8 * MIB)) as disk:
        assert content(disk) == bytes(5 * MIB)
    udif(
        tmp_path / "d.dmg",
        [Part("a", [(IGNORE, 1), (ZLIB, bytes(4 * MIB))])],
        change=lambda _n, rows: rows.__setitem__(2, (*rows[2][:3], 1, *rows[2][4:])),
        sectors=2,
    )
    assert refused(tmp_path / "d.dmg").structure == "compressed data"


@pytest.mark.parametrize("kind", [ADC, ZLIB, BZIP2, LZFSE, XZ], ids=NAMES.get)
def test_damaged_data_is_refused_and_found(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "d.dmg"
    udif(path, parts(kind, 16 * KIB))
    disk = opened(path)
    rows = np.concatenate(list(disk.extents()))
    row = rows[rows["codec"] != 0][1]
    blob = bytearray(path.read_bytes())
    at = int(row["offset"])
    blob[at : at + 16] = bytes(byte ^ 0x55 for byte in blob[at : at + 16])
    path.write_bytes(blob)
    report = check(path)
    assert "data fork" in {finding.structure for finding in report.findings}
    if kind != ADC:  # which has no checksum, and nearly every byte means something
        error = refused(path)
        assert (error.structure, error.offset) == ("compressed data", at)
        assert at in {finding.offset for finding in report.findings}


def test_damaged_plain_data_is_found_by_its_checksums(tmp_path: Path) -> None:
    path = tmp_path / "d.dmg"
    udif(path, parts(RAW))
    blob = bytearray(path.read_bytes())
    blob[5000] ^= 1
    path.write_bytes(blob)
    report = check(path)
    assert [finding.structure for finding in report.findings] == ["chunk table 2", "data fork"]
    assert report.corruptions == 2
    udif(path, parts(RAW), sums=False)
    assert not check(path).findings


def test_two_chunks_at_one_place_are_found(tmp_path: Path) -> None:
    path = tmp_path / "d.dmg"

    def change(number: int, rows: list) -> None:
        if number == 2:
            rows[5] = (*rows[5][:4], *rows[4][4:5], rows[5][5])

    udif(path, [*parts(RAW)[:2], Part("x", [(RAW, data(i, SECTOR)) for i in range(6)])], change=change)
    assert "one place" in " ".join(finding.message for finding in check(path).findings)


@pytest.mark.parametrize("codec", [ADC_CODEC])
def test_adc_streams(codec: int) -> None:
    assert decode(codec, b"\x82abc\x08\x02\x40\x00\x05\x80z", 3 + 5 + 4 + 1) == b"abc" + b"abcab" + b"cabc" + b"z"
    assert decode(codec, b"\x80a" + b"\x7f\x00\x00", 68) == b"a" * 68
    for stream, length in ((b"\x83abc", 4), (b"\x00\x00", 3), (b"\x80a\x40\x00", 5), (b"\x80a\x00", 4), (b"", 1)):
        with pytest.raises(FormatError):
            decode(codec, stream, length)
    rng = random.Random(5)
    for _ in range(300):
        unit = b"".join(rng.randbytes(rng.randrange(1, 9)) * rng.randrange(1, 90) for _ in range(20))
        assert decode(codec, made.adc(unit), len(unit)) == unit


def test_checksums_of_zeroes_take_no_time() -> None:
    for count in (0, 1, 511, 123_456):
        assert crc_of_zeroes(zlib.crc32(b"abc"), count) == zlib.crc32(bytes(count), zlib.crc32(b"abc"))
    assert crc_of_zeroes(0, 1 << 62) == crc_of_zeroes(crc_of_zeroes(0, 1 << 61), 1 << 61)


def test_a_huge_disk_of_zeroes_costs_nothing(tmp_path: Path) -> None:
    def change(_number: int, rows: list) -> None:
        rows[0] = (*rows[0][:3], 1 << 42, *rows[0][4:])

    path = tmp_path / "d.dmg"
    udif(path, [Part("a", [(ZERO, 1)])], change=change)
    blob = bytearray(path.read_bytes())
    whole = (1 << 42).to_bytes(8, "big")
    import base64

    start, stop = blob.index(b"<data>") + 6, blob.index(b"</data>")
    table = bytearray(base64.b64decode(bytes(blob[start:stop])))
    table[16:24] = whole
    text = base64.b64encode(bytes(table)).ljust(stop - start)
    blob[start:stop] = text
    blob[-20:-12] = whole
    path.write_bytes(blob)
    begun = time.monotonic()
    disk = opened(path)
    assert disk.size == 1 << 51
    assert len(np.concatenate(list(disk.extents()))) == 1
    assert [finding.structure for finding in check(path).findings] == ["chunk table 0"], "its sum is one sector's"
    assert time.monotonic() - begun < 2


def test_cuts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.dmg"
    udif(path, parts(ZLIB, 16 * KIB))
    blob = path.read_bytes()
    for cut in (0, 1, 511, 512, 600, len(blob) // 2, len(blob) - 512, len(blob) - 1):
        path.write_bytes(blob[:cut])
        assert refused(path).structure == "trailer"


def test_damage_anywhere_never_surprises(tmp_path: Path) -> None:
    path = tmp_path / "d.dmg"
    udif(path, parts(ZLIB, 4 * KIB), fork=True)
    whole = path.read_bytes()
    rng = random.Random("fuzz")
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(whole) - 2200, len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            for _ in opened(path).extents():
                pass
        except DiskmorphError:
            pass


def test_declarations() -> None:
    assert (schema.TRAILER_SIZE, schema.TABLE_SIZE, schema.CHUNK.itemsize) == (512, 204, 40)
    raw = data("chunk", 40)
    row, parsed = np.frombuffer(raw, schema.CHUNK)[0], schema.CHUNK_STRUCT.parse(raw)
    assert [int(row[name]) for name in schema.CHUNK.names or ()] == [parsed[name] for name in schema.CHUNK.names or ()]


def test_a_chunk_is_decoded_once_in_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks lie across the windows of a conversion, and across the targets' units."""
    from diskmorph.formats.dmg import reader

    units = [made.text(n, 256 * KIB) for n in range(40)]
    want = udif(tmp_path / "d.dmg", [Part("a", [(IGNORE, 40)]), Part("b", [(ZLIB, unit) for unit in units])])
    calls = []
    kept = reader.decode
    monkeypatch.setattr(reader, "decode", lambda *words: calls.append(words[2]) or kept(*words))
    diskmorph.convert(tmp_path / "d.dmg", tmp_path / "d.raw")
    assert (tmp_path / "d.raw").read_bytes() == want
    assert len(calls) == len(units)
