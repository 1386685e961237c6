"""Reading VDI: permuted maps, every header version, differences, damage."""

from __future__ import annotations

import random
import struct
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from contract.cases.vdi import DISKS, FREE, ZERO, uid, vdi

from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE
from diskmorph.formats.extents import ZERO as ZERO_KIND
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import open_disk
from diskmorph.formats.vdi import schema

from testkit import KIB, MIB, TIB, DiskCase, content, data, little_disk, qemu_same, run

BLOCK = 64 * KIB


def patch(path: Path, offset: int, form: str, *values: int | bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, *values))


@pytest.mark.parametrize("case", DISKS, ids=lambda case: case.name)
def test_reads_whole_and_across_blocks(case: DiskCase, tmp_path: Path) -> None:
    disk, want = case.disk(tmp_path)
    assert content(checked(disk)) == want
    rng = random.Random(case.name)
    for _ in range(50):
        start = rng.randrange(len(want))
        length = rng.randrange(1, min(len(want) - start, 3 * MIB) + 1)
        assert disk.read(start, length) == want[start : start + length]


@pytest.mark.parametrize("options", [[], ["-o", "static=on"], ["-S", "0"]], ids=str)
def test_reads_what_qemu_writes(options: list[str], tmp_path: Path) -> None:
    disk = little_disk()
    (tmp_path / "disk.raw").write_bytes(content(disk))
    run("qemu-img", "convert", "-f", "raw", "-O", "vdi", *options, tmp_path / "disk.raw", tmp_path / "disk.vdi")
    assert content(checked(open_disk(tmp_path / "disk.vdi"))) == content(disk)


@pytest.mark.parametrize("size", [384, 400, 512])
def test_header_sizes(size: int, tmp_path: Path) -> None:
    blocks: list[bytes | str] = [FREE, data(size, BLOCK), ZERO]
    want = vdi(tmp_path / "d.vdi", 3 * BLOCK, blocks, block=BLOCK, header_size=size, map_offset=1024)
    assert content(open_disk(tmp_path / "d.vdi")) == want


def test_free_is_a_hole_and_zero_is_explicit(tmp_path: Path) -> None:
    vdi(tmp_path / "d.vdi", 4 * MIB, [FREE, ZERO, data(1, MIB), FREE], [2], data_offset=3 * MIB)
    rows = np.concatenate(list(open_disk(tmp_path / "d.vdi").extents()))
    assert rows["kind"].tolist() == [HOLE, ZERO_KIND, DATA, HOLE]
    assert rows["offset"].tolist() == [0, 0, 5 * MIB, 0]


