"""Reading ASIF: images made from the public description; damage names its place."""

from __future__ import annotations

import contextlib
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from contract.cases.asif import DISKS, NEVER, UNMAPPED, WHOLE, Made, blocks, tables

from diskmorph.formats import asif
from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE
from diskmorph.formats.registry import OpenContext, identify, open_disk
from diskmorph.formats.source import FileSource

from testkit import KIB, MIB, TIB, DiskCase, content, data

CHUNK = 32 * KIB


def check(path: Path) -> CheckReport:
    with FileSource(path) as source:
        return asif.check_image(source, OpenContext(), "all")


def refused(path: Path, kind: type[DiskmorphError] = FormatError) -> DiskmorphError:
    begun = time.process_time()
    with pytest.raises(kind) as caught:
        content(open_disk(path, format="asif"))
    assert time.process_time() - begun < 2
    assert caught.value.file == str(path)
    assert caught.value.offset is not None
    return caught.value


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Chunks 0 to 3: tables lie in chunk 1 of the file, the bitmap in 2, data from 3 on."""
    what = {0: data(0, CHUNK), 1: blocks(1, 64), 2: UNMAPPED, 3: data(3, CHUNK)}
    path = tmp_path / "d.asif"
    path.write_bytes(Made(4 * CHUNK, what).build()[0])
    return path


def patch(path: Path, at: int, value: int, form: str = ">Q") -> None:
    blob = bytearray(path.read_bytes())
    struct.pack_into(form, blob, at, value)
    path.write_bytes(blob)


@pytest.mark.parametrize("case", [*DISKS, DiskCase("asif-tables", tables)], ids=lambda case: case.name)
def test_reads_what_was_made(case: DiskCase, tmp_path: Path) -> None:
    path, want = case.make(tmp_path)
    with FileSource(path) as source:
        assert identify(source)[0].name == "asif"
    assert content(checked(open_disk(path))) == want
    assert not check(path).findings


def test_states_are_told_apart(image: Path) -> None:
    rows = np.concatenate(list(open_disk(image).extents()))
    assert rows["kind"][0] == DATA
    within = rows[(rows["start"] >= CHUNK) & (rows["start"] < 2 * CHUNK)]
    assert {HOLE, DATA} == set(within["kind"].tolist())
    assert (within["start"] % 512 == 0).all()
    assert int(rows["length"][-1]) == CHUNK


def test_info(image: Path) -> None:
    info = open_disk(image).info  # type: ignore[attr-defined]
    assert info.features["uuid"] == "00000000-0000-0000-0000-000000000007"
    assert (info.allocation_unit, info.sector_size) == (CHUNK, 512)


def test_the_newer_directory_counts(image: Path) -> None:
    """The older one of `Made` names tables beyond the file: it is not even looked at, until it is the newer."""
    patch(image, 512, 6)
    assert refused(image).structure == "directory"


@pytest.mark.parametrize(
    ("at", "form", "value", "field"),
    [
        (0, ">I", 0, "magic"),
        (16, ">Q", 1 << 60, "directories[0]"),
        (24, ">Q", 0, "directories[1]"),
        (48, ">Q", 1 << 40, "blocks"),
        (56, ">Q", (1 << 64) - 1, "most_blocks"),
        (56, ">Q", 1 << 52, "directories[0]"),
        (64, ">I", 0, "chunk"),
        (64, ">I", 1 << 31, "chunk"),
        (64, ">I", CHUNK + 512, "chunk"),
        (68, ">H", 0, "block"),
        (68, ">H", 768, "block"),
    ],
)
def test_a_damaged_header_is_refused(at: int, form: str, value: int, field: str, image: Path) -> None:
    patch(image, at, value, form)
    error = refused(image)
    assert (error.structure, error.field) == ("header", field)


@pytest.mark.parametrize(("at", "form", "what"), [(4, ">I", "version"), (70, ">H", "segments")])
def test_what_is_not_known_is_refused_by_name(at: int, form: str, what: str, image: Path) -> None:
    patch(image, at, 2, form)
    assert what in str(refused(image, UnsupportedError))


TABLE = CHUNK  # of `image`


@pytest.mark.parametrize("state", [NEVER, UNMAPPED])
def test_a_place_where_nothing_was_written_is_refused(state: int, image: Path) -> None:
    patch(image, TABLE, state << 62 | 3)
    assert f"state {state}" in refused(image, UnsupportedError).feature  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", [0, 100, (1 << 55) - 1])
def test_a_chunk_beyond_the_end_is_refused(place: int, image: Path) -> None:
    patch(image, TABLE, WHOLE << 62 | place)
    error = refused(image)
    assert (error.structure, error.offset) == ("table", TABLE)
    assert check(image).corruptions == 1


@pytest.mark.parametrize("place", [0, 100, (1 << 55) - 1])
def test_a_bitmap_beyond_the_end_is_refused(place: int, image: Path) -> None:
    patch(image, TABLE + 8 * 2048, place)
    error = refused(image)
    assert (error.structure, error.field, error.offset) == ("table", "bitmap", TABLE + 8 * 2048)


def test_states_of_blocks_that_are_not_known_are_refused(image: Path) -> None:
    patch(image, 2 * CHUNK + 16, 2, ">B")
    assert refused(image, UnsupportedError).structure == "bitmap"


@pytest.mark.parametrize("place", [77, 1 << 60])
def test_a_table_beyond_the_end_is_refused(place: int, image: Path) -> None:
    patch(image, 512 + 8 * 2 + 8, place)
    assert refused(image).structure == "directory"


def test_two_tables_at_one_place_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.asif"
    path.write_bytes(Made(4100 * CHUNK, {0: data(0, CHUNK), 4096: data(1, CHUNK)}).build()[0])
    count = -(-3 * 4100 // 2048)
    patch(path, 512 + 8 * (count + 1) + 8 + 16, 1)
    assert "where another one does" in str(refused(path))


def test_what_the_check_finds(image: Path) -> None:
    patch(image, TABLE + 24, WHOLE << 62 | 3)  # chunk 3 where chunk 0 is; its own is left behind
    report = check(image)
    assert report.corruptions == 1
    assert "used twice, at 98304" in report.findings[0].message
    assert [finding.severity for finding in report.findings[1:]] == [WARNING]


def test_cuts_are_refused(image: Path) -> None:
    blob = image.read_bytes()
    for cut in (0, 40, 79, 80, 520, 1023, CHUNK, TABLE + 100, 2 * CHUNK + 3, len(blob) // 2, len(blob) - 1):
        image.write_bytes(blob[:cut])
        assert refused(image).structure


def test_a_huge_disk_is_mapped_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "d.asif"
    made = Made(MIB, {0: data(0, MIB)}, chunk=MIB, most=4096 * TIB)
    blob = bytearray(made.build()[0])
    struct.pack_into(">Q", blob, 48, 4000 * TIB // 512)
    path.write_bytes(blob)
    begun = time.thread_time()
    rows = np.concatenate(list(open_disk(path).extents()))
    assert time.thread_time() - begun < 3
    assert rows["kind"].tolist() == [DATA, HOLE]
    assert int(rows["length"].sum()) == 4000 * TIB


def test_damage_anywhere_never_surprises(image: Path) -> None:
    whole = image.read_bytes()
    rng = random.Random("fuzz")
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice(
                (
                    rng.randrange(80),
                    512 + rng.randrange(40),
                    TABLE + rng.randrange(32),
                    TABLE + 16384 + rng.randrange(8),
                )
            )
            damaged[at] = rng.randrange(256)
        image.write_bytes(damaged)
        with contextlib.suppress(DiskmorphError):
            for _ in open_disk(image, format="asif").extents():
                pass


def test_declarations() -> None:
    assert asif.HEADER_SIZE == 80
    raw = data("entries", 64)
    assert np.frombuffer(raw, asif.ENTRY).tolist() == list(asif.ENTRIES.parse(raw, count=8))
