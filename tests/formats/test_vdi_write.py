"""Writing VDI: what VirtualBox wants to find, what QEMU and 7-Zip read."""

from __future__ import annotations

import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from diskmorph.formats.allocator import RUN, Identity, NewImage, NewParent
from diskmorph.formats.disk import ImageDisk, checked
from diskmorph.formats.errors import DiskmorphError, OptionError, TargetError
from diskmorph.formats.extents import ABSENT, DATA, HOLE, ZERO
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import open_disk
from diskmorph.formats.vdi import new_allocator

from testkit import KIB, MIB, TIB, content, data, little_disk, pattern_disk, qemu_same, run, write_image

WAYS = [{}, {"static": "on"}, {"block_size": "4K"}, {"block_size": "16M"}, {"static": "on", "block_size": "64K"}]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("size", [512, MIB, 9 * MIB + 1536])
def test_comes_back(options: dict[str, str], size: int, tmp_path: Path) -> None:
    disk = little_disk(size) if size > MIB else pattern_disk(size, [(0, 512, data(1, 512))])
    (path,) = write_image("vdi", disk, tmp_path / "d.vdi", options=options)
    assert content(checked(open_disk(path))) == content(disk)


@pytest.mark.parametrize("options", [{}, {"static": "on"}], ids=str)
def test_peers_read_it(options: dict[str, str], tmp_path: Path) -> None:
    disk = little_disk()
    (tmp_path / "d.raw").write_bytes(content(disk))
    (path,) = write_image("vdi", disk, tmp_path / "d.vdi", options=options)
    qemu_same(tmp_path / "d.raw", path, "vdi")
    run("qemu-img", "check", path)
    seven = subprocess.run(["7z", "e", "-so", path], capture_output=True, check=True)
    assert seven.stdout == content(disk)


def test_the_header_is_as_virtualbox_wants_it(tmp_path: Path) -> None:
    disk = pattern_disk(10 * MIB, [(3 * MIB, 5, b"x"), (7 * MIB, MIB, ZERO), (9 * MIB, 5, b"y")])
    (path,) = write_image("vdi", disk, tmp_path / "d.vdi")
    raw = path.read_bytes()
    assert raw[:40] == b"<<< Oracle VM VirtualBox Disk Image >>>\n"
    assert struct.unpack_from("<IIIII", raw, 64) == (0xBEDA107F, 0x10001, 400, 1, 0)
    map_offset, data_offset = struct.unpack_from("<II", raw, 0x154)
    assert data_offset == MIB
    assert struct.unpack_from("<IIIII", raw, 0x15C) == (0, 0, 0, 512, 0)
    assert struct.unpack_from("<QIIII", raw, 0x170) == (10 * MIB, MIB, 0, 10, 2)
    assert len({raw[at : at + 16] for at in (0x188, 0x198, 0x1A8)}) == 3
    assert raw[0x188:0x198] != bytes(16)
    assert raw[0x1A8:0x1C8] == bytes(32)
    assert struct.unpack_from("<IIII", raw, 0x1C8) == (0, 0, 0, 512)
    free, zero = 0xFFFFFFFF, 0xFFFFFFFE
    assert struct.unpack_from("<10I", raw, map_offset) == (free, free, free, 0, free, free, free, zero, free, 1)
    assert len(raw) == 3 * MIB


def test_a_static_image_stores_every_block_in_order(tmp_path: Path) -> None:
    (path,) = write_image("vdi", little_disk(3 * MIB), tmp_path / "d.vdi", options={"static": "on"})
    raw = path.read_bytes()
    assert struct.unpack_from("<I", raw, 76) == (2,)
    assert struct.unpack_from("<II", raw, 0x180) == (3, 3)
    assert struct.unpack_from("<3I", raw, 512) == (0, 1, 2)
    assert len(raw) == 4 * MIB


def test_odd_sizes_are_rounded_up_to_a_sector(tmp_path: Path) -> None:
    disk = pattern_disk(MIB + 7, [(MIB, 7, b"end....")])
    (path,) = write_image("vdi", disk, tmp_path / "d.vdi")
    back = open_disk(path)
    assert back.size == MIB + 512
    assert content(back) == content(disk) + bytes(505)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, two, other = (
        write_image("vdi", little_disk(), tmp_path / where / "d.vdi", identity=Identity(seed))[0].read_bytes()
        for where, seed in (("a", b"1"), ("b", b"1"), ("a", b"2"))
    )
    assert one == two
    assert one != other


# --- differencing


def _parent(path: Path) -> NewParent:
    disk = open_disk(path)
    assert isinstance(disk, ImageDisk)
    return NewParent(path.name, "vdi", disk.size, disk.identity, path)


@pytest.mark.parametrize("options", [{}, {"block_size": "64K"}], ids=str)
def test_a_difference_over_its_parent(options: dict[str, str], tmp_path: Path) -> None:
    base = data("base", 6 * MIB)
    (parent,) = write_image("vdi", pattern_disk(6 * MIB, [(0, 6 * MIB, base)]), tmp_path / "p.vdi")
    over = pattern_disk(6 * MIB, [(MIB, MIB, data("over", MIB)), (3 * MIB, MIB, ZERO)])
    (child,) = write_image("vdi", over, tmp_path / "c.vdi", options=options, parent=_parent(parent))
    want = base[:MIB] + data("over", MIB) + base[2 * MIB : 3 * MIB] + bytes(MIB) + base[4 * MIB :]
    assert content(checked(open_disk(child, parents=Parents(backing=parent)))) == want
    raw, above = parent.read_bytes(), child.read_bytes()
    assert struct.unpack_from("<I", above, 76) == (4,)
    assert above[0x1A8:0x1C8] == raw[0x188:0x1A8], "linkage and parent-modify are the parent's create and modify"
    assert above[0x188:0x198] != raw[0x188:0x198], "a child is another image, even with the same seed"


