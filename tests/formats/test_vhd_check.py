"""Checking VHD: good images are clean, every wound is found, footers are mended from each other."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from contract.cases.vhd import dynamic, fixed, footer, sealed

from diskmorph.formats.check import ERROR, WARNING, CheckReport
from diskmorph.formats.registry import OpenContext, open_disk
from diskmorph.formats.source import FileSource
from diskmorph.formats.vhd import check_image

from testkit import KIB, MIB, content, data, little_disk, run, write_image

BLOCK = 512 * KIB


def check(path: Path, repair: str | None = None) -> CheckReport:
    with FileSource(path) as source:
        report = check_image(source, OpenContext(), repair)
    with path.open("r+b") as file:
        for patch in report.patches:
            file.seek(patch.offset)
            file.write(patch.data)
    return report


@pytest.fixture
def image(tmp_path: Path) -> Path:
    blocks = {i: (None, data(i, BLOCK)) for i in (0, 1, 3)}
    dynamic(tmp_path / "d.vhd", 4 * BLOCK, blocks, block=BLOCK, order=(3, 0, 1))
    return tmp_path / "d.vhd"


def test_good_images_are_clean(image: Path, tmp_path: Path) -> None:
    assert check(image).clean
    (tmp_path / "d.raw").write_bytes(content(little_disk()))
    for subformat in ("dynamic", "fixed"):
        for forced in ("on", "off"):
            options = f"subformat={subformat},force_size={forced}"
            run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, tmp_path / "d.raw", tmp_path / "q.vhd")
            assert check(tmp_path / "q.vhd").clean
        (path,) = write_image("vhd", little_disk(), tmp_path / "o.vhd", options={"subformat": subformat})
        assert not check(path).findings


@pytest.mark.parametrize(
    ("block", "entry", "word"),
    [
        (1, "next", "overlap"),
        (1, "same", "overlap"),
        (1, 0, "over a table"),
        (1, 3, "over a table"),
        (1, 0xFFFFFFF0, "beyond the end"),
        (2, 4000, "beyond the end"),
    ],
    ids=str,
)
def test_blocks_at_wrong_places(image: Path, block: int, entry: int | str, word: str) -> None:
    raw = bytearray(image.read_bytes())
    other = struct.unpack_from(">I", raw, 1536)[0]
    value = {"same": other, "next": other + 1}.get(entry, entry)
    struct.pack_into(">I", raw, 1536 + 4 * block, value)
    image.write_bytes(raw)
    report = check(image)
    errors = [finding for finding in report.findings if finding.severity == ERROR]
    assert errors[0].structure == "block table"
    assert word in errors[0].message


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda raw: bytes(512) + raw[512:], "start"),
        (lambda raw: raw[:90] + b"\xaa" + raw[91:], "start"),
        (lambda raw: footer(3 * BLOCK, 3) + raw[512:], "start"),
        (lambda raw: raw[:-512] + bytes(512), "end"),
        (lambda raw: raw[:-422] + b"\xaa" + raw[-421:], "end"),
        (lambda raw: raw[:-512], "end"),
        (lambda raw: raw[:-200], "end"),
    ],
    ids=["no first", "bad first", "other first", "no last", "bad last", "cut", "partly cut"],
)
def test_footers_are_mended_from_each_other(image: Path, damage: object, where: str) -> None:
    raw = image.read_bytes()
    want = content(open_disk(image))
    image.write_bytes(damage(raw))  # type: ignore[operator]
    report = check(image)
    assert not report.clean
    assert report.corruptions == 1
    assert where in report.findings[0].message
    assert not report.patches, "only when asked"
    assert not check(image, "leaks").patches
    assert len(check(image, "all").patches) == 1
    assert check(image).clean
    assert content(open_disk(image)) == want
    mended = image.read_bytes()
    assert mended[:512] == mended[-512:] == raw[-512:]


EMPTY, CHILD = {"kind": 3}, {"kind": 4, "parent": "p", "locators": [(b"W2ru", b"p\0")]}


@pytest.mark.parametrize("cut", [512, 200], ids=str)
@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        (EMPTY, {}),
        (CHILD, {}),
        ({"header_at": 2048, "table_at": 1024}, {}),
        ({}, {0: (None, data(0, BLOCK))}),
        ({}, {4: (None, data(4, BLOCK))}),
    ],
    ids=["table last", "locator last", "header last", "block last", "the disk's last block last"],
)
def test_a_missing_footer_never_overwrites_what_lies_last(
    tmp_path: Path, options: dict[str, object], blocks: dict[int, tuple[None, bytes]], cut: int
) -> None:
    path = tmp_path / "d.vhd"
    dynamic(path, 4 * BLOCK + 512, blocks, block=BLOCK, **options)  # type: ignore[arg-type]
    whole = path.read_bytes()
    kept = whole[:-cut]
    path.write_bytes(kept)
    assert len(check(path, "all").patches) == 1
    mended = path.read_bytes()
    assert mended[: len(kept)] == kept
    assert mended[-512:] == whole[-512:]
    assert check(path).clean
    assert not check(path, "all").patches


def test_a_last_block_that_is_stored_in_part_is_kept_apart_from_the_footer(tmp_path: Path) -> None:
    path = tmp_path / "d.vhd"
    want = dynamic(path, 4 * BLOCK + 1024, {4: (None, data(4, BLOCK))}, block=BLOCK)
    whole = path.read_bytes()
    path.write_bytes(whole[: 2048 + 512 + 1024])  # table, bitmap and what the disk needs of the block
    check(path, "all")
    assert len(path.read_bytes()) == len(whole), "the footer lies behind the whole block"
    assert content(open_disk(path)) == want
    assert check(path).clean


@pytest.mark.parametrize("left", [512, 1024, 100_000, BLOCK], ids=str)
def test_no_footer_is_put_into_a_block_that_is_cut_off(image: Path, left: int) -> None:
    """Of the last block, bitmap and data, `left` bytes are there."""
    start = len(image.read_bytes()) - 512 - (BLOCK + 512)
    image.write_bytes(image.read_bytes()[: start + left])
    report = check(image, "all")
    assert {f.structure for f in report.findings if f.severity == ERROR} == {"footer", "block table"}
    assert not report.patches


def test_a_damaged_footer_over_a_block_is_not_overwritten(image: Path) -> None:
    """The guest's last sector looks like a damaged footer."""
    raw = image.read_bytes()
    kept = raw[:-1024] + b"conectix" + raw[-1016:-512]
    image.write_bytes(kept)
    check(image, "all")
    assert image.read_bytes() == kept + raw[-512:]
    assert check(image).clean


