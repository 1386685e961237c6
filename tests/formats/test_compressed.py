"""Images compressed as one file: read by content, written by suffix, with xz, gzip, zstd and bzip2 as peers."""

import gzip
import lzma
import os
import tarfile
from pathlib import Path

import pytest
from clikit import dm

import diskmorph
from diskmorph.convert.options import ConvertOptions
from diskmorph.convert.wrappers import wrapper_of
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.extents import DATA
from diskmorph.formats.limits import Limits
from diskmorph.formats.probe import signatures
from diskmorph.formats.source import FileSource
from diskmorph.formats.views import Zero

from testkit import MIB, content, data, little_disk, run

TOOLS = {".gz": ("gzip", "gzip"), ".xz": ("xz", "xz"), ".zst": ("zstd", "zstd"), ".bz2": ("bzip2", "bzip2")}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.raw"
    path.write_bytes(content(little_disk()))
    return path


@pytest.mark.parametrize("suffix", TOOLS)
def test_read_what_the_tools_write(suffix: str, raw: Path):
    tool, codec = TOOLS[suffix]
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, "disk.qcow2")
    for name in ("disk.raw", "disk.qcow2"):
        run(tool, "-q", "-k", name)
        packed = Path(name + suffix)
        assert diskmorph.compare(raw, packed).identical
        said = dm("info", packed, "--json").ok().json
        assert said["format"] == Path(name).suffix[1:] and said["features"]["compressed_by"] == codec
        assert said["stored_size"] == packed.stat().st_size
        packed.rename("nameless")
        assert diskmorph.digest("nameless").digest == diskmorph.digest(raw).digest
    dm("convert", "nameless", "out.vmdk").ok()
    assert diskmorph.compare(raw, "out.vmdk").identical
    assert dm("check", "nameless").status == 0


@pytest.mark.parametrize("suffix", TOOLS)
@pytest.mark.parametrize("inner", ["raw", "qcow2"])
def test_write_what_the_tools_read(suffix: str, inner: str, raw: Path):
    tool, _ = TOOLS[suffix]
    dm("convert", raw, f"out.{inner}{suffix}", "--verify").ok()
    run(tool, "-t", f"out.{inner}{suffix}")
    run(tool, "-d", "-q", f"out.{inner}{suffix}")
    run("qemu-img", "compare", "-f", "raw", "-F", inner, raw, f"out.{inner}")
    assert diskmorph.compare(raw, f"out.{inner}").identical
    if inner == "raw":
        assert Path("out.raw").read_bytes() == raw.read_bytes()


def test_many_blocks_and_an_empty_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    payload = data("x", MIB)
    Path("big.raw").write_bytes(payload + bytes(20 * MIB) + payload)
    for suffix, (tool, _) in TOOLS.items():
        dm("convert", "big.raw", f"o.raw{suffix}").ok()
        run(tool, "-d", "-q", f"o.raw{suffix}")
        assert Path("o.raw").read_bytes() == Path("big.raw").read_bytes()
        Path("o.raw").unlink()
        diskmorph.convert(Zero(0), f"z.raw{suffix}")
        run(tool, "-d", "-q", f"z.raw{suffix}")
        assert Path("z.raw").read_bytes() == b""
        Path("z.raw").unlink()


def test_zeroes_become_holes(raw: Path):
    Path("h.raw").write_bytes(data("a", 4096) + bytes(5 * MIB) + data("b", 100))
    run("xz", "-q", "-0", "h.raw")
    with diskmorph.open_disk("h.raw.xz") as disk:
        stored = sum(int(batch["length"][batch["kind"] == DATA].sum()) for batch in disk.extents())
        assert disk.size == 4096 + 5 * MIB + 100 and stored < MIB


def test_names():
    assert [wrapper_of(name) for name in ("a.raw.xz", "A.IMG.GZ", "a.tar.gz", "a.qcow2", "a.zst")] == [
        ".xz", ".gz", None, None, ".zst",
    ]  # fmt: skip


def test_targets_round_the_inside_too(raw: Path):
    dm("convert", raw, "a.vhd.gz", "--for", "azure").ok()
    run("gzip", "-d", "a.vhd.gz")
    assert Path("a.vhd").stat().st_size % MIB == 512
    done = dm("convert", raw, "nothing.gz")
    assert done.status == 2 and "which format" in done.err
    assert dm("convert", raw, "a.raw.gz", "-B", raw).status == 2
    said = dm("convert", raw, "n.raw.xz", "--dry-run", "--json").ok().json
    assert said["stored_size"] > 0 and not Path("n.raw.xz").exists()
    before = sorted(os.listdir())
    assert dm("convert", raw, "n.vmdk.gz", "-o", "subformat=twoGbMaxExtentFlat").status == 2
    assert sorted(os.listdir()) == before