def test_only_a_vdi_can_be_the_parent() -> None:
    with pytest.raises(OptionError, match="parent must be a VDI"):
        new_allocator(NewImage(MIB, "c.vdi", parent=NewParent("p.qcow2", "qcow2", MIB)))


# --- tables and limits


def test_tables_are_written_in_windows_and_freed(tmp_path: Path) -> None:
    block, count = 4 * KIB, 300_000
    allocator = new_allocator(NewImage(block * count, "d.vdi", options={"block_size": "4K"}))
    kinds = np.random.default_rng(1).choice([DATA, ZERO, HOLE], count).astype(np.uint8)
    table = np.zeros(count, "<u4")
    step, placed = 10_000, 0
    for low in range(0, count, step):
        runs = np.zeros(step, RUN)
        runs["start"] = np.arange(low, low + step) * block
        runs["length"], runs["kind"] = block, kinds[low : low + step]
        placed += len(allocator.place(runs))
        for write in allocator.settle((low + step) * block):
            _store(table, write)
        assert sum(map(len, allocator._runs)) < 100_000
    *rest, header = allocator.finish()
    for write in rest:
        _store(table, write)
    data_blocks = kinds == DATA
    assert placed == data_blocks.sum()
    assert (table[data_blocks] == np.arange(placed)).all()
    assert (table[kinds == ZERO] == 0xFFFFFFFE).all()
    assert (table[kinds == HOLE] == 0xFFFFFFFF).all()
    assert header.offset == 0


def _store(table: np.ndarray, write: tuple[int, int, bytes]) -> None:
    at = (write[1] - 512) // 4
    table[at : at + len(write[2]) // 4] = np.frombuffer(write[2], "<u4")


def test_a_large_hole_is_settled_little_by_little() -> None:
    allocator = new_allocator(NewImage(2 * TIB, "d.vdi", options={"block_size": "4K"}))
    for _ in range(3):
        written = list(allocator.settle(2 * TIB))
        assert sum(len(write.data) for write in written) == 4 * MIB
    assert next(allocator.finish()).offset == 512 + 12 * MIB


def test_two_tebibytes_are_laid_out_in_seconds() -> None:
    allocator = new_allocator(NewImage(2 * TIB, "d.vdi"))
    runs = np.zeros(3, RUN)
    runs["start"], runs["length"] = [0, 1 * TIB, 2 * TIB - MIB], [1 * TIB, 1 * TIB - MIB, MIB]
    runs["kind"] = [DATA, HOLE, DATA]
    start = time.process_time()
    placed = allocator.place(runs)
    writes = list(allocator.finish())
    assert time.process_time() - start < 3
    assert placed["offset"].tolist() == [9 * MIB, 9 * MIB + TIB]
    assert allocator.sizes() == (9 * MIB + TIB + MIB,)
    assert sum(len(write.data) for write in writes) == 8 * MIB + 472


def test_gaps_between_runs_are_free() -> None:
    allocator = new_allocator(NewImage(8 * MIB, "d.vdi"))
    runs = np.zeros(1, RUN)
    runs[0] = (4 * MIB, 2 * MIB, 0, DATA, 0)
    allocator.place(runs)
    table = next(allocator.finish()).data
    assert np.frombuffer(table, "<u4").tolist() == [0xFFFFFFFF] * 4 + [0, 1] + [0xFFFFFFFF] * 2


def test_absent_is_free_in_a_difference() -> None:
    identity = {"uuid": "00000000-0000-0000-0000-000000000001", "modify uuid": "00000000-0000-0000-0000-000000000002"}
    allocator = new_allocator(NewImage(2 * MIB, "c.vdi", parent=NewParent("p.vdi", "vdi", 2 * MIB, identity)))
    runs = np.zeros(2, RUN)
    runs[0], runs[1] = (0, MIB, 0, ABSENT, 0), (MIB, MIB, 0, ZERO, 0)
    assert not len(allocator.place(runs))
    assert np.frombuffer(next(allocator.finish()).data, "<u4").tolist() == [0xFFFFFFFF, 0xFFFFFFFE]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"block_size": "3M"}, OptionError),
        ({"block_size": "512"}, OptionError),
        ({"static": "perhaps"}, OptionError),
        ({"subformat": "fixed"}, OptionError),
        ({"preallocation": "full"}, OptionError),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, str], error: type[DiskmorphError]) -> None:
    with pytest.raises(error):
        new_allocator(NewImage(MIB, "d.vdi", options=options))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(TargetError):
        new_allocator(NewImage(0, "d.vdi"))
    with pytest.raises(TargetError, match="block_size"):
        new_allocator(NewImage(32 * TIB, "d.vdi", options={"block_size": "4K"}))
    with pytest.raises(OptionError, match="compressed"):
        new_allocator(NewImage(MIB, "d.vdi", codec=1))
