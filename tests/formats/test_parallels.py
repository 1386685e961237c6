"""Reading Parallels images of both magics."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from contract.cases.parallels import CLUSTER, DISKS, NEW, OLD, hds

from diskmorph.formats import parallels
from diskmorph.formats.allocator import NewImage
from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE
from diskmorph.formats.registry import OpenContext, open_disk
from diskmorph.formats.source import FileSource

from testkit import MIB, TIB, DiskCase, content, data, little_disk, qemu_same, run


def check(path: Path) -> CheckReport:
    with FileSource(path) as source:
        return parallels.check_image(source, OpenContext(), "all")


@pytest.mark.parametrize("case", DISKS, ids=lambda case: case.name)
def test_reads_whole_and_across_clusters(case: DiskCase, tmp_path: Path) -> None:
    disk, want = case.disk(tmp_path)
    assert content(checked(disk)) == want
    rng = random.Random(case.name)
    for _ in range(50):
        start = rng.randrange(len(want))
        length = rng.randrange(1, len(want) - start + 1)
        assert disk.read(start, length) == want[start : start + length]
    assert not check(tmp_path / "d.hds").findings


@pytest.mark.parametrize("options", [[], ["-o", "cluster_size=64k"], ["-S", "0"]], ids=str)
def test_reads_what_qemu_writes(options: list[str], tmp_path: Path) -> None:
    disk = little_disk()
    (tmp_path / "d.raw").write_bytes(content(disk))
    run("qemu-img", "convert", "-f", "raw", "-O", "parallels", *options, tmp_path / "d.raw", tmp_path / "d.hds")
    assert content(checked(open_disk(tmp_path / "d.hds"))) == content(disk)
    assert not check(tmp_path / "d.hds").findings


@pytest.mark.parametrize("magic", [OLD, NEW])
def test_qemu_agrees_about_a_permuted_table(magic: bytes, tmp_path: Path) -> None:
    clusters = [data(1, CLUSTER), None, data(2, CLUSTER), data(3, CLUSTER)]
    want = hds(tmp_path / "d.hds", 4 * 128, clusters, (1, 2, 0), magic=magic)
    (tmp_path / "d.raw").write_bytes(want)
    qemu_same(tmp_path / "d.raw", tmp_path / "d.hds", "parallels")
    disk = open_disk(tmp_path / "d.hds")
    assert content(disk) == want
    rows = np.concatenate(list(disk.extents()))
    assert rows["kind"].tolist() == [DATA, HOLE, DATA, DATA]


def test_the_old_magic_has_sizes_of_32_bits(tmp_path: Path) -> None:
    clusters = [data(1, CLUSTER)]
    hds(tmp_path / "d.hds", 128, clusters, magic=OLD, upper=0xDEAD)
    assert open_disk(tmp_path / "d.hds").size == CLUSTER
    hds(tmp_path / "d.hds", 128, clusters, magic=NEW, upper=1)
    with pytest.raises(FormatError) as caught:
        open_disk(tmp_path / "d.hds")
    assert caught.value.field == "bat_entries"


def test_an_image_in_use_is_told(tmp_path: Path) -> None:
    hds(tmp_path / "d.hds", 128, [data(1, CLUSTER)], in_use=0x746F6E59)
    assert "not closed" in open_disk(tmp_path / "d.hds").info.warnings[0]  # type: ignore[attr-defined]
    report = check(tmp_path / "d.hds")
    assert report.clean
    assert [f.severity for f in report.findings] == [WARNING]


# --- damage


@pytest.fixture
def image(tmp_path: Path) -> Path:
    hds(tmp_path / "d.hds", 4 * 128, [data(i, CLUSTER) for i in range(4)], (2, 0, 3, 1))
    return tmp_path / "d.hds"


def _patch(image: Path, at: int, value: int) -> None:
    with image.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<I", value))


@pytest.mark.parametrize(
    ("at", "value", "structure", "field"),
    [
        (0, 0, "header", "magic"),
        (28, 0, "header", "tracks"),
        (28, 0xFFFFFFFF, "header", "tracks"),
        (32, 3, "header", "bat_entries"),
        (32, 0xFFFFFFFF, "block table", None),
        (36, 10_000, "header", "bat_entries"),
    ],
    ids=str,
)
def test_a_damaged_header_is_refused(image: Path, at: int, value: int, structure: str, field: str | None) -> None:
    _patch(image, at, value)
    start = time.monotonic()
    with pytest.raises(FormatError) as caught:
        open_disk(image, format="parallels")
    assert (caught.value.structure, caught.value.field) == (structure, field)
    assert time.monotonic() - start < 1


def test_an_unknown_version_is_refused_by_name(image: Path) -> None:
    _patch(image, 16, 3)
    with pytest.raises(UnsupportedError, match="version 3"):
        open_disk(image)


@pytest.mark.parametrize("entry", [5000, 0xFFFFFFFF])
def test_clusters_beyond_the_end_are_refused(image: Path, entry: int) -> None:
    _patch(image, 64 + 8, entry)
    disk = open_disk(image)
    for read in (lambda: list(disk.extents()), lambda: content(disk)):
        with pytest.raises(FormatError) as caught:
            read()
        assert (caught.value.structure, caught.value.offset) == ("block table", 64 + 8)
    report = check(image)
    assert report.corruptions == 1
    assert "cluster 2" in report.findings[0].message


def test_a_cluster_over_the_table_is_refused(tmp_path: Path) -> None:
    hds(tmp_path / "d.hds", 2 * 63, [data(1, 63 * 512), None], magic=OLD, tracks=63)
    with (tmp_path / "d.hds").open("r+b") as file:
        file.seek(32)
        file.write(struct.pack("<I", 200))  # the table now reaches into the second sector
        file.seek(64)
        file.write(struct.pack("<I", 1))
    with pytest.raises(FormatError, match="over the table"):
        content(open_disk(tmp_path / "d.hds"))


def test_a_cut_image_is_refused(image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - 1)
    with pytest.raises(FormatError, match="truncated"):
        list(open_disk(image).extents())
    with image.open("r+b") as file:
        file.truncate(70)
    with pytest.raises(FormatError):
        open_disk(image)


def test_two_clusters_at_one_place_are_found(image: Path) -> None:
    _patch(image, 64, struct.unpack_from("<I", image.read_bytes(), 68)[0])
    report = check(image)
    assert report.corruptions == 1
    assert "overlap" in report.findings[0].message


def test_damage_anywhere_never_surprises(image: Path) -> None:
    whole = image.read_bytes()
    rng = random.Random("fuzz")
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(16, 80)] = rng.randrange(256)
        image.write_bytes(damaged)
        try:
            for _ in open_disk(image, format="parallels").extents():
                pass
        except DiskmorphError:
            pass


def test_a_huge_sparse_disk_is_mapped_in_seconds(tmp_path: Path) -> None:
    entries = 2 * TIB // MIB
    with (tmp_path / "d.hds").open("wb") as file:
        file.write(NEW + struct.pack("<IIIIIQIIIQ", 2, 16, 1, 2048, entries, 2 * TIB // 512, 0, 20480, 0, 0))
        table = np.zeros(entries, "<u4")
        table[-1] = 10
        table.tofile(file)
        file.seek(10 * MIB)
        file.write(data("last", MIB))
    disk = open_disk(tmp_path / "d.hds")
    start = time.monotonic()
    rows = np.concatenate(list(disk.extents()))
    assert time.monotonic() - start < 5
    assert rows["kind"].tolist() == [HOLE, DATA]


def test_it_is_read_only() -> None:
    with pytest.raises(UnsupportedError, match="read only"):
        parallels.new_allocator(NewImage(MIB, "d.hds"))


def test_the_table_dtype_is_the_construct() -> None:
    raw = data("table", 64)
    assert np.frombuffer(raw, parallels.ENTRY).tolist() == parallels.TABLE.parse(raw, entries=16)
    assert parallels.HEADER_SIZE == 64