def test_the_same_bytes_again(raw: Path):
    for suffix in TOOLS:
        for name in ("one", "two"):
            dm("convert", raw, f"{name}.qcow2{suffix}", "--reproducible").ok()
        assert Path(f"one.qcow2{suffix}").read_bytes() == Path(f"two.qcow2{suffix}").read_bytes(), suffix


@pytest.mark.parametrize("suffix", TOOLS)
def test_damage_is_found(suffix: str, raw: Path):
    run(TOOLS[suffix][0], "-q", "-k", raw)
    whole = Path(f"disk.raw{suffix}").read_bytes()
    Path("cut").write_bytes(whole[: len(whole) - 20])
    with pytest.raises(FormatError):
        diskmorph.open_disk("cut", format="compressed")
    middle = bytearray(whole)
    middle[len(middle) // 2] ^= 0x55
    Path("bent").write_bytes(middle)
    with pytest.raises(FormatError):
        diskmorph.open_disk("bent", format="compressed")


@pytest.mark.parametrize("suffix", TOOLS)
@pytest.mark.parametrize("size", [16, 90_000])
def test_a_cut_file_is_told_as_cut(suffix: str, size: int, raw: Path):
    raw.write_bytes(data("cut", MIB))
    run(TOOLS[suffix][0], "-q", "-k", raw)
    path = Path(f"disk.raw{suffix}")
    os.truncate(path, size)
    with pytest.raises(FormatError, match=r"is cut off|is damaged"):
        diskmorph.open_disk(path)


def test_bombs_are_bounded(tmp_path: Path):
    path = tmp_path / "bomb.xz"
    path.write_bytes(lzma.compress(b"\1" * (80 * MIB), preset=0))
    with pytest.raises(FormatError, match="expands"):
        diskmorph.open_disk(path, limits=Limits(expansion=10))


def test_refused_in_place_and_as_parent(raw: Path):
    run("gzip", "-k", raw)
    for words in (
        ["resize", "disk.raw.gz", "20M"],
        ["convert", raw, "over.qcow2", "-B", "disk.raw.gz"],
        ["check", "disk.raw.gz", "--repair", "all"],
    ):
        done = dm(*words)
        assert done.status == 1 and "compressed" in done.err, (words, done.err)
    Path("twice.gz").write_bytes(gzip.compress(Path("disk.raw.gz").read_bytes()))
    with pytest.raises(UnsupportedError, match="twice"):
        diskmorph.open_disk("twice.gz")


def test_archives_and_ramdisks_are_no_disks(tmp_path: Path):
    (tmp_path / "etc").write_bytes(b"x")
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "etc", "etc")
    with FileSource(tmp_path / "t.tar.gz") as source:
        assert not [found for found in signatures(source) if found.outer]
    with pytest.raises(DiskmorphError):
        diskmorph.open_disk(tmp_path / "t.tar.gz")


@pytest.mark.parametrize("target", ["gcp", "vagrant-libvirt", "incus"])
def test_the_tarballs_of_clouds_are_read(target: str, raw: Path):
    dm("convert", raw, "box.tar.gz", "--for", target).ok()
    dm("convert", "box.tar.gz", "back.vdi").ok()
    assert diskmorph.compare(raw, "back.vdi").identical
    assert dm("info", "box.tar.gz", "--json").ok().json["format"] == ("raw" if target == "gcp" else "qcow2")


def test_a_tarball_without_a_disk(tmp_path: Path):
    (tmp_path / "m").write_bytes(b"{}")
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "m", "metadata.yaml")
    with pytest.raises(UnsupportedError, match=r"disk\.raw"):
        diskmorph.convert(tmp_path / "t.tar.gz", tmp_path / "x.raw", options=ConvertOptions())


@pytest.mark.parametrize("verb", ["info", "convert"])
def test_a_compressed_ova_is_told_as_what_it_is(tmp_path, verb):
    (tmp_path / "a.raw").write_bytes(b"content" * 4096)
    dm("convert", "-q", tmp_path / "a.raw", tmp_path / "vm.ova").ok()
    run("gzip", tmp_path / "vm.ova")
    words = [tmp_path / "out.qcow2"] if verb == "convert" else []
    done = dm(verb, tmp_path / "vm.ova.gz", *words)
    assert done.status == 1
    assert "archive of files" in done.err and "decompress" in done.err
