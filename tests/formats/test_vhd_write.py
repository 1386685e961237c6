"""Writing VHD: exact sizes, checksums, places; what QEMU, libvhdi and 7-Zip read."""

from __future__ import annotations

import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from contract.cases.vhd import sealed

from diskmorph.formats.allocator import RUN, Identity, NewImage, NewParent
from diskmorph.formats.disk import Disk, ImageDisk, checked
from diskmorph.formats.errors import DiskmorphError, OptionError, TargetError
from diskmorph.formats.extents import ABSENT, DATA, HOLE, ZERO
from diskmorph.formats.registry import OpenContext, open_disk, open_layer, require_format
from diskmorph.formats.source import FileSource
from diskmorph.formats.vhd import new_allocator

from testkit import GIB, KIB, MIB, content, data, drive, little_disk, pattern_disk, qemu_same, run, write_image

WAYS: list[dict[str, str]] = [
    {},
    {"subformat": "fixed"},
    {"block_size": "4K"},
    {"block_size": "512K", "force_size": "on"},
    {"block_size": "16M"},
]
SIZES = [512, 2 * MIB, 9 * MIB + 1536]


def _disk(size: int) -> Disk:
    return little_disk(size) if size > 2 * MIB else pattern_disk(size, [(size - 512, 512, data(1, 512))])


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_comes_back_and_peers_agree(options: dict[str, str], size: int, tmp_path: Path) -> None:
    disk = _disk(size)
    (path,) = write_image("vhd", disk, tmp_path / "d.vhd", options=options)
    assert content(checked(open_disk(path))) == content(disk)
    (tmp_path / "d.raw").write_bytes(content(disk))
    qemu_same(tmp_path / "d.raw", path, "vpc")
    assert f"({size} bytes)" in run("qemu-img", "info", "-f", "vpc", path).stdout
    media = next(line for line in run("vhdiinfo", path).stdout.splitlines() if "Media size" in line)
    assert f"{size} bytes" in media
    assert subprocess.run(["7z", "e", "-so", path], capture_output=True, check=True).stdout == content(disk)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_footer_is_as_specified(options: dict[str, str], tmp_path: Path) -> None:
    size = 9 * MIB + 1536
    (path,) = write_image("vhd", little_disk(size), tmp_path / "d.vhd", options=options)
    raw = path.read_bytes()
    foot = raw[-512:]
    is_fixed = options.get("subformat") == "fixed"
    assert foot == sealed(foot, 64)
    assert struct.unpack_from(">8sIIQI", foot) == (b"conectix", 2, 0x10000, (1 << 64) - 1 if is_fixed else 512, 0)
    assert struct.unpack_from(">4sI4sQQ", foot, 28) == (b"win ", 0xA0000, b"Wi2k", size, size)
    assert struct.unpack_from(">I", foot, 60) == (2 if is_fixed else 3,)
    assert foot[68:84] != bytes(16)
    assert foot[84:] == bytes(428)
    cylinders, heads, sectors = struct.unpack_from(">HBB", foot, 56)
    assert 0.9 * size < cylinders * heads * sectors * 512 <= size
    assert (raw[:512] == foot) != is_fixed
    assert len(raw) == size + 512 or not is_fixed