@pytest.mark.parametrize("scattered", [0, 1024])
def test_a_static_image_has_the_holes_of_its_file(
    scattered: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("diskmorph.formats.vdi.reader._SCATTERED", scattered)
    path = tmp_path / "d.vdi"
    want = vdi(path, 5 * MIB, [data(1, MIB), bytes(MIB), ZERO, FREE, data(2, MIB)], [0, 1, 3], kind=2)
    with path.open("r+b") as file:
        head = file.read(2 * MIB)
        file.seek(4 * MIB)
        tail = file.read()
        file.truncate(0)
        for offset, piece in ((0, head), (4 * MIB, tail)):
            file.seek(offset)
            file.write(piece)
    disk = checked(open_disk(path))
    assert content(disk) == want
    rows = np.concatenate(list(disk.extents()))
    assert rows["kind"].tolist() == [DATA, HOLE if scattered else DATA, ZERO_KIND, HOLE, DATA][0 if scattered else 1 :]


def test_qemu_agrees_about_a_permuted_map(tmp_path: Path) -> None:
    blocks: list[bytes | str] = [data(1, MIB), FREE, data(2, MIB), ZERO, data(3, MIB)]
    want = vdi(tmp_path / "d.vdi", 5 * MIB, blocks, [1, 2, 0])
    (tmp_path / "d.raw").write_bytes(want)
    qemu_same(tmp_path / "d.raw", tmp_path / "d.vdi", "vdi")
    assert content(open_disk(tmp_path / "d.vdi")) == want


# --- differencing


def _family(folder: Path, **child: str | None) -> bytes:
    base = [data(f"base {i}", BLOCK) for i in range(4)]
    vdi(folder / "parent.vdi", 4 * BLOCK, base, [3, 1, 0, 2], block=BLOCK, create="P", modify="PM")
    over = data("over", BLOCK)
    said = {"create": "C", "modify": "CM", "linkage": "P", "parent_modify": "PM"} | child
    vdi(folder / "child.vdi", 4 * BLOCK, [FREE, ZERO, over, FREE], block=BLOCK, kind=4, **said)
    return base[0] + bytes(BLOCK) + over + base[3]


def _open_child(folder: Path) -> bytes:
    return content(checked(open_disk(folder / "child.vdi", parents=Parents(backing=folder / "parent.vdi"))))


def test_free_shows_the_parent_and_zero_does_not(tmp_path: Path) -> None:
    assert _family(tmp_path) == _open_child(tmp_path)


def test_a_parent_is_needed_and_found_by_its_uuids_where_allowed(tmp_path: Path) -> None:
    want = _family(tmp_path)
    with pytest.raises(FormatError, match="parent") as caught:
        open_disk(tmp_path / "child.vdi")
    assert "--backing" in str(caught.value)
    assert content(checked(open_disk(tmp_path / "child.vdi", parents=tmp_path))) == want


@pytest.mark.parametrize(
    ("field", "child"),
    [
        ("uuid", {"linkage": "stranger"}),
        ("uuid", {"linkage": None}),
        ("modify uuid", {"parent_modify": "changed since"}),
    ],
    ids=str,
)
def test_both_uuids_of_the_parent_must_match(field: str, child: dict[str, str | None], tmp_path: Path) -> None:
    _family(tmp_path, **child)
    with pytest.raises(FormatError, match="parent") as caught:
        _open_child(tmp_path)
    assert (caught.value.structure, caught.value.field) == ("parent", field)


def test_a_null_parent_modify_uuid_demands_nothing(tmp_path: Path) -> None:
    assert _family(tmp_path, parent_modify=None) == _open_child(tmp_path)


def test_uuids_are_told_in_their_usual_form(tmp_path: Path) -> None:
    _family(tmp_path)
    disk = open_disk(tmp_path / "parent.vdi")
    assert disk.identity["uuid"] == str(uuid.UUID(bytes_le=uid("P")))  # type: ignore[attr-defined]


# --- damage


@pytest.fixture
def image(tmp_path: Path) -> Path:
    vdi(tmp_path / "d.vdi", 4 * BLOCK, [data(i, BLOCK) for i in range(4)], [2, 0, 3, 1], block=BLOCK)
    return tmp_path / "d.vdi"


@pytest.mark.parametrize(
    ("offset", "form", "value", "field"),
    [
        (64, "<I", 0xBEDA1070, "signature"),
        (72, "<I", 300, "header_size"),
        (76, "<I", 9, "type"),
        (0x154, "<I", 100, "map_offset"),
        (0x158, "<I", 513, "data_offset"),
        (0x170, "<Q", 0, "disk_size"),
        (0x170, "<Q", 5 * BLOCK, "blocks"),
        (0x178, "<I", 0, "block_size"),
        (0x178, "<I", 3 * BLOCK, "block_size"),
        (0x178, "<I", 512, "block_size"),
        (0x17C, "<I", 0xFFFFFFFF, "block_extra"),
    ],
    ids=str,
)
def test_a_damaged_header_is_refused(image: Path, offset: int, form: str, value: int, field: str) -> None:
    patch(image, offset, form, value)
    with pytest.raises(FormatError) as caught:
        open_disk(image, format="vdi")
    assert (caught.value.structure, caught.value.field) == ("header", field)
    assert caught.value.file == str(image)


@pytest.mark.parametrize(
    ("offset", "value", "word"),
    [(76, 3, "undo"), (68, 0x20000, "version 2.0"), (80, 0x40, "flags 0x40")],
    ids=str,
)
def test_unknown_features_are_refused_by_name(image: Path, offset: int, value: int, word: str) -> None:
    patch(image, offset, "<I", value)
    with pytest.raises(UnsupportedError, match=word):
        open_disk(image, format="vdi")


@pytest.mark.parametrize("blocks", [1 << 20, 0xFFFFFFFF])
def test_a_map_larger_than_the_file_is_refused_at_once(image: Path, blocks: int) -> None:
    patch(image, 0x170, "<QIII", blocks * MIB, MIB, 0, blocks)
    start = time.process_time()
    with pytest.raises(FormatError) as caught:
        open_disk(image)
    assert caught.value.structure == "block map"
    assert caught.value.offset == 512
    assert time.process_time() - start < 1


@pytest.mark.parametrize("cut", [1, 100 * KIB])
def test_a_truncated_block_is_an_error_not_zeroes(image: Path, cut: int) -> None:
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - cut)
    disk = open_disk(image)
    with pytest.raises(FormatError, match="truncated") as caught:
        list(disk.extents())
    assert caught.value.structure == "block"
    assert caught.value.offset is not None
    with pytest.raises(FormatError):
        content(disk)


