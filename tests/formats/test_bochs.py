"""Reading Bochs growing images: as bximage writes and qemu-img reads them; damage names its place."""

from __future__ import annotations

import contextlib
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from contract.cases.bochs import DISKS, growing, sectors

from diskmorph.formats import bochs
from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE
from diskmorph.formats.registry import OpenContext, identify, open_disk
from diskmorph.formats.source import FileSource

from testkit import GIB, KIB, MIB, TIB, DiskCase, content, data, little_disk, qemu_same, run

EXTENT = 8 * KIB


def check(path: Path) -> CheckReport:
    with FileSource(path) as source:
        return bochs.check_image(source, OpenContext(), "all")


def refused(path: Path, kind: type[DiskmorphError] = FormatError) -> DiskmorphError:
    begun = time.process_time()
    with pytest.raises(kind) as caught:
        content(open_disk(path, format="bochs"))
    assert time.process_time() - begun < 2
    assert caught.value.file == str(path)
    assert caught.value.offset is not None
    return caught.value


@pytest.mark.parametrize("case", DISKS, ids=lambda case: case.name)
def test_qemu_and_the_check_agree(case: DiskCase, tmp_path: Path) -> None:
    path, want = case.make(tmp_path)
    with FileSource(path) as source:
        assert identify(source)[0].name == "bochs"
    assert content(checked(open_disk(path))) == want
    (tmp_path / "want.raw").write_bytes(want)
    qemu_same(tmp_path / "want.raw", path, "bochs")
    assert not check(path).findings