@pytest.mark.parametrize("block", [4 * KIB, 512 * KIB, 2 * MIB, 16 * MIB])
def test_tables_and_places_of_a_dynamic_disk(block: int, tmp_path: Path) -> None:
    (path,) = write_image("vhd", little_disk(), tmp_path / "d.vhd", options={"block_size": str(block)})
    raw = path.read_bytes()
    head = raw[512:1536]
    assert head == sealed(head, 36)
    cookie, nowhere, table_at, version, entries, said = struct.unpack_from(">8sQQIII", head)
    assert (cookie, nowhere, version, said) == (b"cxsparse", (1 << 64) - 1, 0x10000, block)
    assert head[40:] == bytes(984), "no parent, no locators"
    assert entries == -(-(9 * MIB + 1536) // block)
    table = np.frombuffer(raw, ">u4", entries, table_at)
    padded = raw[table_at + 4 * entries : table_at + -(-4 * entries // 512) * 512]
    assert padded == b"\xff" * len(padded)
    bitmap = -(-block // 512 // 4096) * 512
    places = table[table != 0xFFFFFFFF].astype(np.int64) * 512
    assert len(places)
    assert not ((places + bitmap) % 4096).any(), "data on 4 KiB boundaries"
    assert all(raw[at : at + bitmap] == b"\xff" * bitmap for at in places.tolist())
    assert (np.diff(np.sort(places)) >= bitmap + block).all()
    assert len(raw) == places.max() + bitmap + block + 512


def test_an_empty_disk_has_tables_and_footers_alone(tmp_path: Path) -> None:
    (path,) = write_image("vhd", pattern_disk(GIB, []), tmp_path / "d.vhd")
    assert path.stat().st_size == 512 + 1024 + 2048 + 512
    assert run("qemu-img", "info", "-f", "vpc", path).stdout.count(f"({GIB} bytes)") == 1


def test_explicit_zeroes_take_no_room_without_a_parent(tmp_path: Path) -> None:
    (path,) = write_image("vhd", pattern_disk(8 * MIB, [(0, 4 * MIB, ZERO)]), tmp_path / "d.vhd")
    assert path.stat().st_size < 8 * KIB


def test_a_fixed_disk_goes_down_a_pipe(tmp_path: Path) -> None:
    allocator = new_allocator(NewImage(5 * MIB, "d.vhd", options={"subformat": "fixed"}))
    assert allocator.sequential
    drive(allocator, little_disk(5 * MIB), tmp_path)  # asserts that every write comes behind the last


@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_odd_sizes_are_rounded_up_to_a_sector(subformat: str, tmp_path: Path) -> None:
    disk = pattern_disk(MIB + 7, [(MIB, 7, b"end....")])
    (path,) = write_image("vhd", disk, tmp_path / "d.vhd", options={"subformat": subformat})
    assert content(open_disk(path)) == content(disk) + bytes(505)


def test_times_count_from_2000(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "946684861")
    (path,) = write_image("vhd", little_disk(), tmp_path / "d.vhd")
    assert struct.unpack_from(">I", path.read_bytes(), 24) == (61,)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    (path,) = write_image("vhd", little_disk(), tmp_path / "d.vhd")
    assert struct.unpack_from(">I", path.read_bytes(), 24) == (0,)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, two, other = (
        write_image("vhd", little_disk(), tmp_path / where / "d.vhd", identity=Identity(seed))[0].read_bytes()
        for where, seed in (("a", b"1"), ("b", b"1"), ("a", b"2"))
    )
    assert one == two
    assert one != other


# --- differencing


def _parent(path: Path, name: str | None = None) -> NewParent:
    disk = open_disk(path)
    assert isinstance(disk, ImageDisk)
    return NewParent(name or path.name, "vhd", disk.size, disk.identity, path)


@pytest.mark.parametrize("options", [{}, {"block_size": "4K"}, {"block_size": "8M"}], ids=str)
def test_a_difference_over_its_parent(options: dict[str, str], tmp_path: Path) -> None:
    size = 9 * MIB + 1536
    base = content(little_disk(size))
    (parent,) = write_image("vhd", little_disk(size), tmp_path / "base.vhd")
    pieces = [
        (512, 1024, data(1, 1024)),
        (4096, 4096, ZERO),
        (3 * MIB, 2 * MIB, data(2, 2 * MIB)),
        (6 * MIB, MIB, ZERO),
        (size - 512, 512, data(3, 512)),
    ]
    over = pattern_disk(size, pieces)
    (child,) = write_image("vhd", over, tmp_path / "child.vhd", options=options, parent=_parent(parent))
    want = bytearray(base)
    for at, length, piece in pieces:
        want[at : at + length] = piece if isinstance(piece, bytes) else bytes(length)
    assert content(checked(open_disk(child, parents=tmp_path))) == want
    seven = subprocess.run(["7z", "e", "-so", child], capture_output=True, check=True, cwd=tmp_path)
    assert seven.stdout == want, "7-Zip finds the parent by its locator and reads the same"
    told = run("vhdiinfo", child).stdout
    assert "Differential" in told
    assert "base.vhd" in told
    assert struct.unpack_from(">I", child.read_bytes(), 512 + 56) == struct.unpack_from(">I", parent.read_bytes(), 24)


def test_sectors_of_a_difference_are_present_one_by_one(tmp_path: Path) -> None:
    (parent,) = write_image("vhd", pattern_disk(4 * MIB, []), tmp_path / "base.vhd")
    over = pattern_disk(4 * MIB, [(2 * MIB, 512, b"a"), (2 * MIB + 1024, 512, ZERO), (2 * MIB + 63 * 512, 512, b"b")])
    (child,) = write_image("vhd", over, tmp_path / "child.vhd", parent=_parent(parent))
    with FileSource(child) as source:
        layer = open_layer(source, require_format("vhd"), OpenContext())
        rows = np.concatenate(list(layer.extents()))
    assert rows["kind"].tolist() == [ABSENT, DATA, ABSENT, DATA, ABSENT, DATA, ABSENT]
    assert rows["length"].tolist()[1:6] == [512, 512, 512, 60 * 512, 512]
    raw = child.read_bytes()
    table_at = struct.unpack_from(">Q", raw, 512 + 16)[0]
    empty, used = struct.unpack_from(">II", raw, table_at)
    assert empty == 0xFFFFFFFF
    assert raw[used * 512 : used * 512 + 512] == bytes([0b10100000, 0, 0, 0, 0, 0, 0, 1]) + bytes(504)


def test_a_child_is_another_image_even_with_the_same_seed(tmp_path: Path) -> None:
    (parent,) = write_image("vhd", pattern_disk(4 * MIB, []), tmp_path / "base.vhd")
    (child,) = write_image("vhd", pattern_disk(4 * MIB, []), tmp_path / "child.vhd", parent=_parent(parent))
    assert child.read_bytes()[68:84] != parent.read_bytes()[68:84]


def test_locators_hold_the_name_in_every_form(tmp_path: Path) -> None:
    (parent,) = write_image("vhd", pattern_disk(4 * MIB, []), tmp_path / "bäse.vhd")
    image = NewImage(4 * MIB, "child.vhd", parent=_parent(parent, "../x/bäse.vhd"), identity=Identity())
    (child,) = drive(new_allocator(image), pattern_disk(4 * MIB, []), tmp_path)
    raw = child.read_bytes()
    assert raw[576:1088].decode("utf-16-be").rstrip("\0") == "bäse.vhd"
    found = {}
    for i in range(8):
        code, space, length, _, at = struct.unpack_from(">4sIIIQ", raw, 1088 + 24 * i)
        if code != bytes(4):
            assert space % 512 == 0
            assert space >= length
            found[code] = raw[at : at + length].decode("utf-16-le")
    assert found == {b"W2ru": "..\\x\\bäse.vhd", b"W2ku": str(parent).replace("/", "\\")}


def test_a_reproducible_difference_does_not_tell_where_it_was_made(tmp_path: Path) -> None:
    made = []
    for where in ("a", "b"):
        folder = tmp_path / where
        folder.mkdir()
        (parent,) = write_image("vhd", pattern_disk(4 * MIB, []), folder / "base.vhd")
        (child,) = write_image("vhd", little_disk(4 * MIB), folder / "child.vhd", parent=_parent(parent))
        made.append(child.read_bytes())
    assert made[0] == made[1]


def test_only_a_vhd_can_be_the_parent() -> None:
    parent = NewParent("p.vdi", "vdi", MIB, {"uuid": "00000000-0000-0000-0000-000000000001"})
    with pytest.raises(OptionError, match="parent must be a VHD"):
        new_allocator(NewImage(MIB, "c.vhd", parent=parent))
    with pytest.raises(OptionError, match="parent"):
        new_allocator(NewImage(MIB, "c.vhd", options={"subformat": "fixed"}, parent=parent))


# --- limits


@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_more_than_2040_gib_is_refused(subformat: str) -> None:
    new_allocator(NewImage(2040 * GIB, "d.vhd", options={"subformat": subformat}))
    with pytest.raises(TargetError, match="2040"):
        new_allocator(NewImage(2040 * GIB + 1, "d.vhd", options={"subformat": subformat}))


def test_the_largest_disk_is_laid_out_in_seconds() -> None:
    allocator = new_allocator(NewImage(2040 * GIB, "d.vhd"))
    runs = np.zeros(2, RUN)
    runs["start"], runs["length"] = [0, 1020 * GIB], 1020 * GIB
    runs["kind"] = [DATA, HOLE]
    start = time.process_time()
    placed = allocator.place(runs)
    assert time.process_time() - start < 3
    assert len(placed) == 1020 * GIB // (2 * MIB)
    assert not (placed["offset"] % 4096).any()
    blocks = 1020 * 512
    first = int(placed["offset"][0])
    assert allocator.sizes() == (first + (blocks - 1) * (2 * MIB + 4096) + 2 * MIB + 512,)


def test_blocks_beyond_what_an_entry_can_tell_are_refused() -> None:
    allocator = new_allocator(NewImage(1100 * GIB, "d.vhd", options={"block_size": "128K"}))
    allocator._allocated = (2048 * GIB) // (132 * KIB)
    runs = np.zeros(1, RUN)
    runs[0] = (0, MIB, 0, DATA, 0)
    with pytest.raises(TargetError, match="2 TiB"):
        allocator.place(runs)


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": "3M"},
        {"block_size": "2K"},
        {"subformat": "differencing"},
        {"subformat": "fixed", "block_size": "2M"},
        {"preallocation": "full"},
        {"static": "on"},
        {"force_size": "much"},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(OptionError):
        new_allocator(NewImage(MIB, "d.vhd", options=options))


def test_tables_too_large_for_memory_are_refused() -> None:
    error: type[DiskmorphError] = OptionError
    with pytest.raises(error, match="block_size"):
        new_allocator(NewImage(1024 * GIB, "d.vhd", options={"block_size": "4K"}))
    with pytest.raises(error, match="compressed"):
        new_allocator(NewImage(MIB, "d.vhd", codec=1))
