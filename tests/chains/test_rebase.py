"""Another parent by metadata alone, with qemu-img as a peer."""

import os
from pathlib import Path

import pytest
from clikit import dm

from diskmorph.formats.allocator import NewParent
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import OpenContext
from diskmorph.formats.vhdx import open_image
from diskmorph.formats.vhdx.rebase import parent_patches

from testkit import MIB, data, run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(kind: str, **words: str) -> None:
    """base, same (a copy with other identifiers), other (other content), top over base."""
    content = bytearray(4 * MIB)
    content[: 2 * MIB] = data("base", 2 * MIB)
    Path("base.raw").write_bytes(content)
    options = ["-o", ",".join(f"{k}={v}" for k, v in words.items())] if words else []
    dm("convert", "base.raw", f"base.{kind}", *options).ok()
    dm("convert", "base.raw", f"same-with-a-longer-name.{kind}").ok()
    content[MIB] ^= 1
    Path("other.raw").write_bytes(content)
    dm("convert", "other.raw", f"other.{kind}").ok()
    content[MIB] ^= 1
    content[4096:8192] = data("top", 4096)
    Path("top.raw").write_bytes(content)
    dm("convert", "top.raw", f"top.{kind}", "-B", f"base.{kind}", *options).ok()


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "vhd", "vhdx"])
def test_in_place(kind: str):
    make(kind)
    before = Path(f"top.{kind}").stat().st_size
    words = ("--backing", f"base.{kind}") if kind == "vdi" else ("--allow-parent", ".")
    done = dm("rebase", f"top.{kind}", "-b", f"other.{kind}", *words)
    assert done.status == 1 and "other content" in done.err and "--unsafe" in done.err
    said = dm("rebase", f"top.{kind}", "-b", f"same-with-a-longer-name.{kind}", *words, "--dry-run", "--json").ok().json
    assert said["compared"] and said["parent"] == f"same-with-a-longer-name.{kind}"
    kept = Path(f"top.{kind}").read_bytes()
    dm("rebase", f"top.{kind}", "-b", f"same-with-a-longer-name.{kind}", *words).ok()
    assert Path(f"top.{kind}").read_bytes() != kept and Path(f"top.{kind}").stat().st_size == before
    Path(f"base.{kind}").unlink()
    assert dm("compare", "top.raw", f"top.{kind}", "--allow-parent", ".").status == 0
    assert dm("check", f"top.{kind}").status == 0
    if kind in {"qcow2", "vmdk"}:  # the others' parents are not opened by qemu-img
        run("qemu-img", "compare", "-f", "raw", "-F", kind, "top.raw", f"top.{kind}")
    assert not [name for name in os.listdir() if "journal" in name]


def test_a_descriptor_of_its_own():
    make("vmdk", subformat="twoGbMaxExtentSparse")
    for name in ("same-with-a-longer-name.vmdk", "base.vmdk"):
        dm("rebase", "top.vmdk", "-b", name, "--allow-parent", ".").ok()
        assert dm("compare", "top.raw", "top.vmdk", "--allow-parent", ".").status == 0
        run("qemu-img", "compare", "-f", "raw", "-F", "vmdk", "top.raw", "top.vmdk")


def test_qcow2_keeps_its_other_extensions():
    make("qcow2")
    run("qemu-img", "bitmap", "--add", "top.qcow2", "b0")
    dm("rebase", "top.qcow2", "-b", "base.raw", "--unsafe").ok()
    said = dm("info", "top.qcow2", "--json", "--allow-parent", ".").ok().json
    assert said["bitmaps"] == ["b0"] and said["parent"] == {"names": ["base.raw"], "format": "raw", "expects": {}}
    run("qemu-img", "check", "top.qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "top.raw", "top.qcow2")


def test_unsafe_and_a_missing_parent():
    make("qcow2")
    Path("base.qcow2").rename("moved.qcow2")
    assert dm("rebase", "top.qcow2", "-b", "moved.qcow2", "--allow-parent", ".").status == 1
    dm("rebase", "top.qcow2", "-b", "moved.qcow2", "--unsafe").ok()
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "top.raw", "top.qcow2")


