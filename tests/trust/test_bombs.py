"""What claims more than its file holds, or expands beyond its limits, is stopped by them at little cost."""

from __future__ import annotations

import bz2
import lzma
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ovfkit
import pytest
import vhdxmade
import vmdkmade
import zstandard
from contract.cases import qcow2, vdi
from vhdxmade import Made
from vmdkmade import Hosted

from testkit import MIB, data

ROOT = Path(__file__).resolve().parents[2]


def peak_of(*words: object, cwd: Path) -> tuple[int, str, int]:
    """Exit status, messages and peak memory of a run; by a process between, as a fork's peak begins with its parent's."""
    code = (
        "import os, subprocess, sys; done = subprocess.Popen(sys.argv[1:]); _, status, usage = os.wait4(done.pid, 0); "
        "print('peak', usage.ru_maxrss, file=sys.stderr); os._exit(os.waitstatus_to_exitcode(status) & 255)"
    )
    argv = [sys.executable, "-c", code, sys.executable, "-m", "diskmorph", *(str(word) for word in words)]
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
    text, _, peak = done.stderr.rpartition("peak ")
    return done.returncode, text + done.stdout, int(peak) * 1024


ZEROES = bytes(MIB)
_DICTIONARY = [{"id": lzma.FILTER_LZMA2, "dict_size": 192 << 20, "preset": 0}]
ENCODERS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.compressobj(9, zlib.DEFLATED, 31),
    "zst": lambda: zstandard.ZstdCompressor(3).compressobj(),
    "xz": lambda: lzma.LZMACompressor(filters=_DICTIONARY),
    "bz2": lambda: bz2.BZ2Compressor(1),
}


def packed(packer: Any, count: int, head: bytes = b"") -> bytes:
    """A stream of `count` MiB of zeroes behind a head."""
    return b"".join([packer.compress(head), *(packer.compress(ZEROES) for _ in range(count)), packer.flush()])


@pytest.mark.parametrize(
    "suffix", [pytest.param(s, marks=[] if s in ("zst", "xz") else pytest.mark.slow) for s in ENCODERS]
)
def test_archives_that_expand_without_end(suffix: str, tmp_path: Path) -> None:
    """A tar of one huge file of zeroes, compressed: 200 MiB of less than one."""
    path = tmp_path / f"bomb.tar.{suffix}"
    path.write_bytes(packed(ENCODERS[suffix](), 200, ovfkit.header("zeroes", 200 * MIB)))
    assert path.stat().st_size < 2 * MIB
    status, text, peak = peak_of("convert", path, tmp_path / "out.tar", cwd=tmp_path)
    assert peak < 256 * MIB, f"{peak // MIB} MiB: {text}"
    assert "Traceback" not in text
    if suffix != "gz":  # what deflate can do at most is below the limit
        assert status == 1, text
        assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("codec", ["deflate", "zstd", "zlib grain"])
def test_a_unit_that_expands_without_end(codec: str, tmp_path: Path) -> None:
    size = 1 << 16
    if codec == "zlib grain":
        made = vmdkmade.Stream(128, {0: b"x"}, text=vmdkmade.words(['RW 128 SPARSE "a"'], "streamOptimized"))
        bomb = packed(zlib.compressobj(9), 128)
        made.packed = lambda _: vmdkmade.sectors(struct.pack("<QI", 0, len(bomb)) + bomb)
        path = tmp_path / "a.vmdk"
        path.write_bytes(made.build())
    else:
        bomb = packed(zlib.compressobj(9, zlib.DEFLATED, -12) if codec == "deflate" else ENCODERS["zst"](), 64)
        entry = qcow2.packed_entry(32 * size, min(len(bomb), size), 16)
        more = {} if codec == "deflate" else {"features": (8, 0, 0), "compression": 1}
        path = qcow2.handmade(tmp_path / "a.qcow2", size, {0: entry}, {32 * size: bomb}, **more)
    status, text, peak = peak_of("convert", "-O", "raw", path, tmp_path / "out.raw", cwd=tmp_path)
    assert status == 1, text
    assert peak < 128 * MIB, f"{peak // MIB} MiB"
    assert not (tmp_path / "out.raw").exists()


