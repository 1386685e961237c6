"""Reading cloop images: as create_compressed_fs writes and qemu-img reads them; damage names its place."""

from __future__ import annotations

import contextlib
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from contract.cases import cloop as made
from contract.cases.cloop import LZ4, LZO, PLAIN, XZ, ZLIB, blocks, image

from diskmorph.formats import cloop
from diskmorph.formats.check import CheckReport
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.registry import OpenContext, identify, open_disk
from diskmorph.formats.source import FileSource

from testkit import KIB, MIB, content, data, little_disk, qemu_same, run


def check(path: Path) -> CheckReport:
    with FileSource(path) as source:
        return cloop.check_image(source, OpenContext(), "all")


def refused(path: Path, kind: type[DiskmorphError] = FormatError) -> DiskmorphError:
    begun = time.process_time()
    with pytest.raises(kind) as caught:
        content(open_disk(path, format="cloop"))
    assert time.process_time() - begun < 2
    assert caught.value.file == str(path)
    assert caught.value.offset is not None
    return caught.value


@pytest.mark.parametrize("size", ["65536", "131072"])
@pytest.mark.parametrize("level", ["9", "0", "1", "-1"], ids=["best", "stored", "fast", "7zip"])
def test_reads_what_create_compressed_fs_writes(level: str, size: str, tmp_path: Path) -> None:
    """The level "7zip" is deflate too."""
    raw, path = tmp_path / "d.raw", tmp_path / "d.cloop"
    raw.write_bytes(content(little_disk(2 * MIB)))
    run("create_compressed_fs", "-q", "-m", "-L", level, "-B", size, raw, path)
    disk = checked(open_disk(path))
    assert content(disk) == raw.read_bytes()
    qemu_same(raw, path, "cloop")
    run("extract_compressed_fs", path, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content(disk)
    assert not check(path).findings


def test_qemu_reads_small_blocks_the_same(tmp_path: Path) -> None:
    want = image(tmp_path / "d.cloop", blocks(512 * 3, [ZLIB]))
    (tmp_path / "d.raw").write_bytes(want)
    qemu_same(tmp_path / "d.raw", tmp_path / "d.cloop", "cloop")
    assert content(open_disk(tmp_path / "d.cloop")) == want


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("kind", [ZLIB, PLAIN, XZ, LZ4, LZO])
def test_format_4_names_its_codecs_block_by_block(kind: int, last: bool, tmp_path: Path) -> None:
    want = image(tmp_path / "d", blocks(8 * KIB, [kind, PLAIN]), version="V4.0", last=last)
    with FileSource(tmp_path / "d") as source:
        assert identify(source)[0].name == "cloop"
    assert content(checked(open_disk(tmp_path / "d"))) == want
    assert not check(tmp_path / "d").findings


@pytest.mark.parametrize("version", ["V0.6", "V1.0", "V3.0"])
def test_other_formats_are_refused_by_name(version: str, tmp_path: Path) -> None:
    image(tmp_path / "d", blocks(4096, [ZLIB]), version=version)
    with pytest.raises(UnsupportedError, match=version):
        open_disk(tmp_path / "d")


def test_an_unknown_codec_is_refused_by_name(tmp_path: Path) -> None:
    image(tmp_path / "d", blocks(4096, [ZLIB]), version="V4.0", change=lambda i: i.__setitem__(1, i[1] | 7 << 60))
    assert refused(tmp_path / "d", UnsupportedError).field == "entry 1"


@pytest.mark.parametrize(
    ("number", "value"),
    [(1, 0), (1, 100), (1, 1 << 40), (2, (1 << 64) - 1), (3, 1 << 63), (-1, 1 << 30), (0, 136)],
)
def test_a_damaged_index_is_refused(number: int, value: int, tmp_path: Path) -> None:
    image(tmp_path / "d.cloop", blocks(4096, [ZLIB]), change=lambda index: index.__setitem__(number, value))
    error = refused(tmp_path / "d.cloop")
    assert (error.structure, str(error.field).split()[0]) == ("index", "entry")


def test_plain_blocks_have_their_length(tmp_path: Path) -> None:
    def change(index: list[int]) -> None:
        index[1] += 1

    image(tmp_path / "d", blocks(4096, [PLAIN]), version="V4.0", change=change)
    assert refused(tmp_path / "d").field == "entry 0"


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [(128, 0, "block_size"), (128, 513, "block_size"), (128, 1 << 30, "block_size"), (132, 0xFFFF_FFFF, "blocks")],
)
def test_a_damaged_header_is_refused(at: int, value: int, field: str, tmp_path: Path) -> None:
    path = tmp_path / "d.cloop"
    image(path, blocks(4096, [ZLIB]))
    blob = bytearray(path.read_bytes())
    struct.pack_into(">I", blob, at, value)
    path.write_bytes(blob)
    error = refused(path)
    assert (error.structure, error.field, error.offset) == ("header", field, at)


def test_a_wrong_block_size_shows_in_every_block(tmp_path: Path) -> None:
    path = tmp_path / "d.cloop"
    image(path, blocks(4096, [ZLIB]))
    blob = bytearray(path.read_bytes())
    for size in (4608, 8192):
        struct.pack_into(">I", blob, 128, size)
        path.write_bytes(blob)
        assert refused(path).structure == "compressed data"


@pytest.mark.parametrize("kind", [ZLIB, XZ, LZ4, LZO])
def test_damaged_blocks_are_refused_and_found(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "d.cloop"
    units = [(kind, made.data(n, 4096)) for n in range(5)]
    image(path, units, version="V4.0")
    disk = open_disk(path)
    row = np.concatenate(list(disk.extents()))[2]
    at = int(row["offset"])
    blob = bytearray(path.read_bytes())
    blob[at : at + 24] = bytes(byte ^ 0x5A for byte in blob[at : at + 24])
    path.write_bytes(blob)
    error = refused(path)
    assert (error.structure or "").startswith("compressed")
    assert error.offset == at
    assert [finding.offset for finding in check(path).findings] == [at]


def test_cuts_are_refused(tmp_path: Path) -> None:
    for last in (False, True):
        path = tmp_path / "d.cloop"
        image(path, blocks(4096, [ZLIB]), version="V4.0", last=last)
        blob = path.read_bytes()
        for cut in (0, 1, 20, 135, 136, 150, len(blob) // 2, len(blob) - 1):
            path.write_bytes(blob[:cut])
            assert refused(path).structure in {"header", "index"}


def test_room_that_no_block_uses_is_told(tmp_path: Path) -> None:
    image(tmp_path / "d.cloop", blocks(4096, [ZLIB]), spare=77)
    report = check(tmp_path / "d.cloop")
    assert report.clean
    assert "77 bytes" in report.findings[0].message


def test_damage_anywhere_never_surprises(tmp_path: Path) -> None:
    path = tmp_path / "d.cloop"
    image(path, blocks(1024, [ZLIB, PLAIN, XZ, LZ4, LZO]), version="V4.0")
    whole = path.read_bytes()
    rng = random.Random("fuzz")
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(128, len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(DiskmorphError):
            content(open_disk(path, format="cloop"))


def test_declarations() -> None:
    assert cloop.HEADER_SIZE == 136
    raw = data("entry", 8)
    assert int(np.frombuffer(raw, cloop.ENTRY)[0]) == cloop.ENTRY_STRUCT.parse(raw)
