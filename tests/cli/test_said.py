"""What is said of a run: notes, losses and hints that are true of it."""

from pathlib import Path

import pytest
from clikit import dm

import diskmorph

from testkit import KIB, MIB, data, run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.raw").write_bytes(data("said", MIB))


def test_a_size_that_is_rounded_up_is_said() -> None:
    Path("odd.raw").write_bytes(data("odd", 513))
    assert "513 to 1024 bytes" in dm("convert", "-f", "raw", "odd.raw", "odd.vmdk").ok().err
    assert dm("convert", "-f", "raw", "a.raw", "a.vmdk").ok().err == ""


def test_a_snapshot_that_is_taken_out_loses_no_other() -> None:
    run("qemu-img", "convert", "-O", "qcow2", "a.raw", "s.qcow2")
    for name in ("monday", "tuesday"):
        run("qemu-img", "snapshot", "-c", name, "s.qcow2")
    assert "lost" not in dm("snapshot", "s.qcow2", "--extract", "monday", "m.raw").ok().err
    assert "monday, tuesday" in dm("convert", "s.qcow2", "now.raw").ok().err


def chain() -> None:
    run("qemu-img", "convert", "-O", "qcow2", "a.raw", "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2")


def test_an_overlay_that_is_written_anew_is_not_flattened() -> None:
    chain()
    done = dm("rebase", "top.qcow2", "-b", "base.qcow2", "-o", "new.qcow2", "--allow-parent", ".").ok()
    assert "flattened" not in done.err
    assert "flattened" in dm("rebase", "top.qcow2", "--flatten", "-o", "one.qcow2", "--allow-parent", ".").ok().err


def test_the_hint_on_a_parent_of_a_parent_can_help() -> None:
    chain()
    done = dm("convert", "--backing", "mid.qcow2", "top.qcow2", "x.raw")
    assert done.status == 1 and "--allow-parent" in done.err and "--backing" not in done.err
    assert "--backing" in dm("convert", "top.qcow2", "x.raw").err


def test_a_missing_extent_names_the_image_that_wants_it() -> None:
    dm("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", "a.raw", "v.vmdk").ok()
    Path("v-flat.vmdk").unlink()
    done = dm("convert", "v.vmdk", "x.raw")
    assert done.status == 1 and done.err.startswith("diskmorph: v.vmdk: ") and "v-flat.vmdk" in done.err


def test_a_disk_without_a_file_system_makes_no_iso() -> None:
    done = dm("convert", "a.raw", "x.iso")
    assert done.status == 1 and "an ISO takes a tree" in done.err


def test_words_that_contradict_each_other_are_refused() -> None:
    done = dm("convert", "--compress", "deflate", "-o", "compression_type=zstd", "a.raw", "x.qcow2")
    assert done.status == 2 and "contradicts" in done.err
    dm("convert", "-c", "-o", "compression_type=zstd", "a.raw", "x.qcow2").ok()
    assert "one of luks" in dm("convert", "-o", "encrypt.format=aes", "a.raw", "y.qcow2").err


def test_kinds_of_extents_have_names() -> None:
    with open("a.raw", "r+b") as file:
        file.truncate(2 * MIB)
    with diskmorph.open_disk("a.raw") as disk:
        (batch,) = disk.extents()
    assert batch["kind"].tolist() == [diskmorph.DATA, diskmorph.HOLE] and batch["length"][0] % (4 * KIB) == 0
    assert (diskmorph.ZERO, diskmorph.ABSENT) == (1, 3)