def test_a_file_may_end_with_the_last_byte_of_the_disk(tmp_path: Path) -> None:
    want = vdi(tmp_path / "d.vdi", BLOCK + 512, [data(1, BLOCK), data(2, BLOCK)], block=BLOCK)
    with (tmp_path / "d.vdi").open("r+b") as file:
        file.truncate(MIB + BLOCK + 512)
    assert content(open_disk(tmp_path / "d.vdi")) == want


@pytest.mark.parametrize("length", [0, 40, 71, 100, 400])
def test_a_cut_header_is_refused(image: Path, length: int) -> None:
    with image.open("r+b") as file:
        file.truncate(length)
    with pytest.raises(FormatError):
        open_disk(image, format="vdi")


def test_damage_anywhere_in_the_header_never_surprises(image: Path) -> None:
    whole = image.read_bytes()
    rng = random.Random("fuzz")
    for _ in range(150):
        damaged = bytearray(whole[:MIB])
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.choice((rng.randrange(64, 0x1C8), rng.randrange(512, 528)))] = rng.randrange(256)
        image.write_bytes(bytes(damaged) + whole[MIB:])
        try:
            disk = open_disk(image, format="vdi")
            for _ in disk.extents():
                pass
        except DiskmorphError:
            pass


def test_a_huge_sparse_disk_is_mapped_in_seconds(tmp_path: Path) -> None:
    blocks = 2 * TIB // MIB
    path = tmp_path / "huge.vdi"
    vdi(path, MIB, [data(1, MIB)], data_offset=16 * MIB)
    patch(path, 0x170, "<QIII", 2 * TIB, MIB, 0, blocks)
    with path.open("r+b") as file:
        file.seek(512)
        np.where(np.arange(blocks) == blocks - 1, 0, 0xFFFFFFFF).astype("<u4").tofile(file)
    disk = open_disk(path)
    start = time.process_time()
    rows = np.concatenate(list(disk.extents()))
    assert time.process_time() - start < 5
    assert rows["kind"].tolist() == [HOLE, DATA]
    assert disk.read(2 * TIB - 512, 512) == data(1, MIB)[-512:]


# --- schema


def test_the_map_dtype_is_the_construct() -> None:
    raw = data("map", 64)
    assert np.frombuffer(raw, schema.POINTER).tolist() == schema.MAP.parse(raw, blocks=16)


def test_header_sizes_are_those_of_the_structures() -> None:
    assert (schema.PREHEADER_SIZE, schema.HEADER0_SIZE) == (72, 348)
    built = schema.HEADER1.parse(bytes(400))
    assert len(schema.HEADER1.build(built)) == 384
    built.header_size, built.lchs_geometry = 400, built.geometry
    assert len(schema.HEADER1.build(built)) == 400