@pytest.mark.parametrize("entry", [3, 0xFFFFFFF0], ids=["over the table", "beyond the end"])
def test_blocks_at_wrong_places_keep_the_footer_from_landing_in_them(image: Path, entry: int) -> None:
    raw = bytearray(image.read_bytes()[:-512])
    struct.pack_into(">I", raw, 1536 + 8, entry)
    image.write_bytes(raw)
    check(image, "all")
    assert image.read_bytes()[: len(raw)] == raw
    assert not check(image, "all").patches


def test_a_good_image_is_left_alone(image: Path) -> None:
    assert not check(image, "all").patches


def test_sectors_that_were_never_written_are_told(tmp_path: Path) -> None:
    dynamic(tmp_path / "d.vhd", 4 * MIB - 512, {0: (range(10), data(1, 2 * MIB)), 1: (None, data(2, 2 * MIB))})
    report = check(tmp_path / "d.vhd")
    assert report.clean
    assert [f.message for f in report.findings if f.structure == "sector bitmap"] == [
        "4086 sectors of stored blocks are marked as never written: they read as zeroes"
    ]


def test_what_is_odd_but_harmless_is_a_warning(tmp_path: Path) -> None:
    fixed(tmp_path / "d.vhd", data(1, MIB), length=511, saved=1)
    report = check(tmp_path / "d.vhd")
    assert report.clean
    assert {f.severity for f in report.findings} == {WARNING}
    assert len(report.findings) == 2
    raw = data(1, MIB) + bytes(1000) + footer(MIB, 2)
    (tmp_path / "d.vhd").write_bytes(raw)
    assert "1000 bytes" in check(tmp_path / "d.vhd").findings[0].message


def test_blocks_behind_the_end_of_the_disk_are_a_warning(tmp_path: Path) -> None:
    blocks = {0: (None, data(0, BLOCK)), 3: (None, data(1, BLOCK))}
    path = tmp_path / "d.vhd"
    dynamic(path, 4 * BLOCK, blocks, block=BLOCK)
    raw = bytearray(path.read_bytes())
    raw[:512] = raw[-512:] = footer(2 * BLOCK, 3)
    path.write_bytes(raw)
    report = check(path)
    assert report.clean
    assert any("behind the disk's end" in f.message for f in report.findings)


def test_tables_that_overlap_are_found(image: Path) -> None:
    raw = bytearray(image.read_bytes())
    struct.pack_into(">Q", raw, 512 + 16, 1400)  # the table over the header's reserved end
    raw[512:1536] = sealed(bytes(raw[512:1536]), 36)
    image.write_bytes(raw)
    assert any("overlap" in f.message for f in check(image).findings if f.structure == "dynamic header")


def test_a_difference_without_a_parent_is_found(tmp_path: Path) -> None:
    dynamic(tmp_path / "d.vhd", 4 * MIB, {}, kind=4)
    report = check(tmp_path / "d.vhd")
    assert not report.clean
    assert "unique id" in report.findings[0].message
