"""Compressed units that pass through: the same streams, exact sizes, never a damaged one, and anew where they can't."""

from __future__ import annotations

import random
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from contract.cases import qcow2

import diskmorph
from diskmorph.convert.passing import Stream, passed
from diskmorph.formats.codecs import decode, decode_exactly
from diskmorph.formats.errors import FormatError
from diskmorph.formats.extents import DEFLATE, ZLIB, ZSTD

from testkit import MIB, data


def text(length: int) -> bytes:
    rng = random.Random(3)
    return b"".join(b"line %d of %d\n" % (rng.randrange(999), rng.randrange(99)) for _ in range(length // 12))[:length]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, noise and zeroes, with a last unit that is not whole."""
    path = tmp_path_factory.mktemp("passing") / "disk.raw"
    path.write_bytes(text(3 * MIB) + bytes(MIB) + data("noise", MIB) + text(MIB) + b"end" * 512)
    return path


def peer(*words: object) -> str:
    done = subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True)
    return done.stdout


def made_by_qemu(raw: Path, kind: str) -> Path:
    path = raw.with_name(f"qemu.{kind}")
    words = {
        "deflate": ["-O", "qcow2"],
        "zstd": ["-O", "qcow2", "-o", "compression_type=zstd"],
        "vmdk": ["-O", "vmdk", "-o", "subformat=streamOptimized"],
    }[kind]
    if not path.exists():
        peer("convert", "-c", *words, raw, path)
    return path


def convert(source: Path, target: Path, compress: str | None = "default", **options: object) -> diskmorph.ConvertReport:
    return diskmorph.convert(
        source, target, options=diskmorph.ConvertOptions(compress=compress, verify=True, **options)
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "suffix", "compress", "share"),
    [
        ("deflate", "qcow2", "default", 0.99),
        ("zstd", "qcow2", "zstd", 0.99),
        ("deflate", "vmdk", None, 0.79),  # the noise, plain in qcow2, is encoded
        ("vmdk", "vmdk", None, 0.99),
        ("vmdk", "qcow2", "default", 0.0),  # a 15-bit window: encoded anew
        ("zstd", "qcow2", "default", 0.0),
        ("deflate", "qcow2", "zstd", 0.0),
        ("deflate", "qcow2", "deflate:6", 0.0),  # a level was asked for
    ],
)
def test_streams_of_a_peer(
    raw: Path, tmp_path: Path, kind: str, suffix: str, compress: str | None, share: float
) -> None:
    source, target = made_by_qemu(raw, kind), tmp_path / f"out.{suffix}"
    options = {"target_format": "vmdk", "format_options": {"subformat": "streamOptimized"}} if suffix == "vmdk" else {}
    moved = convert(source, target, compress, **options).bytes
    whole = moved.passed + moved.encoded
    assert whole
    assert share * whole <= moved.passed
    assert (moved.passed == 0) == (share == 0)
    peer("compare", raw, target)
    if suffix == "qcow2":
        assert "No errors" in peer("check", target)


def test_an_image_does_not_grow_by_passing_again(raw: Path, tmp_path: Path) -> None:
    """qcow2's tables tell sizes in sectors; the bytes behind a stream belong to its neighbour."""
    convert(raw, tmp_path / "0.qcow2")
    for turn in range(3):
        convert(tmp_path / f"{turn}.qcow2", tmp_path / f"{turn + 1}.qcow2")
    assert (tmp_path / "3.qcow2").stat().st_size == (tmp_path / "0.qcow2").stat().st_size


def test_there_and_back(raw: Path, tmp_path: Path) -> None:
    """Streams of 12 bits say so in a VMDK, and so can go back."""
    convert(raw, tmp_path / "a.qcow2")
    convert(
        tmp_path / "a.qcow2", tmp_path / "b.vmdk", target_format="vmdk", format_options={"subformat": "streamOptimized"}
    )
    assert convert(tmp_path / "b.vmdk", tmp_path / "c.qcow2").bytes.passed > 3 * MIB
    assert (tmp_path / "c.qcow2").stat().st_size == (tmp_path / "a.qcow2").stat().st_size


def test_other_cluster_sizes_are_encoded_anew(raw: Path, tmp_path: Path) -> None:
    moved = convert(made_by_qemu(raw, "deflate"), tmp_path / "out.qcow2", format_options={"cluster_size": "32K"}).bytes
    assert moved.passed == 0
    peer("compare", raw, tmp_path / "out.qcow2")


def test_reproducible_images_hang_on_content_alone(raw: Path, tmp_path: Path) -> None:
    made = [raw, made_by_qemu(raw, "deflate")]
    for number, source in enumerate(made):
        convert(source, tmp_path / f"{number}.qcow2", reproducible=True)
    assert (tmp_path / "0.qcow2").read_bytes() == (tmp_path / "1.qcow2").read_bytes()


