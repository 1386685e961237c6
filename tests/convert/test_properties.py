"""Random disks through every format, over chains and snapshots: what is read back is what was there."""

from __future__ import annotations

import itertools
import random
import tempfile
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diskmorph
from diskmorph.convert.buffers import meet
from diskmorph.convert.options import ConvertOptions
from diskmorph.convert.windows import CLONE, READ, SKIP, Grid, everything, regroup, windows
from diskmorph.formats.disk import Disk
from diskmorph.formats.extents import DATA, EXTENT, HOLE, ZERO, stops
from diskmorph.formats.views import Mapped, Memory, Zero

from testkit import MIB, content, pattern_disk, run

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
FORMATS = [
    ("raw", {}, None),
    ("qcow2", {}, None),
    ("qcow2", {"cluster_size": "512"}, None),
    ("qcow2", {"extended_l2": "on"}, None),
    ("qcow2", {}, "deflate"),
    ("qcow2", {}, "zstd"),
    ("qcow2", {"extended_l2": "on"}, "deflate"),
    ("vmdk", {}, None),
    ("vmdk", {"subformat": "streamOptimized"}, None),
    ("vdi", {}, None),
    ("vhd", {}, None),
    ("vhdx", {"block_size": "1M"}, None),
]


@st.composite
def disks(draw: st.DrawFn, most: int = 6 * MIB) -> Disk:
    """A disk of runs of data, text, zeroes in data, explicit zeroes and holes, of odd lengths."""
    size = draw(st.integers(1, most))
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    pieces: list[tuple[int, int, bytes | int]] = []
    at = 0
    for _ in range(draw(st.integers(0, 24))):
        at += rng.choice((0, 0, 512, 4096, rng.randrange(1, 300_000)))
        length = min(rng.choice((1, 512, 4096, 65536, rng.randrange(1, 400_000))), size - at)
        if length <= 0:
            break
        what = rng.choice((rng.randbytes(length), b"text %d " % at, bytes(length), ZERO, HOLE))
        pieces.append((at, length, what))
        at += length
    return pattern_disk(size, pieces)


def back(path: Path, size: int, **options: object) -> bytes:
    with diskmorph.open_disk(path, **options) as disk:  # type: ignore[arg-type]
        got = content(disk)
    assert not got[size:].strip(b"\0")
    return got[:size]


@QUICK
@given(disks(), st.sampled_from(FORMATS), st.sampled_from([0, 512, 4096, 65536]), st.integers(1, 3))
def test_any_disk(disk: Disk, kind: tuple[str, dict[str, str], str | None], zero_unit: int, threads: int) -> None:
    name, words, compress = kind
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, f"a.{name}")
        options = ConvertOptions(format_options=words, compress=compress, zero_unit=zero_unit, threads=threads)
        report = diskmorph.convert(disk, target, options=options)
        assert back(target, disk.size) == content(disk)
        assert report.bytes.total() == report.virtual_size
        assert diskmorph.compare(disk, target).identical
        assert diskmorph.digest(disk).digest == diskmorph.digest(Memory(content(disk))).digest


@QUICK
@given(disks(), disks(), st.sampled_from(["qcow2", "qcow2:deflate", "qcow2:zstd", "vmdk", "vhd", "vhdx"]))
def test_any_overlay(base: Disk, disk: Disk, kind: str) -> None:
    name, _, compress = kind.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        size = max(base.size, disk.size) // 512 * 512 + 512
        diskmorph.convert(base, Path(folder, f"base.{name}"), options=ConvertOptions(size=size))
        options = ConvertOptions(
            base=Path(folder, f"base.{name}"), size=size, compress=compress or None, verify=not compress
        )
        diskmorph.convert(disk, Path(folder, f"over.{name}"), options=options)
        got = back(Path(folder, f"over.{name}"), disk.size, parents=folder)
        assert got == content(disk)


@settings(QUICK, max_examples=8)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8), st.integers(0, 255)), max_size=5), st.integers(1, 3))
def test_any_chain_and_snapshot(writes: list[tuple[int, int, int]], layers: int) -> None:
    """qemu-io writes into layers and snapshots; both products read the same."""
    with tempfile.TemporaryDirectory() as folder:
        name = ""
        for layer in range(layers):
            parent, name = name, f"{layer}.qcow2"
            words = ["-b", parent, "-F", "qcow2"] if parent else []
            run("qemu-img", "create", "-q", "-f", "qcow2", *words, Path(folder, name), *([] if parent else ["2M"]))
            commands = [f"write -P {value} {at * 65536} {count * 7}k" for at, count, value in writes]
            commands += [f"write -z {layer * 65536} 4k"]
            flags = [word for command in commands for word in ("-c", command)]
            run("qemu-io", "-f", "qcow2", *flags, Path(folder, name))
            run("qemu-img", "snapshot", "-c", f"s{layer}", Path(folder, name))
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {layer + 1} 1M 100k", Path(folder, name))
        top = Path(folder, name)
        for snapshot in (None, f"s{layers - 1}"):
            want = Path(folder, "want.raw")
            words = ["-l", snapshot] if snapshot else []
            run("qemu-img", "convert", "-f", "qcow2", *words, "-O", "raw", top, want)
            options = ConvertOptions(snapshot=snapshot, parents=diskmorph.Parents.of(folder), force=True)
            diskmorph.convert(top, Path(folder, "got.raw"), options=options)
            assert Path(folder, "got.raw").read_bytes() == want.read_bytes()


