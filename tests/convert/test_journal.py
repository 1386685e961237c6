"""Changes in place that fail or break off: undone at once, or told until they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from clikit import dm

import diskmorph
from diskmorph.convert import check as checking
from diskmorph.convert.journal import JOURNAL
from diskmorph.formats.errors import FormatError, IntegrityError, PolicyError, TargetError
from diskmorph.formats.registry import open_disk

from testkit import MIB, content, data, run

FORMATS = ["raw", "qcow2", "vdi", "vhdx", "vhd"]
DYING = """
import os, sys
import diskmorph
real, left = os.pwrite, int(sys.argv[2])

def dying(*words):
    global left
    if not left:
        os._exit(9)
    left -= 1
    return real(*words)

os.pwrite = dying
diskmorph.resize(sys.argv[1], 40 << 20)
"""


def made(folder: Path, kind: str) -> Path:
    (folder / "in.raw").write_bytes(data("journal", MIB) + bytes(3 * MIB) + data("end", MIB))
    image = folder / f"a.{kind}"
    dm("convert", *(("-o", "subformat=fixed") if kind == "vhd" else ()), folder / "in.raw", image).ok()
    return image


def journal(image: Path) -> Path:
    return image.with_name(image.name + JOURNAL)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_what_fails_is_undone(kind: str, failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = made(tmp_path, kind)
    before = image.read_bytes()
    real, calls = os.pwrite, 0

    def faulty(fd: int, part: bytes, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        return real(fd, part, at)

    monkeypatch.setattr(os, "pwrite", faulty)
    try:
        diskmorph.resize(image, 40 * MIB)
    except TargetError as error:
        assert "as it was" in str(error)
        assert image.read_bytes() == before
    else:
        assert calls < failing
    assert not journal(image).exists()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_what_breaks_off_is_told_until_it_is_undone(kind: str, written: int, tmp_path: Path) -> None:
    image = made(tmp_path, kind)
    before = image.read_bytes()
    done = subprocess.run([sys.executable, "-c", DYING, image, str(written)], check=False)
    if done.returncode == 0:
        assert not journal(image).exists()
        return
    assert done.returncode == 9
    assert dm("check", image).status == 3
    assert "broken off" in dm("check", image).out
    assert "broken off" in dm("info", image).err
    assert "broken off" in dm("convert", image, tmp_path / "out.qcow2").err
    refused = dm("resize", image, "50M")
    assert refused.status == 1 and "--repair undo" in refused.err
    undone = dm("check", "--repair", "undo", image)
    assert undone.status == 0 and "put back" in undone.out
    assert image.read_bytes() == before
    assert not journal(image).exists()
    diskmorph.resize(image, 40 * MIB)
    with open_disk(image) as disk:
        assert content(disk) == (tmp_path / "in.raw").read_bytes() + bytes(35 * MIB)


def leaky(folder: Path) -> Path:
    image = folder / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
    run("qemu-io", "-c", "write -P 7 0 1M", image)
    with image.open("r+b") as file:  # the second L2 entry forgets its cluster
        file.seek(4 * 65536 + 8)
        file.write(bytes(8))
    return image


def test_an_earlier_journal_stays_and_undoes(tmp_path: Path) -> None:
    image = leaky(tmp_path)
    before = image.read_bytes()
    assert dm("check", "--repair", "leaks", image).status == 0
    kept = journal(image).read_bytes()
    diskmorph.resize(image, 40 * MIB)
    assert journal(image).read_bytes() == kept
    diskmorph.check(image, repair="undo")
    assert image.read_bytes()[65536 : 65536 * 4] == before[65536 : 65536 * 4]
    assert not journal(image).exists()


def test_what_was_changed_since_is_not_undone(tmp_path: Path) -> None:
    image = leaky(tmp_path)
    assert dm("check", "--repair", "leaks", image).status == 0
    run("qemu-io", "-c", "write -P 9 2M 1M", image)
    before = image.read_bytes()
    with pytest.raises(IntegrityError, match="changed since"):
        diskmorph.check(image, repair="undo")
    assert image.read_bytes() == before


def test_another_image_of_that_name_is_not_undone(tmp_path: Path) -> None:
    image = made(tmp_path, "vdi")
    subprocess.run([sys.executable, "-c", DYING, image, "1"], check=False)
    (tmp_path / "in.raw").write_bytes(data("other", 5 * MIB))
    dm("convert", "--force", tmp_path / "in.raw", image).ok()
    before = image.read_bytes()
    with pytest.raises(IntegrityError, match="changed since"):
        diskmorph.check(image, repair="undo")
    assert image.read_bytes() == before


UNDOING = DYING.replace("diskmorph.resize(sys.argv[1], 40 << 20)", 'diskmorph.check(sys.argv[1], repair="undo")')


@pytest.mark.parametrize("written", [0, 1])
def test_an_undo_that_breaks_off_is_undone_again(written: int, tmp_path: Path) -> None:
    image = leaky(tmp_path)
    with image.open("r+b") as file:  # two places to mend: a leaked cluster, and a flag
        file.seek(4 * 65536 + 16)
        file.write(bytes(1))
    before = image.read_bytes()
    assert diskmorph.check(image, repair="all").repaired
    assert subprocess.run([sys.executable, "-c", UNDOING, image, str(written)], check=False).returncode == 9
    assert dm("check", image).status == 3
    assert diskmorph.check(image, repair="undo").corruptions
    assert image.read_bytes() == before
    assert not journal(image).exists()


def test_a_journal_goes_along_with_a_renamed_image(tmp_path: Path) -> None:
    image = leaky(tmp_path)
    assert dm("check", "--repair", "leaks", image).status == 0
    os.rename(journal(image), journal(tmp_path / "b.qcow2"))
    assert diskmorph.check(image.rename(tmp_path / "b.qcow2"), repair="undo").leaks


def test_repairs_are_undone_last_first(tmp_path: Path) -> None:
    image = leaky(tmp_path)
    states = [image.read_bytes()]
    for bent in (5, 6):
        assert dm("check", "--repair", "leaks", image).status == 0
        with image.open("r+b") as file:
            file.seek(4 * 65536 + 8 * bent)
            file.write(bytes(8))
        states.append(image.read_bytes())
    assert dm("check", "--repair", "leaks", image).status == 0
    assert diskmorph.check(image, repair="undo").leaks
    assert image.read_bytes() == states[2]
    for _ in range(2):
        diskmorph.check(image, repair="undo")
    assert not journal(image).exists()
    with pytest.raises(FormatError, match="no journal"):
        diskmorph.check(image, repair="undo")


@pytest.mark.parametrize(
    "bent",
    [b"", b"{}\n", b"nonsense\n", b"[]\n", b'{"repair": "all"}\n', b'{"repair": "x", "file": "b", "size": 1, "after": 1}\n',
     b'{"repair": "x", "file": "a.raw", "size": -1, "after": 1}\n',
     b'{"repair": "x", "file": "a.raw", "size": 9, "after": 9}\n{"offset": -1, "new": "00", "old": "00"}\n',
     b'{"repair": "x", "file": "a.raw", "size": 9, "after": 9}\n{"offset": 0, "new": "00", "old": "0"}\n',
     b'{"repair": "x", "file": "a.raw", "size": 9, "after": 9}\n{"offset": 0, "new": "00", "old": 7}\n'],
)  # fmt: skip
def test_a_journal_that_is_none_undoes_nothing(bent: bytes, tmp_path: Path) -> None:
    image = made(tmp_path, "raw")
    before = image.read_bytes()
    journal(image).write_bytes(bent)
    done = dm("check", "--repair", "undo", image)
    assert done.status == 1 and "journal" in done.err
    assert image.read_bytes() == before


def test_a_journal_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    image = made(tmp_path, "qcow2")
    before = image.read_bytes()
    os.mkfifo(journal(image))
    with pytest.raises(TargetError, match="journal"):
        diskmorph.resize(image, 40 * MIB)
    journal(image).unlink()
    journal(image).symlink_to(tmp_path / "in.raw")
    with pytest.raises(TargetError, match="journal"):
        diskmorph.resize(image, 40 * MIB)
    assert image.read_bytes() == before


def test_by_way_of_a_link_the_journal_lies_beside_the_image(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    image, link = leaky(tmp_path / "real"), tmp_path / "link.qcow2"
    link.symlink_to(image)
    found = diskmorph.check(link, repair="leaks")
    assert found.journal == str(journal(image))
    assert journal(image).exists()
    assert diskmorph.check(link, repair="undo").leaks


def test_a_copy_is_judged_by_the_image_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the journal tells is no corruption that a repair might leave another one for."""
    image, seen = leaky(tmp_path), []
    journal(image).write_bytes(b'{"unfinished": true}\n')
    plan = checking.plan_repair
    monkeypatch.setattr(checking, "plan_repair", lambda *words: seen.append(words[-1].corruptions) or plan(*words))
    assert diskmorph.check(image, repair="leaks", output=tmp_path / "b.qcow2").clean
    assert seen == [0]


def test_undo_is_of_the_image_alone(tmp_path: Path) -> None:
    image = leaky(tmp_path)
    assert dm("check", "--repair", "undo", "-o", tmp_path / "b", image).status == 2
    assert dm("check", "--repair", "undo", "-U", image).status == 2
    with pytest.raises(PolicyError, match="broken off"):
        journal(image).write_bytes(b'{"unfinished": true}\n')
        diskmorph.check(image, repair="leaks")