def huge_vdi(folder: Path) -> Path:
    vdi.vdi(folder / "a.vdi", 4 * MIB, [data("v", MIB)] * 4)
    patch(folder / "a.vdi", 0x170, struct.pack("<QIII", 1 << 52, MIB, 0, 0xFFFFFFFF))
    return folder / "a.vdi"


def huge_qcow2(folder: Path) -> Path:
    path = qcow2.handmade(folder / "a.qcow2", MIB, {}, {})
    patch(path, 36, struct.pack(">I", 0x7FFFFFFF))
    patch(path, 24, struct.pack(">Q", 1 << 60))
    return path


def huge_snapshots(folder: Path) -> Path:
    path = qcow2.handmade(folder / "a.qcow2", MIB, {}, {})
    patch(path, 60, struct.pack(">IQ", 0xFFFFFFFF, 1 << 16))
    return path


def huge_vmdk(folder: Path) -> Path:
    path = folder / "a.vmdk"
    path.write_bytes(Hosted(128, {0: b"x"}, text=vmdkmade.words(['RW 128 SPARSE "a.vmdk"'])).build())
    patch(path, 12, struct.pack("<Q", 1 << 54))
    return path


def huge_vhdx(folder: Path) -> Path:
    """A sparse file of 4 TiB whose log claims 3 GiB."""
    made = Made(MIB, {}, header={"log": vhdxmade.LOG, "log_length": 3 << 30, "log_at": 8 * MIB})
    path = folder / "a.vhdx"
    path.write_bytes(made.build())
    os.truncate(path, 1 << 42)
    return path


def sparse_tables(folder: Path) -> Path:
    """A file of holes, 64 TiB by its header, its L1 table all there: nothing but zeroes."""
    path = qcow2.handmade(folder / "a.qcow2", MIB, {}, {})
    patch(path, 24, struct.pack(">Q", 1 << 50))
    patch(path, 36, struct.pack(">I", 1 << 21))
    patch(path, 40, struct.pack(">Q", 1 << 30))
    os.truncate(path, 1 << 40)
    return path


def patch(path: Path, offset: int, piece: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(piece)


def huge_zeroes(folder: Path) -> Path:
    return vmdkmade.descriptor(folder / "a.vmdk", ["RW 4503599627370496 ZERO"], "custom")


HUGE = [huge_zeroes, huge_vdi, huge_qcow2, huge_snapshots, huge_vmdk, huge_vhdx, sparse_tables]
VERBS = ["check", pytest.param("info", marks=pytest.mark.slow), pytest.param("map", marks=pytest.mark.slow)]


@pytest.mark.parametrize("make", HUGE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_huge_claims_cost_little(make: Callable[[Path], Path], verb: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    begun = time.monotonic()
    status, text, peak = peak_of(verb, path, cwd=tmp_path)
    assert status in {0, 1, 3}
    assert "Traceback" not in text
    assert peak < 256 * MIB, f"{peak // MIB} MiB"
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("words", [("convert", "-O", "raw"), ("measure", "-O", "raw"), ("digest",)])
def test_a_disk_beyond_every_real_one_is_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    target = [tmp_path / "out.raw"] if words[0] == "convert" else []
    status, text, peak = peak_of(*words, huge_zeroes(tmp_path), *target, cwd=tmp_path)
    assert status == 1
    assert "virtual_size" in text
    assert peak < 128 * MIB


def test_the_limits_of_the_documents_are_those_of_the_code() -> None:
    from diskmorph.formats.limits import Limits

    text = (ROOT / "docs/limits.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text, re.MULTILINE))
    for name, value in rows.items():
        number, _, unit = value.replace(",", "").partition(" ")
        assert getattr(Limits(), name) == int(number) * {"": 1, "MiB": MIB, "PiB": 1 << 50}[unit], name
    assert set(rows) == set(Limits.__slots__)