@pytest.mark.parametrize("kind", ["vhd", "vhdx", "qcow2"])
def test_written_anew(kind: str):
    make(kind)
    done = dm("rebase", f"top.{kind}", "-b", f"other.{kind}", "-o", f"new.{kind}", "--allow-parent", ".").ok()
    assert dm("compare", "top.raw", f"new.{kind}", "--allow-parent", ".").status == 0, done.err
    assert "other" in dm("info", f"new.{kind}", "--json", "--allow-parent", ".").ok().json["parent"]["names"][0]
    dm("rebase", f"top.{kind}", "--flatten", "-o", f"flat.{kind}", "--allow-parent", ".").ok()
    assert dm("info", f"flat.{kind}", "--json").ok().json["parent"] is None
    assert dm("compare", "top.raw", f"flat.{kind}").status == 0
    if kind != "qcow2":
        done = dm("rebase", f"top.{kind}", "-b", f"other.{kind}", "--allow-parent", ".")
        assert done.status == 1 and "-o FILE" in done.err


def test_bad_words():
    make("qcow2")
    for words in (
        ["top.qcow2"],
        ["top.qcow2", "--flatten"],
        ["top.qcow2", "--flatten", "-b", "base.qcow2", "-o", "x"],
        ["top.qcow2", "-b", "top.qcow2", "--unsafe"],
    ):
        assert dm("rebase", *words, "--allow-parent", ".").status == 2, words
    assert dm("rebase", "base.qcow2", "-b", "other.qcow2", "--unsafe").status == 1


@pytest.mark.parametrize("kind", ["vmdk", "vhdx"])
def test_a_name_that_is_not_utf_8_leaves_the_image_as_it_is(kind: str):
    make(kind)
    strange = os.fsdecode(b"caf\xe9.") + kind
    os.rename(f"other.{kind}", strange)
    kept = Path(f"top.{kind}").read_bytes()
    done = dm("rebase", f"top.{kind}", "-b", strange, "--unsafe", "--allow-parent", ".")
    assert done.status == 2 and "not UTF-8" in done.err
    assert Path(f"top.{kind}").read_bytes() == kept


def test_a_vhds_long_name_moves_the_footer():
    make("vhd")
    folder = Path("x" * 200, "y" * 200)
    folder.mkdir(parents=True)
    parent = folder / f"{'z' * 200}.vhd"
    Path("base.vhd").rename(parent)
    dm("rebase", "top.vhd", "-b", parent, "--unsafe", "--allow-parent", ".").ok()
    assert dm("compare", "top.raw", "top.vhd", "--allow-parent", ".").status == 0
    assert dm("check", "top.vhd").status == 0
    raw = Path("top.vhd").read_bytes()
    assert raw[-512:] == raw[:512]
    info = run("vhdiinfo", "top.vhd").stdout
    assert "z" * 100 in info


def test_a_vhdx_is_whole_wherever_it_breaks_off():
    make("vhdx")
    same = "same-with-a-longer-name.vhdx"
    before = Path("top.vhdx").read_bytes()
    opener = Opener(Parents(allow=(Path(),)), Limits())
    with opener.user_file(same) as source, open_image(source, OpenContext(opener, Limits())) as base:
        parent = NewParent(same, "vhdx", base.size, base.identity)
    with opener.user_file("top.vhdx") as source:
        patches = parent_patches(source, parent)
    assert sum(patch.sync for patch in patches) == 3
    found = []
    for count in range(len(patches) + 1):
        for torn in (False, True):
            image = bytearray(before)
            for number, patch in enumerate(patches[:count]):
                data = patch.data if not torn or number < count - 1 else patch.data[: len(patch.data) // 2]
                image[patch.offset : patch.offset + len(data)] = data
            Path("torn.vhdx").write_bytes(image)
            names = dm("info", "--json", "torn.vhdx").ok().json["parent"]["names"]
            assert names[0] in {"base.vhdx", same}, (count, torn)
            found.append(names[0])
            assert dm("compare", "top.raw", "torn.vhdx", "--allow-parent", ".").status == 0
    assert found == sorted(found)  # the old one, then the new one
    run("vhdiinfo", "torn.vhdx")
    assert dm("check", "torn.vhdx").status == 0


def test_a_vhdx_that_was_not_closed_is_left_alone():
    make("vhdx")
    opener = Opener(Parents(), Limits())
    with opener.user_file("base.vhdx") as source, open_image(source, OpenContext(opener, Limits())) as base:
        parent = NewParent("base.vhdx", "vhdx", base.size, base.identity)
    with opener.user_file("top.vhdx") as source:
        patches = parent_patches(source, parent)
    with Path("top.vhdx").open("r+b") as file:
        for patch in patches[:2]:
            file.seek(patch.offset)
            file.write(patch.data)
    done = dm("rebase", "top.vhdx", "-b", "base.vhdx", "--allow-parent", ".")
    assert done.status == 1 and "not closed" in done.err