def test_bximage_reads_back_what_it_wrote_and_so_do_we(tmp_path: Path) -> None:
    raw = tmp_path / "d.raw"
    raw.write_bytes(content(little_disk(3 * 16 * 63 * 512)))
    run("bximage", "-q", "-func=convert", "-imgmode=growing", raw, tmp_path / "d.img")
    run("bximage", "-q", "-func=convert", "-imgmode=flat", tmp_path / "d.img", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == raw.read_bytes() == content(open_disk(tmp_path / "d.img"))


def test_an_empty_image_is_a_hole(tmp_path: Path) -> None:
    run("bximage", "-q", "-func=create", "-hd=2G", "-imgmode=growing", tmp_path / "d.img")
    disk = open_disk(tmp_path / "d.img")
    rows = np.concatenate(list(disk.extents()))
    assert (rows["kind"].tolist(), rows["length"].tolist()) == ([HOLE], [disk.size])
    assert GIB < disk.size <= 2 * GIB


def test_a_bitmap_decides_sector_by_sector(tmp_path: Path) -> None:
    growing(tmp_path / "d.img", 2 * EXTENT, {1: [None, data(1, 512), data(2, 512), *[None] * 13]})
    rows = np.concatenate(list(open_disk(tmp_path / "d.img").extents()))
    assert rows["kind"].tolist() == [HOLE, DATA, HOLE]
    assert rows["length"].tolist() == [EXTENT + 512, 1024, 13 * 512]


@pytest.mark.parametrize("subtype", [b"Undoable", b"Volatile"])
def test_differences_are_refused_by_name(subtype: bytes, tmp_path: Path) -> None:
    growing(tmp_path / "d.img", EXTENT, {}, subtype=subtype)
    assert subtype.decode() in str(refused(tmp_path / "d.img", UnsupportedError))


def test_versions_and_kinds_not_known_are_refused_by_name(tmp_path: Path) -> None:
    growing(tmp_path / "d.img", EXTENT, {}, version=3)
    assert "0x30000" in str(refused(tmp_path / "d.img", UnsupportedError))
    growing(tmp_path / "d.img", EXTENT, {}, kind=b"Compressed")
    assert "Compressed" in str(refused(tmp_path / "d.img", UnsupportedError))


@pytest.mark.parametrize(
    ("at", "form", "value", "field"),
    [
        (68, "<I", 0, "size"),
        (68, "<I", 1 << 31, "size"),
        (72, "<I", 1, "disk"),
        (72, "<I", 0xFFFF_FFFF, "entries"),
        (76, "<I", 1, "bitmap"),
        (76, "<I", 1 << 31, "bitmap"),
        (80, "<I", 0, "extent"),
        (80, "<I", 12288, "extent"),
        (80, "<I", 1 << 24, "extent"),
        (88, "<Q", 1 << 62, "disk"),
        (88, "<Q", 1000, "disk"),
    ],
)
def test_a_damaged_header_is_refused(at: int, form: str, value: int, field: str, tmp_path: Path) -> None:
    path = tmp_path / "d.img"
    growing(path, 4 * EXTENT, {0: sectors(0, 16), 2: sectors(2, 16)})
    blob = bytearray(path.read_bytes())
    struct.pack_into(form, blob, at, value)
    path.write_bytes(blob)
    error = refused(path)
    assert (error.structure, error.field) == ("catalog" if field == "entries" else "header", field)


@pytest.mark.parametrize("place", [2, 5000, 0xFFFF_FFFE])
def test_extents_beyond_the_end_are_refused(place: int, tmp_path: Path) -> None:
    path = tmp_path / "d.img"
    growing(path, 4 * EXTENT, {0: sectors(0, 16), 2: sectors(2, 16)})
    blob = bytearray(path.read_bytes())
    struct.pack_into("<I", blob, 512 + 8, place)
    path.write_bytes(blob)
    error = refused(path)
    assert (error.structure, error.field, error.offset) == ("catalog", "entry 2", 520)
    assert [finding.offset for finding in check(path).findings if finding.severity != WARNING] == [520]


def test_cuts_are_refused_where_data_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "d.img"
    growing(path, 2 * EXTENT, {0: sectors(0, 16), 1: [data((1, i), 512) for i in range(16)]})
    blob = path.read_bytes()
    for cut in (0, 100, 511, 512, 520, 1000, len(blob) // 2, len(blob) - 513, len(blob) - 1):
        path.write_bytes(blob[:cut])
        assert refused(path).structure in {"file", "header", "catalog"}
        if cut > 600:
            assert check(path).corruptions


def test_what_the_check_finds(tmp_path: Path) -> None:
    path = tmp_path / "d.img"
    growing(path, 3 * EXTENT, {0: sectors(0, 16), 1: sectors(1, 16), 4: sectors(4, 16)}, (0, 1, 2))
    assert [f.severity for f in check(path).findings] == [WARNING], "an extent behind the disk's end"
    blob = bytearray(path.read_bytes())
    struct.pack_into("<I", blob, 516, 0)
    path.write_bytes(blob)
    messages = " ".join(finding.message for finding in check(path).findings)
    assert "where another one does" in messages
    assert "1 extents of the file belong to no place" in messages


def test_a_huge_disk_is_mapped_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "d.img"
    unit = 8 * MIB
    count = unit // 512
    last = [data("last", 512), *[None] * (count - 1)]
    growing(path, 2 * TIB, {2 * TIB // unit - 1: last}, extent=unit)
    begun = time.process_time()
    rows = np.concatenate(list(open_disk(path).extents()))
    assert time.process_time() - begun < 2
    assert rows["kind"].tolist() == [HOLE, DATA, HOLE]


def test_damage_anywhere_never_surprises(tmp_path: Path) -> None:
    path = tmp_path / "d.img"
    growing(path, 4 * EXTENT, {number: sectors(number, 16) for number in (3, 1, 0)})
    whole = path.read_bytes()
    rng = random.Random("fuzz")
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.choice((rng.randrange(32, 96), rng.randrange(512, 560)))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(DiskmorphError):
            for _ in open_disk(path, format="bochs").extents():
                pass


def test_declarations() -> None:
    assert bochs.HEADER.sizeof() == 84
    raw = data("entry", 4)
    assert int(np.frombuffer(raw, bochs.ENTRY)[0]) == bochs.ENTRY_STRUCT.parse(raw)
