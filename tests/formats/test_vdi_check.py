"""Checking VDI: good images are clean, every wound is found, what can be mended is."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from contract.cases.vdi import FREE, ZERO, vdi

from diskmorph.formats.check import ERROR, LEAK, WARNING, CheckReport
from diskmorph.formats.places import shared_places
from diskmorph.formats.registry import OpenContext, open_disk
from diskmorph.formats.source import FileSource
from diskmorph.formats.vdi import check_image

from testkit import KIB, MIB, content, data, little_disk, run, write_image

BLOCK = 64 * KIB
COUNT_AT = 0x184


def check(path: Path, repair: str | None = None) -> CheckReport:
    with FileSource(path) as source:
        report = check_image(source, OpenContext(), repair)
    with path.open("r+b") as file:
        for patch in report.patches:
            file.seek(patch.offset)
            file.write(patch.data)
    return report


def wound(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<I", value))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    blocks: list[bytes | str] = [data(1, BLOCK), FREE, data(2, BLOCK), ZERO, data(3, BLOCK)]
    vdi(tmp_path / "d.vdi", 5 * BLOCK, blocks, [2, 0, 1], block=BLOCK)
    return tmp_path / "d.vdi"


def test_good_images_are_clean(image: Path, tmp_path: Path) -> None:
    assert not check(image).findings
    (tmp_path / "d.raw").write_bytes(content(little_disk()))
    for options in ([], ["-o", "static=on"]):
        run("qemu-img", "convert", "-f", "raw", "-O", "vdi", *options, tmp_path / "d.raw", tmp_path / "q.vdi")
        assert not check(tmp_path / "q.vdi").findings
    for static in ("off", "on"):
        (path,) = write_image("vdi", little_disk(), tmp_path / "o.vdi", options={"static": static})
        assert not check(path).findings


@pytest.mark.parametrize(
    ("offset", "value", "structure", "word"),
    [
        (512, 1, "block map", "one place"),
        (512 + 8, 100_000, "block map", "beyond the end"),
        (COUNT_AT, 1, "header", "blocks_allocated is 1"),
    ],
    ids=str,
)
def test_wounds_are_found(image: Path, offset: int, value: int, structure: str, word: str) -> None:
    wound(image, offset, value)
    report = check(image)
    assert not report.clean
    assert report.corruptions
    found = next(f for f in report.findings if f.severity == ERROR)
    assert found.structure == structure
    assert word in found.message
    assert bool(check(image, "all").patches) == (structure == "header"), "only the count can be mended"


def test_places_without_a_block_are_leaks(image: Path) -> None:
    wound(image, 512 + 8, 0xFFFFFFFF)  # it held place 0 of 0..2
    report = check(image)
    assert (report.corruptions, report.leaks) == (0, 1)


def test_a_low_count_is_an_error_and_a_high_one_a_leak(image: Path) -> None:
    for said, severity, repair in ((2, ERROR, "all"), (5, LEAK, "leaks"), (5, LEAK, "all")):
        wound(image, COUNT_AT, said)
        assert [f.severity for f in check(image).findings] == [severity]
        check(image, repair)
        assert not check(image).findings
        assert struct.unpack_from("<I", image.read_bytes(), COUNT_AT) == (3,)
    wound(image, COUNT_AT, 2)
    assert not check(image, "leaks").patches, "an error is no leak"


def test_repair_changes_no_content(image: Path) -> None:
    want = content(open_disk(image))
    wound(image, COUNT_AT, 0)
    check(image, "all")
    assert content(open_disk(image)) == want


def test_a_count_of_version_0_is_mended_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "d.vdi"
    vdi(path, 2 * BLOCK, [data(1, BLOCK), data(2, BLOCK)], block=BLOCK, version=1, stored=1)
    assert check(path, "all").corruptions == 1
    assert not check(path).findings


def test_what_virtualbox_would_not_take_is_a_warning(tmp_path: Path) -> None:
    vdi(tmp_path / "d.vdi", 2 * MIB + 7, [data(1, MIB), FREE, FREE, FREE], create=None, extra=1000)
    report = check(tmp_path / "d.vdi")
    assert report.clean
    assert {f.severity for f in report.findings} == {WARNING}
    assert len(report.findings) == 4


@pytest.mark.parametrize("window", [1 << 22, 16, 1])
@pytest.mark.parametrize("stride", [1, 3])
def test_shared_places_agree_with_a_slow_count(window: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diskmorph.formats.places._WINDOW", window)
    rng = np.random.default_rng(7)
    for high in (300, 5000):
        places = rng.integers(0, high, 300).astype(np.uint64)
        ordered = sorted(places.tolist())
        slow = [b for a, b in itertools.pairwise(ordered) if b - a < stride]
        found = shared_places(lambda: np.array_split(places, 7), stride)  # noqa: B023 - used at once
        assert found.distinct == len(set(ordered))
        assert found.overlapping == len(slow) or window < 300, "of very many the count may fall short"
        assert bool(found.overlapping) == bool(slow)
        assert set(found.some) <= set(slow)


def test_places_without_neighbours_share_nothing() -> None:
    assert shared_places(lambda: [np.arange(0, 1000, 2, dtype=np.uint64)[::-1]], 2) == (0, (), 500)
    assert shared_places(list, 2) == (0, (), 0)