@st.composite
def maps(draw: st.DrawFn) -> np.ndarray:
    lengths = draw(
        st.lists(st.sampled_from([1, 511, 512, 4096, 5000, 65536, 300_000, 5_000_000]), min_size=1, max_size=30)
    )
    rows = np.zeros(len(lengths), EXTENT)
    rows["length"] = lengths
    rows["start"] = np.cumsum(rows["length"]) - rows["length"]
    rows["kind"] = draw(st.lists(st.sampled_from([DATA, ZERO, HOLE]), min_size=len(lengths), max_size=len(lengths)))
    return rows


def slow_kinds(rows: np.ndarray, step: int) -> list[int]:
    size = int(stops(rows)[-1])
    rank = [HOLE] * -(-size // step)
    for wanted in (ZERO, DATA):
        for e in rows[rows["kind"] == wanted]:
            for cell in range(int(e["start"]) // step, -(-(int(e["start"]) + int(e["length"])) // step)):
                rank[cell] = wanted
    return rank


@QUICK
@given(maps(), st.sampled_from([512, 4096, 65536]))
def test_regroup(rows: np.ndarray, step: int) -> None:
    segments = regroup(rows, step, None)
    want = slow_kinds(rows, step)
    got = [int(s["kind"]) for s in segments for _ in range(-(-int(s["length"]) // step))]
    assert got == want
    assert (segments["mode"] == np.where(segments["kind"] == DATA, READ, SKIP)).all()


@QUICK
@given(maps(), st.sampled_from([512, 65536]))
def test_regroup_with_clones(rows: np.ndarray, step: int) -> None:
    clonable = (rows["kind"] == DATA) & (rows["length"] >= 65536)
    segments = regroup(rows, step, clonable)
    for segment in segments[segments["mode"] == CLONE]:
        start, stop = int(segment["start"]), int(segment["start"]) + int(segment["length"])
        assert start % 4096 == stop % 4096 == 0
        mine = rows[clonable & (rows["start"] < stop) & (stops(rows) > start)]
        assert int(mine["start"][0]) <= start
        assert stop <= int(stops(mine)[-1])
    assert int(segments["length"].sum()) == int(stops(rows)[-1])


@QUICK
@given(
    maps(),
    st.sampled_from([(512, 512), (65536, 65536), (65536, 2048), (2 * MIB, 512), (2 * MIB, 2 * MIB)]),
    st.sampled_from([0, 2 * MIB]),
    st.booleans(),
    st.sampled_from([1, 3, 1 << 16]),
)
def test_windows(rows: np.ndarray, sizes: tuple[int, int], stride: int, dense: bool, pieces: int) -> None:
    with mock.patch("diskmorph.convert.windows._PIECES", pieces):
        hold_windows(rows, *sizes, stride, dense)


def hold_windows(rows: np.ndarray, unit: int, step: int, stride: int, dense: bool) -> None:
    disk = Mapped(rows, [])
    capacity = max(MIB, unit)
    grid = Grid(disk.size, unit, step, capacity, max(step, 4096), stride)
    at = 0
    for window in everything(disk, grid) if dense else windows(disk, grid):
        assert window.start == at
        at = window.stop
        assert at % unit == 0 or at == disk.size
        assert window.read <= capacity
        assert int(window.segments["start"][0]) == window.start
        assert int(window.segments["length"].sum()) == window.stop - window.start
        assert int(window.rows["start"][0]) <= window.start
        assert int(stops(window.rows)[-1]) >= window.stop
    assert at == disk.size


@pytest.mark.parametrize("kind", [ZERO, DATA])
def test_windows_of_a_giant_take_little_memory(kind: int) -> None:
    """The pieces of a long run are cut as they are needed."""
    size = 1 << 58
    grid = Grid(size, 4096, 4096, 4 * MIB, 4096)
    tracemalloc.start()
    at = 0
    for window in itertools.islice(windows(Zero(size, kind=kind), grid), 70_000):
        assert window.start == at
        at = window.stop
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * MIB


@QUICK
@given(maps(), maps())
def test_meet(a: np.ndarray, b: np.ndarray) -> None:
    a, b = a[a["kind"] == DATA], b[b["kind"] == DATA]
    index_a, index_b, start, stop = meet(a["start"], stops(a), b["start"], stops(b))
    got = list(zip(index_a.tolist(), index_b.tolist(), start.tolist(), stop.tolist(), strict=True))
    want = [
        (i, j, max(int(x["start"]), int(y["start"])), min(int(stops(a)[i]), int(stops(b)[j])))
        for i, x in enumerate(a)
        for j, y in enumerate(b)
        if max(int(x["start"]), int(y["start"])) < min(int(stops(a)[i]), int(stops(b)[j]))
    ]
    assert got == want
