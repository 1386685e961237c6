"""Files that are no disks in themselves are refused by name instead of being read as raw; what is guessed is said."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from clikit import dm

from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.registry import identify
from diskmorph.formats.source import FileSource

from testkit import MIB, data, run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(path: Path | str) -> UnsupportedError:
    with FileSource(path) as source, pytest.raises(UnsupportedError) as caught:
        identify(source)
    return caught.value


def test_a_qed_image_is_no_raw_disk(here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qed", "q.qed", "16M")
    run("qemu-img", "create", "-q", "-f", "qed", "q.img", "16M")
    for words in (
        ["convert", "q.qed", "x.qcow2"],
        ["check", "q.qed"],
        ["digest", "q.img"],
        ["compare", "q.qed", "q.img"],
    ):
        done = dm(*words)
        assert done.status == 1 and "QED" in done.err and "-f raw" in done.err, done
    assert not Path("x.qcow2").exists()
    taken = dm("convert", "--json", "-f", "raw", "q.qed", "x.qcow2").ok().json
    assert taken["virtual_size"] == Path("q.qed").stat().st_size


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"MSWIM\0\0\0", "WIM"),
        (b"sprs\0\0\0\3", "sparse image"),
        (b"\x3a\xff\x26\xed\1\0", "Android"),
        (b"OOOM\0\0\0\2", "COW"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"<?xml version='1.0'?>\n<Parallels_disk_image Version='1.0'>", "Parallels"),
    ],
)
def test_marks(head: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(head + bytes(4096))
    error = refused(path)
    assert word in error.problem and "-f raw" in str(error.hint)


def test_a_boot_sector_makes_it_a_disk(tmp_path: Path) -> None:
    """A partitioned disk stays one, whatever boot code stands before its table."""
    path = tmp_path / "disk.img"
    run("truncate", "-s", "8M", path)
    run("sh", "-c", f"echo start=2048,type=83 | sfdisk -q {path}")
    with path.open("r+b") as file:
        file.write(b"QED\0")
    with FileSource(path) as source:
        assert identify(source)[0].name == "raw"


def test_archives_are_no_disks_but_can_be_built(here: Path) -> None:
    with tarfile.open("da.tar", "w") as archive:
        member = tarfile.TarInfo("manifest.json")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"[]"))
    done = dm("convert", "da.tar", "da.qcow2")
    assert done.status == 1 and "tar" in done.err and "diskmorph build" in done.err
    with zipfile.ZipFile("disk.img", "w") as archive:
        archive.writestr("a", b"b")
    assert "zip" in refused("disk.img").problem


def notes_of(name: str) -> list[str]:
    done = dm("convert", "--json", "--dry-run", name, "x.qcow2").ok()
    found: list[str] = json.loads(done.out)["notes"]
    return found


def test_a_guess_is_said(here: Path) -> None:
    Path("odd.img").write_bytes(data("odd", MIB))
    assert notes_of("odd.img") == ["nothing is known at the beginning of odd.img: read as a raw disk"]
    assert "nothing is known" in dm("convert", "odd.img", "odd.qcow2").ok().err
    assert "nothing is known" not in dm("convert", "-f", "raw", "odd.img", "b.qcow2").ok().err
    with Path("odd.img").open("rb") as file:
        command = ["-m", "diskmorph", "convert", "-O", "qcow2", "-", "c.qcow2"]
        done = subprocess.run([sys.executable, *command], stdin=file, capture_output=True, text=True, check=True)
    assert "nothing is known" in done.stderr


def test_no_guess_is_said_of_what_is_known_or_empty(here: Path) -> None:
    run("truncate", "-s", "8M", "empty.img")
    run("mke2fs", "-q", "fs.img", "4096k")
    Path("boot.img").write_bytes(data("boot", 510) + b"\x55\xaa" + bytes(MIB))
    run("truncate", "-s", "8M", "part.img")
    run("sh", "-c", "echo start=2048,type=83 | sfdisk -q part.img")
    for name in ("empty.img", "fs.img", "boot.img", "part.img"):
        assert notes_of(name) == [], name


def test_a_luks_volume_is_a_raw_disk_and_said(here: Path) -> None:
    Path("volume").write_bytes(b"LUKS\xba\xbe\0\1".ljust(MIB, b"\0"))
    (note,) = notes_of("volume")
    assert "LUKS" in note and "-f luks" in note
