"""The pipeline: what reaches the target, how it is counted, what is refused."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import diskmorph
from diskmorph.convert.options import ConvertOptions, Moved
from diskmorph.formats.disk import Disk
from diskmorph.formats.errors import (
    FormatError,
    IntegrityError,
    OptionError,
    PolicyError,
    SourceError,
    TargetError,
    UnsupportedError,
)
from diskmorph.formats.extents import DATA, HOLE, ZERO, row
from diskmorph.formats.registry import open_disk
from diskmorph.formats.views import Memory, Zero

from testkit import GIB, KIB, MIB, TIB, content, data, little_disk, pattern_disk, reads_as, run, sha256, write_image

TARGETS = [
    ("raw", {}, None),
    ("qcow2", {}, None),
    ("qcow2", {"compat": "0.10"}, None),
    ("qcow2", {"extended_l2": "on"}, None),
    ("qcow2", {"cluster_size": "512"}, None),
    ("qcow2", {"cluster_size": "2M"}, None),
    ("qcow2", {"preallocation": "metadata"}, None),
    ("qcow2", {"preallocation": "full"}, None),
    ("qcow2", {}, "deflate"),
    ("qcow2", {}, "zstd:1"),
    ("vmdk", {}, None),
    ("vmdk", {"subformat": "twoGbMaxExtentFlat"}, None),
    ("vmdk", {"subformat": "streamOptimized"}, None),
    ("vdi", {}, None),
    ("vdi", {"static": "on"}, None),
    ("vhd", {"subformat": "dynamic"}, None),
    ("vhd", {"subformat": "fixed"}, None),
    ("vhdx", {"subformat": "dynamic"}, None),
    ("vhdx", {"subformat": "dynamic", "block_size": "32M"}, None),
    ("vhdx", {"subformat": "fixed"}, None),
]
NAMES = [" ".join([f, *(f"{k}={v}" for k, v in o.items()), c or ""]).strip() for f, o, c in TARGETS]


def kinds(disk: Disk) -> dict[int, int]:
    """Bytes of a disk by kind."""
    total: dict[int, int] = {}
    for batch in disk.extents():
        for kind in np.unique(batch["kind"]).tolist():
            total[kind] = total.get(kind, 0) + int(batch["length"][batch["kind"] == kind].sum())
    return total


@pytest.mark.parametrize(("format", "options", "compress"), TARGETS, ids=NAMES)
@pytest.mark.parametrize("threads", [1, 3])
def test_content(format: str, options: dict[str, str], compress: str | None, threads: int, tmp_path: Path) -> None:
    disk = little_disk(seed=threads)
    target = tmp_path / f"disk.{format}"
    report = diskmorph.convert(
        disk, target, options=ConvertOptions(format_options=options, compress=compress, threads=threads)
    )
    reads_as(target, content(disk))
    assert report.bytes.total() == report.virtual_size
    assert report.stored_size == sum((tmp_path / name).stat().st_size for name in report.members)
    assert (report.bytes.encoded > 0) == (compress is not None or "streamOptimized" in options.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(report.members)


@pytest.mark.parametrize(("format", "options", "compress"), TARGETS, ids=NAMES)
def test_foretold(format: str, options: dict[str, str], compress: str | None, tmp_path: Path) -> None:
    disk = little_disk(seed=5)
    words = ConvertOptions(format_options=options, compress=compress)
    dry = diskmorph.convert(disk, tmp_path / f"disk.{format}", options=replace(words, dry_run=True))
    assert not list(tmp_path.iterdir())
    real = diskmorph.convert(disk, tmp_path / f"disk.{format}", options=words)
    assert (dry.stored_size, dry.bytes, dry.lost) == (real.stored_size, real.bytes, real.lost)
    measured = diskmorph.measure(disk, format, options=words)
    assert measured.exact == (len(real.members) == 1), "descriptors record the names of extents"
    assert real.stored_size <= measured.required <= real.stored_size + (0 if measured.exact else 1000)
    assert measured.fully_allocated >= max(real.stored_size, 0 if compress else disk.size)


@pytest.mark.parametrize("size", [1, 511, 513, 4097, 65536 * 3 + 7, 2 * MIB - 1])
@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx"])
def test_odd_sizes(format: str, size: int, tmp_path: Path) -> None:
    want = data(size, size)
    (tmp_path / "in.raw").write_bytes(want)
    report = diskmorph.convert(tmp_path / "in.raw", tmp_path / f"out.{format}")
    assert report.virtual_size >= size
    reads_as(tmp_path / f"out.{format}", want)


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk", "vdi", "vhdx"])
def test_empty_disk(format: str, tmp_path: Path) -> None:
    (tmp_path / "in.raw").touch()
    try:
        report = diskmorph.convert(tmp_path / "in.raw", tmp_path / f"out.{format}")
    except (OptionError, TargetError):
        assert not (tmp_path / f"out.{format}").exists()
        return
    assert report.bytes == Moved() or report.virtual_size


def test_kinds_stay_distinct(tmp_path: Path) -> None:
    disk = pattern_disk(
        8 * MIB, [(0, MIB, b"data"), (2 * MIB, MIB, ZERO), (4 * MIB, MIB, bytes(MIB)), (6 * MIB, MIB, data(1, MIB))]
    )
    diskmorph.convert(disk, tmp_path / "a.qcow2")
    with open_disk(tmp_path / "a.qcow2") as made:
        assert kinds(made) == {DATA: 2 * MIB, ZERO: 2 * MIB, HOLE: 4 * MIB}
    diskmorph.convert(
        tmp_path / "a.qcow2", tmp_path / "b.vhdx", options=ConvertOptions(format_options={"block_size": "1M"})
    )
    with open_disk(tmp_path / "b.vhdx") as made:
        assert kinds(made) == {DATA: 2 * MIB, ZERO: 2 * MIB, HOLE: 4 * MIB}


def test_one_byte_in_a_large_unit(tmp_path: Path) -> None:
    disk = pattern_disk(128 * MIB, [(70 * MIB + 5, 1, b"x"), (100 * MIB, MIB, bytes(MIB))])
    report = diskmorph.convert(disk, tmp_path / "a.vhdx", options=ConvertOptions(format_options={"block_size": "32M"}))
    assert report.bytes.copied == 32 * MIB
    assert (tmp_path / "a.vhdx").stat().st_blocks * 512 < 8 * MIB
    assert diskmorph.compare(disk, tmp_path / "a.vhdx").identical


def test_zeroes_are_found_or_kept(tmp_path: Path) -> None:
    disk = Memory(data(1, MIB) + bytes(6 * MIB) + data(2, MIB))
    allocated = {}
    for unit in (0, 4096, 64 * KIB, 16 * MIB):
        target = tmp_path / f"{unit}.raw"
        diskmorph.convert(disk, target, options=ConvertOptions(zero_unit=unit))
        assert target.read_bytes() == content(disk)
        allocated[unit] = target.stat().st_blocks * 512
    assert allocated[4096] == allocated[64 * KIB] < 3 * MIB
    assert allocated[0] >= 8 * MIB
    assert allocated[16 * MIB] >= 8 * MIB, "a zero run shorter than the unit counts as data"


def test_zero_unit_of_nothing_fills_holes(tmp_path: Path) -> None:
    diskmorph.convert(Zero(4 * MIB), tmp_path / "a.raw", options=ConvertOptions(zero_unit=0))
    assert (tmp_path / "a.raw").stat().st_blocks * 512 >= 4 * MIB
    diskmorph.convert(Zero(4 * MIB), tmp_path / "a.qcow2", options=ConvertOptions(zero_unit=0))
    with open_disk(tmp_path / "a.qcow2") as made:
        assert kinds(made) == {DATA: 4 * MIB}


@pytest.mark.parametrize("unit", [3, 100, 5000])
def test_zero_unit_is_a_power_of_two(unit: int, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="power of two"):
        diskmorph.convert(Zero(MIB), tmp_path / "a.raw", options=ConvertOptions(zero_unit=unit))


def test_fine_holes_survive_in_raw(tmp_path: Path) -> None:
    disk = Memory(b"".join(data(i, 4096) + bytes(4096) for i in range(64)))
    diskmorph.convert(disk, tmp_path / "a.raw")
    assert (tmp_path / "a.raw").stat().st_blocks * 512 <= 72 * 4096


def test_size(tmp_path: Path) -> None:
    disk = pattern_disk(8 * MIB, [(0, 5 * MIB, b"abc")])
    report = diskmorph.convert(disk, tmp_path / "a.qcow2", options=ConvertOptions(size=64 * MIB))
    assert report.virtual_size == 64 * MIB
    assert report.bytes.total() == 64 * MIB
    report = diskmorph.convert(disk, tmp_path / "b.qcow2", options=ConvertOptions(size=6 * MIB))
    assert report.virtual_size == 6 * MIB
    with pytest.raises(TargetError, match="beyond the size") as caught:
        diskmorph.convert(disk, tmp_path / "c.qcow2", options=ConvertOptions(size=4 * MIB))
    assert caught.value.offset == 4 * MIB
    assert not (tmp_path / "c.qcow2").exists()


def test_large_sparse_disk_is_quick(tmp_path: Path) -> None:
    disk = pattern_disk(2 * TIB, [(0, 4096, b"a"), (TIB + 12345 * 4096, 70000, b"b"), (2 * TIB - 512, 512, b"c")])
    report = diskmorph.convert(disk, tmp_path / "a.raw")
    assert report.seconds < 2
    report = diskmorph.convert(disk, tmp_path / "a.qcow2")
    assert report.seconds < 2
    assert diskmorph.compare(tmp_path / "a.raw", tmp_path / "a.qcow2").identical


def test_fragments(tmp_path: Path) -> None:
    pieces = [(i * 12288, 4096 if i % 3 else 8192, data(i % 7, 8192)) for i in range(3000)]
    disk = pattern_disk(3000 * 12288 + 512, [(a, n, b[:n]) for a, n, b in pieces])
    want = content(disk)
    for name in ("a.raw", "a.qcow2", "a.vmdk"):
        diskmorph.convert(disk, tmp_path / name)
        reads_as(tmp_path / name, want)


# --- targets


def test_existing_target(tmp_path: Path) -> None:
    target = tmp_path / "a.qcow2"
    target.write_bytes(b"precious")
    with pytest.raises(TargetError, match="--force"):
        diskmorph.convert(little_disk(), target)
    assert target.read_bytes() == b"precious"
    diskmorph.convert(little_disk(), target, options=ConvertOptions(force=True))
    reads_as(target, content(little_disk()))


def test_target_is_the_source(tmp_path: Path) -> None:
    source = tmp_path / "a.raw"
    write_image("raw", little_disk(2 * MIB), source)
    want = sha256(source)
    os.link(source, tmp_path / "hard.raw")
    (tmp_path / "soft.raw").symlink_to(source)
    for name in ("a.raw", "hard.raw"):
        with pytest.raises(TargetError, match="same file"):
            diskmorph.convert(source, tmp_path / name, options=ConvertOptions(force=True, target_format="qcow2"))
    diskmorph.convert(source, tmp_path / "soft.raw", options=ConvertOptions(force=True, target_format="qcow2"))
    assert sha256(source) == want
    assert not (tmp_path / "soft.raw").is_symlink()


def test_target_is_a_parent_of_the_source(tmp_path: Path) -> None:
    write_image("qcow2", little_disk(), tmp_path / "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    want = sha256(tmp_path / "base.qcow2")
    options = ConvertOptions(force=True, parents=diskmorph.Parents.of(tmp_path))
    with pytest.raises(TargetError, match="same file"):
        diskmorph.convert(tmp_path / "top.qcow2", tmp_path / "base.qcow2", options=options)
    with pytest.raises(PolicyError):
        diskmorph.convert(tmp_path / "top.qcow2", tmp_path / "x.raw")
    report = diskmorph.convert(tmp_path / "top.qcow2", tmp_path / "x.raw", options=options)
    assert sha256(tmp_path / "base.qcow2") == want
    assert any("flattened" in note for note in report.notes)


def test_format_of_the_target(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="-O FORMAT"):
        diskmorph.convert(Zero(MIB), tmp_path / "a.what")
    with pytest.raises(OptionError, match="unknown format"):
        diskmorph.convert(Zero(MIB), tmp_path / "a", options=ConvertOptions(target_format="what"))
    with pytest.raises(OptionError, match="not written"):
        diskmorph.convert(Zero(MIB), tmp_path / "a", options=ConvertOptions(target_format="parallels"))
    with pytest.raises(TargetError, match="nowhere"):
        diskmorph.convert(Zero(MIB), tmp_path / "nowhere" / "a.raw")
    assert not list(tmp_path.iterdir())


def test_compress_words(tmp_path: Path) -> None:
    for word in ("lz4", "deflate:10", "zstd:99", "zstd:x"):
        with pytest.raises(OptionError):
            diskmorph.convert(Zero(MIB), tmp_path / "a.qcow2", options=ConvertOptions(compress=word))
    report = diskmorph.convert(little_disk(), tmp_path / "a.vmdk", options=ConvertOptions(compress="default"))
    assert report.bytes.encoded > 0, "-c alone means streamOptimized"


@pytest.mark.parametrize("level", range(10))
def test_deflate_levels(level: int, tmp_path: Path) -> None:
    disk = Memory(b"".join(b"line %d of a text that compresses\n" % i for i in range(20000)))
    target = tmp_path / "a.qcow2"
    diskmorph.convert(disk, target, options=ConvertOptions(compress=f"deflate:{level}"))
    (tmp_path / "a.raw").write_bytes(content(disk))
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "a.raw", target)


def test_incompressible_units_are_stored_plain(tmp_path: Path) -> None:
    disk = Memory(data(1, MIB) + b"text" * (MIB // 4))
    report = diskmorph.convert(disk, tmp_path / "a.qcow2", options=ConvertOptions(compress="deflate"))
    assert (report.bytes.copied, report.bytes.encoded) == (MIB, MIB)


# --- losses, notes, snapshots


def test_losses(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", image)
    run("qemu-img", "snapshot", "-c", "monday", image)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 1M", image)
    run("qemu-img", "bitmap", "--add", image, "b0")
    report = diskmorph.convert(image, tmp_path / "a.vmdk")
    assert any("monday" in word for word in report.lost)
    assert any("b0" in word for word in report.lost)
    diskmorph.convert(image, tmp_path / "old.raw", options=ConvertOptions(snapshot="monday"))
    assert (tmp_path / "old.raw").read_bytes() == b"\1" * MIB + bytes(3 * MIB)


def test_sector_size_is_told(tmp_path: Path) -> None:
    disk = Zero(8 * MIB, sector_size=4096)
    assert any("sector" in word for word in diskmorph.convert(disk, tmp_path / "a.qcow2").lost)
    assert any("sector" in word for word in diskmorph.convert(disk, tmp_path / "a.raw").lost)
    assert not diskmorph.convert(disk, tmp_path / "a.vhdx").lost
    with open_disk(tmp_path / "a.vhdx") as made:
        assert made.sector_size == 4096


def test_two_formats_at_once(tmp_path: Path) -> None:
    image = tmp_path / "both.img"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    run("qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size=on", tmp_path / "f.vhd", "1M")
    os.truncate(image, 512 * KIB)
    with image.open("ab") as file:
        file.write((tmp_path / "f.vhd").read_bytes()[-512:])
    report = diskmorph.convert(image, tmp_path / "o.raw")
    assert any("VHD" in note for note in report.notes)


# --- verify, digest, reproducible


@pytest.mark.parametrize(("format", "options", "compress"), TARGETS, ids=NAMES)
def test_verify_and_digest(format: str, options: dict[str, str], compress: str | None, tmp_path: Path) -> None:
    write_image("raw", little_disk(), tmp_path / "in.raw")
    report = diskmorph.convert(
        tmp_path / "in.raw",
        tmp_path / f"out.{format}",
        options=ConvertOptions(format_options=options, compress=compress, verify=True, digest=True),
    )
    assert report.verified
    assert report.digest == sha256(tmp_path / "in.raw")


def test_verify_finds_a_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diskmorph.formats.output import FileMember

    write = FileMember.write

    def lie(self: FileMember, offset: int, data: bytes) -> None:
        write(self, offset, bytes(len(data)) if len(data) > 100000 else data)

    monkeypatch.setattr(FileMember, "write", lie)
    with pytest.raises(IntegrityError, match="read back"):
        diskmorph.convert(Memory(data(1, 4 * MIB)), tmp_path / "a.qcow2", options=ConvertOptions(verify=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "options", "compress"), TARGETS, ids=NAMES)
def test_reproducible(format: str, options: dict[str, str], compress: str | None, tmp_path: Path) -> None:
    disk = little_disk()
    (tmp_path / "dense.raw").write_bytes(content(disk))
    hashes = []
    words = ConvertOptions(format_options=options, compress=compress, reproducible=True)
    for turn, source in enumerate((disk, tmp_path / "dense.raw")):
        folder = tmp_path / str(turn)
        folder.mkdir()
        diskmorph.convert(source, folder / f"disk.{format}", options=replace(words, threads=1 + turn))
        hashes.append({p.name: sha256(p) for p in folder.iterdir()})
    assert hashes[0] == hashes[1]


def test_source_that_changes(tmp_path: Path) -> None:
    source = tmp_path / "a.raw"
    source.write_bytes(data(1, 8 * MIB))

    def touch(progress: object) -> None:
        os.utime(source)

    with pytest.raises(IntegrityError, match="changed"):
        diskmorph.convert(source, tmp_path / "b.qcow2", on_progress=touch)
    assert not (tmp_path / "b.qcow2").exists()


# --- progress, rate, streams, profiles, errors of workers


def test_progress(tmp_path: Path) -> None:
    seen: list[diskmorph.Progress] = []
    diskmorph.convert(little_disk(), tmp_path / "a.qcow2", on_progress=seen.append)
    assert seen[0].done == 0
    assert seen[-1].done == seen[-1].total == little_disk().size
    assert [p.done for p in seen] == sorted(p.done for p in seen)


def test_rate(tmp_path: Path) -> None:
    report = diskmorph.convert(Memory(data(1, 2 * MIB)), tmp_path / "a.raw", options=ConvertOptions(rate=2 * MIB))
    assert 0.7 < report.seconds < 3


def test_interrupt_in_a_slow_run(tmp_path: Path) -> None:
    def interrupt(progress: diskmorph.Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        diskmorph.convert(
            Memory(data(1, 32 * MIB)), tmp_path / "a.qcow2", options=ConvertOptions(rate=4 * MIB), on_progress=interrupt
        )
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == before


def test_standard_streams(tmp_path: Path) -> None:
    write_image("raw", little_disk(), tmp_path / "in.raw")
    script = "import sys, diskmorph; diskmorph.convert(sys.argv[1], sys.argv[2], options=diskmorph.ConvertOptions({}))"
    for words, name in (
        ("target_format='raw'", "out.raw"),
        ("target_format='vmdk', format_options={'subformat': 'streamOptimized'}", "out.vmdk"),
        ("target_format='vhd', format_options={'subformat': 'fixed'}", "out.vhd"),
    ):
        command = f'{sys.executable} -c "{script.format(words)}" {tmp_path}/in.raw - > {tmp_path}/{name}'
        run("sh", "-c", command)
        reads_as(tmp_path / name, content(little_disk()))
        command = f'cat {tmp_path}/{name} | {sys.executable} -c "{script.format("force=True")}" - {tmp_path}/b.vdi'
        run("sh", "-c", command)
        reads_as(tmp_path / "b.vdi", content(little_disk()))
    with pytest.raises(UnsupportedError, match="standard output"):
        diskmorph.convert(tmp_path / "in.raw", "-", options=ConvertOptions(target_format="qcow2"))


@pytest.mark.parametrize("name", ["azure", "gcp", "aws", "openstack", "esxi", "virtualbox", "hyperv", "proxmox"])
def test_profiles(name: str, tmp_path: Path) -> None:
    disk = little_disk()
    report = diskmorph.convert(
        disk, tmp_path / "disk", options=ConvertOptions(profile=name, target_format="raw" if name == "gcp" else None)
    )
    assert diskmorph.compare(disk, tmp_path / "disk", formats=(None, report.format)).identical
    if name == "azure":
        assert (tmp_path / "disk").stat().st_size == 10 * MIB + 512
    if name == "gcp":
        assert (tmp_path / "disk").stat().st_size == GIB
    if name == "esxi":
        assert b'ddb.adapterType = "lsilogic"' in (tmp_path / "disk").read_bytes()[:4096]


def test_profiles_refuse_other_formats(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not take"):
        diskmorph.convert(Zero(MIB), tmp_path / "a.vdi", options=ConvertOptions(profile="azure", target_format="vdi"))
    with pytest.raises(OptionError, match="one of"):
        diskmorph.convert(Zero(MIB), tmp_path / "a.vdi", options=ConvertOptions(profile="moon"))


class Broken(Disk):
    """Fails when its middle is read."""

    size = 64 * MIB

    def _extents(self, start: int, stop: int):  # type: ignore[no-untyped-def]
        yield row(start, stop - start, DATA, offset=start)

    def __init__(self) -> None:
        from diskmorph.formats.source import BytesSource

        class Source(BytesSource):
            def pread(self, offset: int, buffer: memoryview) -> int:
                if offset > 32 * MIB:
                    raise SourceError("cannot be read", file="broken", offset=offset)
                buffer[:] = b"x" * len(buffer)
                return len(buffer)

        source = Source(b"")
        source.size = self.size
        self.files = (source,)


@pytest.mark.parametrize("compress", [None, "deflate"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_worker_that_fails(compress: str | None, threads: int, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="broken"):
        diskmorph.convert(Broken(), tmp_path / "a.qcow2", options=ConvertOptions(compress=compress, threads=threads))
    assert not list(tmp_path.iterdir())


def test_truncated_source(tmp_path: Path) -> None:
    diskmorph.convert(Memory(data(1, 4 * MIB)), tmp_path / "a.qcow2")
    os.truncate(tmp_path / "a.qcow2", 3 * MIB)
    with pytest.raises(FormatError, match="truncated"):
        diskmorph.convert(tmp_path / "a.qcow2", tmp_path / "b.raw")
    assert not (tmp_path / "b.raw").exists()
