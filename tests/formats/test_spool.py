"""Compressed streams decoded into a file without a name."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
from typing import TYPE_CHECKING

import pytest
import zstandard

from diskmorph.formats.errors import FormatError, TargetError
from diskmorph.formats.limits import Limits
from diskmorph.formats.source import BytesSource
from diskmorph.formats.spool import Spool, codec_of, decode_stream, decoded, head_of

from testkit import data

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = data("spool", 300_000) + bytes(100_000)
PACKED = {
    "gzip": gzip.compress(CONTENT, mtime=0),
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT),
    "xz": lzma.compress(CONTENT),
}


@pytest.mark.parametrize("codec", PACKED)
def test_decoded_with_both_hashes(codec: str) -> None:
    outer, inner = hashlib.sha256(), hashlib.sha256()
    source = BytesSource(PACKED[codec])
    assert codec_of(source) == codec
    with decoded(source, Limits(), encoded=outer, content=inner) as spool:
        assert spool.size == len(CONTENT)
        assert spool.read(1000, 5000) == CONTENT[1000:6000]
        with spool.descriptor() as lent:
            assert lent is not None
            assert os.pread(lent[0], 100, lent[1] + 50) == CONTENT[50:150]
    assert outer.digest() == hashlib.sha256(PACKED[codec]).digest()
    assert inner.digest() == hashlib.sha256(CONTENT).digest()


@pytest.mark.parametrize("codec", PACKED)
def test_streams_that_follow_each_other_are_one(codec: str) -> None:
    source = BytesSource(PACKED[codec] * 3)
    assert b"".join(decode_stream(source, codec)) == CONTENT * 3


def test_padding_behind_gzip_is_passed_over() -> None:
    assert b"".join(decode_stream(BytesSource(PACKED["gzip"] + bytes(700)), "gzip")) == CONTENT


@pytest.mark.parametrize("codec", ["gzip", "xz"])
def test_cut_streams_are_refused(codec: str) -> None:
    for stop in (20, len(PACKED[codec]) // 2, len(PACKED[codec]) - 1):
        with pytest.raises(FormatError):
            decoded(BytesSource(PACKED[codec][:stop]), Limits())


@pytest.mark.parametrize("codec", PACKED)
def test_garbage_behind_is_refused(codec: str) -> None:
    with pytest.raises(FormatError):
        decoded(BytesSource(PACKED[codec] + b"garbage that is no stream"), Limits())


def test_plain_sources_stay_themselves() -> None:
    source = BytesSource(CONTENT)
    assert decoded(source, Limits()) is source
    assert head_of(source, 10) == CONTENT[:10]
    assert head_of(BytesSource(PACKED["gzip"]), 10) == CONTENT[:10]
    assert head_of(BytesSource(PACKED["gzip"][:12]), 10) == b""


def test_expansion_is_bounded() -> None:
    bomb = gzip.compress(bytes(100 << 20))
    with pytest.raises(FormatError, match="expands more than 10 times"):
        decoded(BytesSource(bomb), Limits(expansion=10))


def test_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool("x")
    with pytest.raises(TargetError, match="no room"):
        spool.require_room(1 << 60)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(TargetError, match="temporary file"):
        Spool("y")
    spool.close()
