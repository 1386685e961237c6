"""Chains kept: every format to every format, layer by layer, with qemu-img as a peer where it reads chains."""

import os
from pathlib import Path

import numpy as np
import pytest
from clikit import dm

import diskmorph
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.extents import ABSENT, DATA
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import OpenContext, identify, open_layers

from testkit import MIB, data, run

SIZE = 8 * MIB
FORMATS = ("qcow2", "vmdk", "vdi", "vhd", "vhdx")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def states() -> list[bytearray]:
    """Three states of one disk: data over data, zeroes over data, data where nothing was."""
    first = bytearray(SIZE)
    first[: 1 * MIB] = data("first", MIB)
    first[5 * MIB : 6 * MIB] = data("kept", MIB)
    second = bytearray(first)
    second[65536 : 65536 + 4096] = data("second", 4096)
    second[512 * 1024 : 600 * 1024] = bytes(88 * 1024)
    third = bytearray(second)
    third[65536:66048] = data("third", 512)
    third[7 * MIB : 7 * MIB + 100] = data("new", 100)
    return [first, second, third]


def make_chain(kind: str) -> Path:
    """The three states as a chain of `kind`, written one over the other; VDI names no parents."""
    for number, state in enumerate(states()):
        Path(f"{number}.raw").write_bytes(state)
        words = [] if not number else ["-B", f"s{number - 1}.{kind}", "--allow-parent", "."]
        dm("convert", f"{number}.raw", f"s{number}.{kind}", *words).ok()
    return Path(f"s2.{kind}")


def layers(path: Path, allow: str = "new"):
    opener = Opener(Parents.of(allow))
    source = opener.user_file(path)
    return open_layers(source, identify(source)[0], OpenContext(opener))


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_every_format_to_every_format(source: str, target: str):
    top = make_chain(source)
    Path("new").mkdir()
    said = dm("convert", top, f"new/t.{target}", "--keep-chain", "--allow-parent", ".", "--json").ok().json
    names = [f"t-0.{target}", f"t-1.{target}", f"t.{target}"]
    assert sorted(os.listdir("new")) == sorted(names) and said["virtual_size"] >= SIZE
    assert any("t-0" in note and "s0" in note for note in said["notes"])
    for number, name in enumerate(names):
        found = dm("compare", f"{number}.raw", f"new/{name}", "--allow-parent", "new")
        assert found.status == 0, (name, found.err, found.out)
    found = layers(Path(f"new/t.{target}"))
    assert [Path(layer.name).name for layer in found] == names[::-1]
    stored = sum(int(rows["length"][rows["kind"] == DATA].sum()) for rows in found[0].extents())
    assert stored < 3 * MIB and any(np.any(rows["kind"] == ABSENT) for rows in found[0].extents())
    if target in {"qcow2", "vmdk"}:
        run("qemu-img", "compare", "-f", target, "-F", "raw", f"new/t.{target}", "2.raw")
        run("qemu-img", "compare", "-f", target, "-F", "raw", f"new/t-1.{target}", "1.raw")
    for layer in found:
        layer.close()


def test_qemu_made_chain_with_layers_of_other_sizes_and_clusters():
    first, second, third = states()
    Path("base.raw").write_bytes(first[: 6 * MIB])
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.raw",
        "-F",
        "raw",
        "-o",
        "cluster_size=4k",
        "a.qcow2",
        "8M",
    )
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 7M 64k", "-c", "write -z 0 64k", "a.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "9M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 3M 1M", "b.qcow2")
    Path("new").mkdir()
    for target in FORMATS:
        words = ("--keep-chain", "--allow-parent", ".", "--force", "--verify")
        dm("convert", "b.qcow2", f"new/t.{target}", *words).ok()
        assert (
            dm("compare", "b.qcow2", f"new/t.{target}", "--allow-parent", ".", "--allow-parent", "new").status == 0
        ), target
    run("qemu-img", "compare", "b.qcow2", "new/t.qcow2")
    assert second != third


def test_internal_snapshots_become_layers():
    Path("disk.raw").write_bytes(states()[0])
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2")
    run("qemu-img", "snapshot", "-c", "monday", "disk.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 2M 128k", "disk.qcow2")
    run("qemu-img", "snapshot", "-c", "tuesday", "disk.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -z 0 64k", "disk.qcow2")
    Path("new").mkdir()
    done = dm("convert", "disk.qcow2", "new/t.vmdk", "--keep-chain").ok()
    assert "t-0.vmdk holds snapshot monday" in done.err and "lost" not in done.err
    for name, words in (("t-0", ("monday",)), ("t-1", ("tuesday",)), ("t", ())):
        dm("convert", "disk.qcow2", "one.raw", "--force", *(["--snapshot", *words] if words else [])).ok()
        run("qemu-img", "compare", "-f", "raw", "-F", "vmdk", "one.raw", f"new/{name}.vmdk")


def test_dry_runs_write_nothing_and_measure():
    top = make_chain("qcow2")
    before = sorted(os.listdir())
    for target in FORMATS:
        said = dm("convert", top, f"t.{target}", "--keep-chain", "--allow-parent", ".", "--dry-run", "--json").ok().json
        assert said["stored_size"] > 2 * MIB and len(said["members"]) == 3, target
    assert sorted(os.listdir()) == before


def test_failures_leave_nothing(monkeypatch: pytest.MonkeyPatch):
    top = make_chain("qcow2")
    Path("new").mkdir()
    Path("new/t.vmdk").write_bytes(b"mine")
    done = dm("convert", top, "new/t.vmdk", "--keep-chain", "--allow-parent", ".")
    assert done.status == 1 and "--force" in done.err
    assert os.listdir("new") == ["t.vmdk"] and Path("new/t.vmdk").read_bytes() == b"mine"
    assert dm("convert", top, "s2.qcow2", "--keep-chain", "--allow-parent", ".", "--force").status == 1
    for words in (["x.raw"], ["-", "-O", "qcow2"], ["x.vmdk", "--size", "20M"], ["x.vmdk", "--flatten"]):
        assert dm("convert", top, *words, "--keep-chain", "--allow-parent", ".").status == 2, words


def test_the_same_bytes_again():
    top = make_chain("vhdx")
    for folder in ("one", "two"):
        Path(folder).mkdir()
        dm("convert", top, f"{folder}/t.vdi", "--keep-chain", "--allow-parent", ".", "--reproducible").ok()
    for name in os.listdir("one"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes(), name


def test_one_layer_is_one_file():
    Path("d.raw").write_bytes(states()[0])
    report = diskmorph.convert("d.raw", "d.vhdx", options=ConvertOptions(keep_chain=True))
    assert report.members == ("d.vhdx",) and diskmorph.compare("d.raw", "d.vhdx").identical


def test_flattening_is_said():
    top = make_chain("qcow2")
    assert "flattened" in dm("convert", top, "flat.vmdk", "--allow-parent", ".").ok().err
