"""Trees to ISOs and ISOs to disks, judged by other products."""

import os
import struct
import tarfile

import pytest

import diskmorph
from diskmorph.formats.errors import DiskmorphError, OptionError, TargetError
from diskmorph.formats.gpt import read_table
from diskmorph.formats.iso import open_tree
from diskmorph.formats.source import FileSource

from testkit import data, run, sha256


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    (root / "boot").mkdir(parents=True)
    (root / "boot/loader.bin").write_bytes(data("loader", 4096))
    run("mkfs.vfat", "-C", root / "boot/efi.img", "2048")
    (root / "file").write_bytes(b"content")
    return root


def convert(source, target, **options):
    return diskmorph.convert(source, target, options=diskmorph.ConvertOptions(**options))


def test_a_directory_becomes_an_iso(tree, tmp_path):
    report = convert(tree, tmp_path / "t.iso", label="LABEL")
    assert report.format == "iso"
    assert report.bytes.total() == report.virtual_size == (tmp_path / "t.iso").stat().st_size
    assert run("isoinfo", "-R", "-x", "/file", "-i", tmp_path / "t.iso").stdout == "content"
    assert "LABEL" in run("isoinfo", "-d", "-i", tmp_path / "t.iso").stdout
    with pytest.raises(TargetError, match="--force"):
        convert(tree, tmp_path / "t.iso")


def test_options_are_checked(tree, tmp_path):
    for words in ({"boot": "none"}, {"nosuch": "1"}, {"uid": "x"}, {"joliet": "maybe"}):
        with pytest.raises(OptionError):
            convert(tree, tmp_path / "t.iso", format_options=words)
    with pytest.raises(OptionError):
        convert(tree, tmp_path / "t.iso", label="x" * 33)
    assert not (tmp_path / "t.iso").exists()


def test_a_seed_needs_its_files(tmp_path):
    seed = tmp_path / "seed"
    seed.mkdir()
    (seed / "user-data").write_text("#cloud-config\n")
    with pytest.raises(TargetError, match="meta-data"):
        convert(seed, tmp_path / "s.iso", label="cidata")
    (seed / "meta-data").write_text("instance-id: i\n")
    convert(seed, tmp_path / "s.iso", label="cidata", format_options={"uid": "0", "gid": "0"})
    for form in ("-R", "-J"):
        assert run("isoinfo", form, "-x", "/user-data", "-i", tmp_path / "s.iso").stdout == "#cloud-config\n"
    assert run("blkid", "-o", "value", "-s", "LABEL", tmp_path / "s.iso").stdout.strip() == "cidata"
    with pytest.raises(TargetError, match="meta_data"):
        convert(seed, tmp_path / "c.iso", label="config-2")


def test_reproducible_isos_are_equal(tree, tmp_path, monkeypatch):
    (tmp_path / "mbr").write_bytes(b"code")
    words = {"boot": "boot/loader.bin", "efi": "boot/efi.img", "hybrid": str(tmp_path / "mbr")}
    for name in ("a", "b"):
        convert(tree, tmp_path / f"{name}.iso", reproducible=True, format_options=words)
    assert sha256(tmp_path / "a.iso") == sha256(tmp_path / "b.iso")


def test_a_hybrid_is_a_disk_that_sgdisk_accepts_and_passes_as_it_is(tree, tmp_path):
    (tmp_path / "mbr").write_bytes(b"code")
    words = {"boot": "boot/loader.bin", "efi": "boot/efi.img", "hybrid": str(tmp_path / "mbr")}
    convert(tree, tmp_path / "h.iso", format_options=words)
    assert "No problems found" in run("sgdisk", "-v", tmp_path / "h.iso").stdout
    head = (tmp_path / "h.iso").read_bytes()[:512]
    assert head[:4] == b"code"
    starts = [struct.unpack_from("<I", head, 446 + 16 * i + 8)[0] for i in range(4) if head[446 + 16 * i + 4] == 0xEF]
    assert len(starts) == 1
    with (tmp_path / "h.iso").open("rb") as file:
        file.seek(starts[0] * 512)
        assert file.read(2 << 20) == (tree / "boot/efi.img").read_bytes()
    convert(tmp_path / "h.iso", tmp_path / "h.raw")
    assert sha256(tmp_path / "h.iso") == sha256(tmp_path / "h.raw")
    (tmp_path / "mbr").write_bytes(bytes(433))
    with pytest.raises(OptionError, match="432"):
        convert(tree, tmp_path / "x.iso", format_options=words)


def test_another_iso_becomes_a_gpt_disk(tree, tmp_path):
    convert(tree, tmp_path / "p.iso", format_options={"boot": "boot/loader.bin", "efi": "boot/efi.img"})
    report = convert(tmp_path / "p.iso", tmp_path / "p.raw")
    assert any("GPT" in note for note in report.notes)
    assert "No problems found" in run("sgdisk", "-v", tmp_path / "p.raw").stdout
    with diskmorph.open_disk(tmp_path / "p.raw") as disk:
        table = read_table(disk)
        assert table is not None
        iso, esp = table.partitions
        assert disk.read(iso.start, iso.length) == (tmp_path / "p.iso").read_bytes()
        assert disk.read(esp.start, esp.length) == (tree / "boot/efi.img").read_bytes()
    convert(tmp_path / "p.iso", tmp_path / "same.raw", source_format="raw")
    assert sha256(tmp_path / "same.raw") == sha256(tmp_path / "p.iso")


def test_a_tar_becomes_an_iso(tree, tmp_path):
    run("tar", "-C", tree, "-czf", tmp_path / "t.tar.gz", ".")
    convert(tmp_path / "t.tar.gz", tmp_path / "t.iso")
    with FileSource(tmp_path / "t.iso") as source:
        node = open_tree(source).find("boot/efi.img")
        assert node is not None
        assert node.read() == (tree / "boot/efi.img").read_bytes()


@pytest.mark.parametrize(("mtime", "kept"), [(-60_000_000_000, -60_000_000_000), (10**12, 253_402_300_799)])
def test_times_of_far_years_leave_names_alone(tmp_path, mtime, kept):
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("lower case")
        member.mtime = mtime
        tar.addfile(member)
    convert(tmp_path / "t.tar", tmp_path / "t.iso", format_options={"joliet": "off"})
    with FileSource(tmp_path / "t.iso") as source, open_tree(source) as found:
        node = found.find("lower case")
        assert node is not None
        assert node.mtime // 1_000_000_000 == kept
    assert "lower case" in run("bsdtar", "-tf", tmp_path / "t.iso").stdout


def test_a_disk_does_not_become_an_iso(tmp_path):
    (tmp_path / "d.raw").write_bytes(bytes(4096))
    with pytest.raises(DiskmorphError):
        convert(tmp_path / "d.raw", tmp_path / "d.iso")
    assert not os.path.exists(tmp_path / "d.iso")
