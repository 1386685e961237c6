"""Reading VHD: sizes by creator, footers and their copies, sector bitmaps, damage."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from contract.cases.vhd import DISKS, LARGE, dynamic, fixed, footer, header, sealed

from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE
from diskmorph.formats.registry import open_disk
from diskmorph.formats.vhd import schema

from testkit import GIB, KIB, MIB, DiskCase, content, data, little_disk, qemu_same, run

BLOCK = 512 * KIB


@pytest.mark.parametrize("case", DISKS, ids=lambda case: case.name)
def test_reads_whole_and_across_blocks(case: DiskCase, tmp_path: Path) -> None:
    disk, want = case.disk(tmp_path)
    assert content(checked(disk)) == want
    rng = random.Random(case.name)
    for _ in range(50):
        start = rng.randrange(len(want))
        length = rng.randrange(1, min(len(want) - start, 3 * MIB) + 1)
        assert disk.read(start, length) == want[start : start + length]


@pytest.mark.parametrize("options", ["subformat=dynamic", "subformat=fixed"])
@pytest.mark.parametrize("forced", ["on", "off"])
def test_reads_what_qemu_writes(options: str, forced: str, tmp_path: Path) -> None:
    disk = little_disk()
    (tmp_path / "d.raw").write_bytes(content(disk))
    options = f"{options},force_size={forced}"
    run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, tmp_path / "d.raw", tmp_path / "d.vhd")
    back = open_disk(tmp_path / "d.vhd")
    assert content(checked(back)).rstrip(b"\0") == content(disk).rstrip(b"\0")
    assert (back.size == disk.size) == (forced == "on"), "qemu grows the disk to whole cylinders"
    qemu_same(tmp_path / "d.raw", tmp_path / "d.vhd", "vpc")


@pytest.mark.parametrize(
    ("creator", "chs", "want"),
    [
        (b"vpc ", (20, 4, 17), 696320),
        (b"qemu", (20, 4, 17), 696320),
        (b"qemu", LARGE, 4 * MIB),
        (b"vpc ", LARGE, 4 * MIB),
        (b"vpc ", (0, 4, 17), 4 * MIB),
        (b"win ", (20, 4, 17), 4 * MIB),
        (b"d2v ", (20, 4, 17), 4 * MIB),
        (b"qem2", (20, 4, 17), 4 * MIB),
        (b"tap\0", (20, 4, 17), 4 * MIB),
        (b"vbox", (20, 4, 17), 4 * MIB),
        (b"what", (20, 4, 17), 4 * MIB),
    ],
    ids=str,
)
def test_the_size_depends_on_the_creator(creator: bytes, chs: tuple[int, int, int], want: int, tmp_path: Path) -> None:
    whole = dynamic(tmp_path / "d.vhd", 4 * MIB, {0: (None, data(1, 2 * MIB))}, creator=creator, chs=chs)
    assert content(open_disk(tmp_path / "d.vhd")) == whole[:want]
    whole = fixed(tmp_path / "f.vhd", data(2, 4 * MIB), creator=creator, chs=chs)
    assert content(open_disk(tmp_path / "f.vhd")) == whole[:want]


# --- footers


@pytest.fixture
def image(tmp_path: Path) -> Path:
    blocks = {0: (None, data(0, BLOCK)), 2: ((3, 4, 5), data(2, BLOCK))}
    dynamic(tmp_path / "d.vhd", 4 * BLOCK, blocks, block=BLOCK)
    return tmp_path / "d.vhd"


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda raw: bytes(100) + raw[100:], "at the start is missing"),
        (lambda raw: raw[:90] + b"\xaa" + raw[91:], "at the start has a wrong checksum"),
        (lambda raw: raw[:-512] + bytes(512), "at the end is missing"),
        (lambda raw: raw[:-422] + b"\xaa" + raw[-421:], "at the end has a wrong checksum"),
        (lambda raw: raw[:-512], "at the end is missing"),
    ],
    ids=["no first", "bad first", "no last", "bad last", "cut"],
)
def test_one_footer_of_two_is_enough(image: Path, damage: object, word: str) -> None:
    raw = image.read_bytes()
    want = content(open_disk(image))
    image.write_bytes(damage(raw))  # type: ignore[operator]
    disk = open_disk(image)
    assert content(disk) == want
    assert word in disk.info.warnings[0]  # type: ignore[attr-defined]


def test_the_footer_at_the_end_counts(image: Path) -> None:
    raw = bytearray(image.read_bytes())
    raw[:512] = footer(3 * BLOCK, 3)
    image.write_bytes(raw)
    disk = open_disk(image)
    assert disk.size == 4 * BLOCK
    assert "differs" in disk.info.warnings[0]  # type: ignore[attr-defined]


def test_a_lone_footer_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    fixed(tmp_path / "d.vhd", data(1, MIB))
    raw = bytearray((tmp_path / "d.vhd").read_bytes())
    raw[-462] ^= 1
    (tmp_path / "d.vhd").write_bytes(raw)
    with pytest.raises(FormatError, match="checksum") as caught:
        open_disk(tmp_path / "d.vhd")
    assert (caught.value.structure, caught.value.field, caught.value.offset) == ("footer", "checksum", MIB + 64)


def test_two_damaged_footers_are_refused(image: Path) -> None:
    raw = image.read_bytes()
    image.write_bytes(raw[:50] + b"\1" + raw[51:-422] + b"\1" + raw[-421:])
    with pytest.raises(FormatError, match="checksum"):
        open_disk(image)


def test_no_footer_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.vhd").write_bytes(data(1, MIB))
    with pytest.raises(FormatError, match="footer") as caught:
        open_disk(tmp_path / "d.vhd", format="vhd")
    assert caught.value.structure == "footer"


def test_a_guest_that_begins_like_a_vhd_stays_a_fixed_disk(image: Path, tmp_path: Path) -> None:
    inner = image.read_bytes()
    fixed(tmp_path / "f.vhd", inner)
    assert content(open_disk(tmp_path / "f.vhd")) == inner
    (tmp_path / "f.vhd").write_bytes(footer(MIB, 2) + data(1, MIB))
    with pytest.raises(FormatError, match="footer"):
        open_disk(tmp_path / "f.vhd")


def test_a_cut_fixed_disk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.vhd").write_bytes(data(1, MIB) + footer(2 * MIB, 2))
    with pytest.raises(FormatError, match="truncated") as caught:
        open_disk(tmp_path / "d.vhd")
    assert caught.value.field == "current_size"


def test_a_saved_state_is_told(tmp_path: Path) -> None:
    fixed(tmp_path / "d.vhd", data(1, MIB), saved=1)
    assert "saved state" in open_disk(tmp_path / "d.vhd").info.warnings[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "version", "error"), [(2, 0x20000, UnsupportedError), (7, 0x10000, FormatError)])
def test_unknown_versions_and_types(kind: int, version: int, error: type[DiskmorphError], tmp_path: Path) -> None:
    (tmp_path / "d.vhd").write_bytes(data(1, MIB) + footer(MIB, kind, version=version))
    with pytest.raises(error):
        open_disk(tmp_path / "d.vhd")


# --- bitmaps


def test_what_was_never_written_is_a_hole(image: Path) -> None:
    rows = np.concatenate(list(open_disk(image).extents()))
    assert rows["kind"].tolist() == [DATA, HOLE, DATA, HOLE]
    assert rows["start"].tolist() == [0, BLOCK, 2 * BLOCK + 3 * 512, 2 * BLOCK + 6 * 512]


def test_seven_zip_agrees(tmp_path: Path) -> None:
    import subprocess

    for case in DISKS[:1]:
        path, want = case.make(tmp_path)
        assert subprocess.run(["7z", "e", "-so", path], capture_output=True, check=True).stdout == want


# --- damage


def _header(image: Path, at: int, form: str, value: int) -> None:
    raw = bytearray(image.read_bytes())
    struct.pack_into(form, raw, 512 + at, value)
    raw[512:1536] = sealed(bytes(raw[512:1536]), 36)
    image.write_bytes(raw)


@pytest.mark.parametrize(
    ("at", "form", "value", "structure", "field"),
    [
        (0, ">Q", 0, "dynamic header", "cookie"),
        (16, ">Q", 1 << 60, "block table", None),
        (28, ">I", 1, "dynamic header", "max_table_entries"),
        (28, ">I", 0xFFFFFFFF, "block table", None),
        (32, ">I", 0, "dynamic header", "block_size"),
        (32, ">I", 3 << 20, "dynamic header", "block_size"),
        (32, ">I", 512, "dynamic header", "block_size"),
    ],
    ids=str,
)
def test_a_damaged_header_is_refused(
    image: Path, at: int, form: str, value: int, structure: str, field: str | None
) -> None:
    _header(image, at, form, value)
    start = time.process_time()
    with pytest.raises(FormatError) as caught:
        open_disk(image)
    assert (caught.value.structure, caught.value.field) == (structure, field)
    assert time.process_time() - start < 1


def test_an_unknown_header_version_is_refused_by_name(image: Path) -> None:
    _header(image, 24, ">I", 0x20000)
    with pytest.raises(UnsupportedError, match="0x20000"):
        open_disk(image)


def test_a_wrong_header_checksum_is_refused(image: Path) -> None:
    raw = bytearray(image.read_bytes())
    raw[512 + 900] ^= 1
    image.write_bytes(raw)
    with pytest.raises(FormatError, match="checksum") as caught:
        open_disk(image)
    assert (caught.value.structure, caught.value.offset) == ("dynamic header", 512 + 36)


def test_a_header_beyond_the_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.vhd").write_bytes(footer(MIB, 3, header_at=1 << 62))
    with pytest.raises(FormatError) as caught:
        open_disk(tmp_path / "d.vhd")
    assert caught.value.field == "data_offset"


@pytest.mark.parametrize("entry", [0, 1, 3, 0xFFFFFFFE, 100_000, 2060], ids=str)
def test_blocks_at_impossible_places_are_refused(image: Path, entry: int) -> None:
    raw = bytearray(image.read_bytes())
    struct.pack_into(">I", raw, 1536 + 8, entry)
    image.write_bytes(raw)
    disk = open_disk(image)
    assert disk.read(0, BLOCK) == data(0, BLOCK)
    for read in (lambda: list(disk.extents()), lambda: content(disk)):
        with pytest.raises(FormatError) as caught:
            read()
        assert (caught.value.structure, caught.value.field) == ("block table", "entry 2")
        assert caught.value.offset == 1536 + 8


def test_a_cut_dynamic_disk_is_refused_where_its_data_is_missing(image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - 100 * KIB)
    with pytest.raises(FormatError, match="truncated"):
        list(open_disk(image).extents())


def test_damage_anywhere_never_surprises(image: Path) -> None:
    whole = image.read_bytes()
    rng = random.Random("fuzz")
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.choice((rng.randrange(512, 1536), rng.randrange(1536, 1552), rng.randrange(2048, 2560)))] = (
                rng.randrange(256)
            )
        damaged[512:1536] = sealed(bytes(damaged[512:1536]), 36)
        image.write_bytes(damaged)
        try:
            for _ in open_disk(image, format="vhd").extents():
                pass
        except DiskmorphError:
            pass


def test_more_than_2040_gib_is_no_dynamic_disk(tmp_path: Path) -> None:
    dynamic(tmp_path / "d.vhd", 2 * MIB, {})
    raw = bytearray((tmp_path / "d.vhd").read_bytes())
    raw[:512] = raw[-512:] = footer(2040 * GIB + 512, 3)
    (tmp_path / "d.vhd").write_bytes(raw)
    with pytest.raises(FormatError, match="2040"):
        open_disk(tmp_path / "d.vhd")


def test_the_largest_sparse_disk_is_mapped_in_seconds(tmp_path: Path) -> None:
    entries, used = 1020 * 1024, 1_000_000
    table = np.full(entries, 0xFFFFFFFF, ">u4")
    table[used] = 10_000
    with (tmp_path / "d.vhd").open("wb") as file:
        file.write(footer(2040 * GIB, 3) + header(entries, 2 * MIB, 1536) + table.tobytes())
        file.seek(10_000 * 512)
        file.write(b"\x40" + bytes(511 + 2 * MIB) + footer(2040 * GIB, 3))
    disk = open_disk(tmp_path / "d.vhd")
    start = time.process_time()
    rows = np.concatenate(list(disk.extents()))
    assert time.process_time() - start < 5
    assert rows["kind"].tolist() == [HOLE, DATA, HOLE]
    assert rows["start"][1] == used * 2 * MIB + 512


def test_the_table_dtype_is_the_construct() -> None:
    raw = data("table", 64)
    assert np.frombuffer(raw, schema.ENTRY).tolist() == schema.TABLE.parse(raw, entries=16)


def test_structures_have_the_specified_sizes() -> None:
    assert (schema.FOOTER_SIZE, schema.HEADER_SIZE) == (512, 1024)


@pytest.mark.parametrize(
    ("sectors", "want"),
    [
        (1, (0, 4, 17)),
        (8388608, (8322, 16, 63)),
        (409600, (825, 16, 31)),
        (65535 * 16 * 63, (65535 * 63 // 255, 16, 255)),
        (1 << 40, LARGE),
    ],
)
def test_geometry_follows_the_specification(sectors: int, want: tuple[int, int, int]) -> None:
    found = schema.geometry(sectors * 512)
    assert found == want
    assert found[0] * found[1] * found[2] <= sectors
    assert max(found[0] - 65535, found[1] - 16, found[2] - 255) <= 0