def test_zero_units_are_not_passed(tmp_path: Path) -> None:
    """An encoded unit that decodes to zeroes becomes a zero unit."""
    (tmp_path / "a.raw").write_bytes(bytes(MIB) + text(MIB))
    peer("convert", "-c", "-S", "0", "-O", "qcow2", tmp_path / "a.raw", tmp_path / "a.qcow2")
    moved = convert(tmp_path / "a.qcow2", tmp_path / "b.qcow2").bytes
    assert (moved.passed, moved.skipped) == (MIB, MIB)


def test_a_damaged_stream_is_refused(raw: Path, tmp_path: Path) -> None:
    body = bytearray(made_by_qemu(raw, "deflate").read_bytes())
    convert(raw, tmp_path / "sound.qcow2")
    at = body.index(zlib_of(raw)) + 200
    body[at : at + 400] = b"\xff" * 400
    (tmp_path / "bad.qcow2").write_bytes(body)
    with pytest.raises(FormatError) as caught:
        convert(tmp_path / "bad.qcow2", tmp_path / "out.qcow2")
    assert caught.value.structure == "compressed data"
    assert not (tmp_path / "out.qcow2").exists()


def zlib_of(raw: Path) -> bytes:
    """The beginning of the first cluster's stream: qemu's zlib finds the same."""
    stream = zlib.compressobj(-1, zlib.DEFLATED, -12, 8)
    return (stream.compress(raw.read_bytes()[:65536]) + stream.flush())[:64]


def test_frames_end_where_zstd_says() -> None:
    import zstandard

    unit = text(65536)
    for checksum in (False, True):
        for body in (unit, bytes(65536), data("noise", 65536)):
            frame = zstandard.ZstdCompressor(level=3, write_checksum=checksum).compress(body)
            assert decode_exactly(ZSTD, frame + b"more" * 99, 65536) == (body, len(frame))
    streamed = zstandard.ZstdCompressor().compressobj()
    frame = streamed.compress(unit) + streamed.flush()
    assert decode_exactly(ZSTD, frame + b"\x28\xb5\x2f\xfd", 65536) == (unit, len(frame))


def without_an_end() -> bytes:
    """A zstd frame of the right length, no block of which is marked as the last: one that repeats a byte."""
    return b"\x28\xb5\x2f\xfd\xa0" + (65536).to_bytes(4, "little") + (65536 << 3 | 2).to_bytes(3, "little") + b"x"


def without_its_checksum() -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(data("noise", 65536))[:-4]


@pytest.mark.parametrize("make", [without_an_end, without_its_checksum])
def test_frames_that_are_cut_off_are_damaged(make: Callable[[], bytes]) -> None:
    for decoder in (decode, decode_exactly):
        with pytest.raises(FormatError, match="cut off"):
            decoder(ZSTD, make(), 65536)


def test_an_image_with_a_frame_without_an_end_is_refused(tmp_path: Path) -> None:
    frame = without_an_end().ljust(512, b"\0")
    entry = qcow2.packed_entry(32 * 65536, len(frame), 16)
    path = tmp_path / "a.qcow2"
    qcow2.handmade(path, 65536, {0: entry}, {32 * 65536: frame}, features=(8, 0, 0), compression=1)
    with pytest.raises(FormatError, match="cut off"):
        convert(path, tmp_path / "out.qcow2", "zstd")


def test_streams_end_where_deflate_says() -> None:
    unit = text(65536)
    for bits, codec in ((-12, DEFLATE), (15, ZLIB)):
        stream = zlib.compressobj(6, zlib.DEFLATED, bits)
        encoded = stream.compress(unit) + stream.flush()
        assert decode_exactly(codec, encoded + b"more", 65536) == (unit, len(encoded))


def test_wrapping_and_unwrapping() -> None:
    unit = text(65536)
    stream = zlib.compressobj(6, zlib.DEFLATED, -12)
    bare = stream.compress(unit) + stream.flush()
    wrapped = passed(Stream(DEFLATE, bare, 65536), unit, ZLIB, 15)
    assert wrapped is not None
    assert zlib.decompress(wrapped) == unit
    assert bytes(passed(Stream(ZLIB, wrapped, 65536), unit, DEFLATE, 12) or b"") == bare
    assert passed(Stream(ZLIB, zlib.compress(unit), 65536), unit, DEFLATE, 12) is None
    assert passed(Stream(ZLIB, zlib.compress(unit), 65536), unit, DEFLATE, 15) is not None
    assert passed(Stream(ZSTD, bare, 65536), unit, DEFLATE, 15) is None
