"""compare, digest, measure, check, probe, the public names."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diskmorph
from diskmorph.convert.digest import LEAF
from diskmorph.convert.journal import JOURNAL
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import FormatError, OptionError, TargetError
from diskmorph.formats.views import Memory, Zero

from testkit import KIB, MIB, TIB, content, data, little_disk, pattern_disk, run, sha256

# --- compare


def test_compare_finds_every_byte() -> None:
    a = bytearray(data("a", 24 * MIB))
    spots = [0, 5 * MIB + 700, 5 * MIB + 100_000, 17 * MIB + 3, len(a) - 1]
    b = bytearray(a)
    for at in spots:
        b[at] ^= 0x55
    found = diskmorph.compare(Memory(a), Memory(b))
    assert not found.identical
    assert found.first_difference == 0
    assert found.ranges == tuple((at, 1) for at in spots)
    few = diskmorph.compare(Memory(a), Memory(b), max_ranges=2)
    assert few.ranges == found.ranges[:2]


def test_compare_merges_neighbours_across_windows() -> None:
    a = bytes(8 * MIB)
    b = bytearray(a)
    b[MIB - 100 : 3 * MIB + 100] = b"x" * (2 * MIB + 200)
    assert diskmorph.compare(Memory(a), Memory(b)).ranges == ((MIB - 100, 2 * MIB + 200),)
    assert diskmorph.compare(Memory(b), Zero(8 * MIB)).ranges == ((MIB - 100, 2 * MIB + 200),)


def test_compare_unequal_sizes() -> None:
    disk = data(1, MIB)
    assert diskmorph.compare(Memory(disk), Memory(disk + bytes(999))).identical
    strict = diskmorph.compare(Memory(disk), Memory(disk + bytes(999)), strict=True)
    assert (strict.identical, strict.ranges, strict.sizes) == (False, ((MIB, 999),), (MIB, MIB + 999))
    longer = diskmorph.compare(Memory(disk + bytes(999) + b"!"), Memory(disk))
    assert longer.ranges == ((MIB + 999, 1),)


def test_compare_of_empty_giants_is_quick(tmp_path: Path) -> None:
    begun = time.process_time()
    assert diskmorph.compare(Zero(1 << 50), Zero(1 << 50)).identical
    assert time.process_time() - begun < 2


def test_compare_does_not_read_what_is_shared(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(data(1, MIB))
    with diskmorph.open_disk(tmp_path / "a.raw") as a, diskmorph.open_disk(tmp_path / "a.raw") as b:
        a.files[0].size = b.files[0].size = 0  # nothing can be read any more
        assert diskmorph.compare(a, b).identical


# --- digest


@pytest.mark.parametrize("size", [0, 1, 4096, MIB + 1, 9 * MIB + 1536])
def test_digest(size: int) -> None:
    disk = pattern_disk(size, [(size // 3, min(size - size // 3, 5000), b"abc")] if size else [])
    found = diskmorph.digest(disk)
    assert found.digest == hashlib.sha256(content(disk)).hexdigest()
    assert (found.algorithm, found.virtual_size) == ("sha256", size)


@pytest.mark.parametrize("size", [0, 1, LEAF, LEAF + 1, 5 * LEAF - 3, 7 * LEAF])
def test_tree_digest_is_what_is_documented(size: int) -> None:
    disk = pattern_disk(size, [(size // 2, min(size - size // 2, 100_000), data(size, 1000))] if size else [])
    raw = content(disk)
    level = [hashlib.sha256(b"\0" + raw[at : at + LEAF]).digest() for at in range(0, size, LEAF)]
    while len(level) > 1:
        level = [
            hashlib.sha256(b"\1" + level[i] + level[i + 1]).digest() if i + 1 < len(level) else level[i]
            for i in range(0, len(level), 2)
        ]
    top = level[0] if level else bytes(32)
    want = hashlib.sha256(b"\2" + size.to_bytes(8, "little") + top).hexdigest()
    assert diskmorph.digest(disk, tree=True).digest == want
    assert diskmorph.digest(Memory(raw), tree=True, threads=1).digest == want


def test_digests_agree_across_formats(tmp_path: Path) -> None:
    disk = little_disk(9 * MIB + 512)
    found = set()
    for name in ("a.raw", "a.qcow2", "a.vmdk", "a.vdi", "a.vhd", "a.vhdx"):
        image = tmp_path / name
        diskmorph.convert(disk, image)
        found.add((diskmorph.digest(image).digest, diskmorph.digest(image, tree=True).digest))
    assert len(found) == 1


def test_tree_digest_of_a_giant_is_quick() -> None:
    assert diskmorph.digest(Zero(2 * TIB), tree=True).virtual_size == 2 * TIB


# --- check


def leaky(path: Path, *, corrupt: bool) -> None:
    diskmorph.convert(Memory(data(1, MIB)), path)
    clusters = path.stat().st_size // 65536
    with path.open("r+b") as file:
        header = file.read(104)
        table = int.from_bytes(header[48:56], "big")
        file.seek(table)
        block = int.from_bytes(file.read(8), "big")
        file.seek(block + 2 * clusters)
        file.write(b"\0\1")
        file.truncate((clusters + 1) * 65536)
        if corrupt:
            l1 = int.from_bytes(header[40:48], "big")
            file.seek(l1)
            l2 = int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
            file.seek(l2)
            used = int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
            file.seek(block + 2 * (used // 65536))
            file.write(b"\0\0")


def test_check_and_repair_into_a_copy(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    leaky(image, corrupt=True)
    before = sha256(image)
    found = diskmorph.check(image)
    assert (found.clean, found.leaks) == (False, 1)
    assert found.corruptions >= 1
    mended = diskmorph.check(image, repair="all", output=tmp_path / "b.qcow2")
    assert mended.clean
    assert mended.repaired
    assert mended.journal is None
    assert sha256(image) == before
    run("qemu-img", "check", "-q", tmp_path / "b.qcow2")
    assert diskmorph.compare(tmp_path / "b.qcow2", Memory(data(1, MIB))).identical


def test_repair_in_place_can_be_undone(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    leaky(image, corrupt=True)
    before = image.read_bytes()
    mended = diskmorph.check(image, repair="all")
    assert mended.clean
    run("qemu-img", "check", "-q", image)
    assert mended.journal == str(image) + JOURNAL
    lines = [json.loads(line) for line in Path(mended.journal).read_text().splitlines()]
    with image.open("r+b") as file:
        for line in reversed(lines[1:]):
            file.seek(line["offset"])
            file.write(bytes.fromhex(line["old"]))
        file.truncate(lines[0]["size"])
    assert image.read_bytes() == before


def test_repair_that_has_nothing_to_do(tmp_path: Path) -> None:
    diskmorph.convert(Memory(data(1, MIB)), tmp_path / "a.qcow2")
    assert diskmorph.check(tmp_path / "a.qcow2", repair="all").clean
    assert [p.name for p in tmp_path.iterdir()] == ["a.qcow2"]


def test_check_refuses(tmp_path: Path) -> None:
    diskmorph.convert(Memory(data(1, MIB)), tmp_path / "a.qcow2")
    with pytest.raises(OptionError, match="leaks, all or undo"):
        diskmorph.check(tmp_path / "a.qcow2", repair="some")
    with pytest.raises(OptionError, match="--repair"):
        diskmorph.check(tmp_path / "a.qcow2", output=tmp_path / "b.qcow2")
    with pytest.raises(TargetError, match="is repaired"):
        diskmorph.check(tmp_path / "a.qcow2", repair="all", output=tmp_path / "a.qcow2", force=True)


# --- measure


def test_measure_of_a_giant(tmp_path: Path) -> None:
    for name in ("raw", "qcow2", "vmdk", "vhdx"):
        found = diskmorph.measure(Zero(TIB), name)
        assert found.required <= found.fully_allocated
        assert found.fully_allocated >= TIB


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
@pytest.mark.parametrize("name", ["t.vmdk", "n" * 240 + ".vmdk"])
def test_measure_of_an_image_that_records_names_is_an_upper_bound(name: str, subformat: str, tmp_path: Path) -> None:
    options = ConvertOptions(format_options={"subformat": subformat})
    disk = little_disk()
    found = diskmorph.measure(disk, "vmdk", options=options)
    written = diskmorph.convert(disk, tmp_path / name, options=options).stored_size
    assert not found.exact
    assert written <= found.required <= written + 1000


# --- names


def test_public_names() -> None:
    for name in diskmorph.__all__:
        assert name in dir(diskmorph)
    with pytest.raises(AttributeError):
        _ = diskmorph.nothing  # type: ignore[attr-defined]


def test_convert_is_a_function_and_a_package(tmp_path: Path) -> None:
    script = f"""
import diskmorph
diskmorph.convert({str(tmp_path / "a.raw")!r}, {str(tmp_path / "b.raw")!r})
import diskmorph.convert.copy
from diskmorph.convert import job
diskmorph.convert({str(tmp_path / "a.raw")!r}, {str(tmp_path / "c.raw")!r})
assert diskmorph.convert.copy.run and job.convert
"""
    (tmp_path / "a.raw").write_bytes(data(1, 100 * KIB))
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "c.raw").read_bytes() == (tmp_path / "b.raw").read_bytes() == data(1, 100 * KIB)


def test_importing_is_light() -> None:
    script = "import sys, diskmorph; dir(diskmorph); assert not {'numpy', 'construct', 'boto3'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_probe(tmp_path: Path) -> None:
    diskmorph.convert(Zero(MIB), tmp_path / "a.qcow2")
    assert str(diskmorph.probe(tmp_path / "a.qcow2")) == "qcow2"
    assert diskmorph.probe(tmp_path / "a.qcow2").signatures[0].offset == 0
    (tmp_path / "b.vmdk").write_bytes(bytes(4096))
    with pytest.raises(FormatError, match="its name says vmdk"):
        diskmorph.probe(tmp_path / "b.vmdk")


def test_documented_examples(tmp_path: Path) -> None:
    """Every example of docs/python.md runs, in order, in one folder."""
    page = Path(__file__).parents[2] / "docs" / "python.md"
    blocks = page.read_text().split("```python\n")[1:]
    assert len(blocks) >= 5
    code = "\n".join(block.split("```")[0] for block in blocks)
    (tmp_path / "disk.raw").write_bytes(data(1, 3 * MIB))
    (tmp_path / "rootfs/etc").mkdir(parents=True)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
