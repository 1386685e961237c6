"""`info`: headers, chains that may not be opened, what lies inside, what is damaged."""

import os
from pathlib import Path

import pytest
from clikit import dm

from testkit import MIB, data, run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def partitioned(path: str) -> None:
    with open(path, "wb") as file:
        file.truncate(24 * MIB)
    run(
        "sh",
        "-c",
        f"printf 'label: gpt\\nstart=2048,size=16384,type=linux,name=root\\nsize=8192,type=uefi,name=EFI\\n' | sfdisk -q {path}",
    )
    run("mke2fs", "-q", "-t", "ext4", "-L", "the root", "-E", f"offset={MIB}", path, "8192k")


def test_partitions_are_found_through_any_format(here: Path) -> None:
    partitioned("disk.raw")
    want = dm("info", "--json", "disk.raw").ok().json["partitions"]
    assert [(p["number"], p["name"], p["start"], p["length"]) for p in want] == [
        (1, "root", MIB, 8 * MIB),
        (2, "EFI", 9 * MIB, 4 * MIB),
    ]
    assert want[0]["filesystem"] == "ext4" and want[0]["filesystem_label"] == "the root"
    assert want[1]["filesystem"] is None
    for form in ("qcow2", "vmdk", "vdi", "vpc", "vhdx"):
        run("qemu-img", "convert", "-O", form, *(["-c"] if form == "qcow2" else []), "disk.raw", f"disk.{form}")
        assert dm("info", "--json", f"disk.{form}").ok().json["partitions"] == want, form
    text = dm("info", "disk.qcow2").ok().out
    for word in ("qcow2", "24 MiB", "GPT", "ext4 'the root'", "EFI system"):
        assert word in text


def test_a_parent_is_named_but_not_opened(here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    report = dm("info", "--json", "top.qcow2").ok().json
    assert report["parent"] == {"names": ["base.qcow2"], "format": "qcow2", "expects": {}}
    assert report["partitions"] == [] and "parent" in report["warnings"][0]
    allowed = dm("info", "--json", "--allow-parent", ".", "top.qcow2").ok().json
    assert allowed["warnings"] == []
    os.unlink("base.qcow2")
    assert dm("info", "--json", "top.qcow2").ok().json["parent"]["names"] == ["base.qcow2"]
    assert dm("info", "--chain", "top.qcow2").status == 1


def test_chain_names_every_layer(here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "raw", "base.raw", "4M")
    for name, below, form in (("mid.qcow2", "base.raw", "raw"), ("top.qcow2", "mid.qcow2", "qcow2")):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", form, name)
    text = dm("info", "--chain", "--allow-parent", ".", "top.qcow2").ok().out
    assert text.index("top.qcow2") < text.index("mid.qcow2") < text.index("base.raw")


def test_a_guess_is_called_a_guess(here: Path) -> None:
    Path("some.img").write_bytes(data("noise", MIB))
    assert dm("info", "--json", "some.img").ok().json["guessed"] is True
    assert "guess" in dm("info", "some.img").ok().out
    assert dm("info", "--json", "-f", "raw", "some.img").ok().json["guessed"] is False
    assert "guess" not in dm("info", "-f", "raw", "some.img").ok().out


def test_every_signature_is_named(here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "vpc", "disk.vpc", "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "both.img", "1M")
    with open("both.img", "ab") as file:
        file.write(Path("disk.vpc").read_bytes()[-512:])
    report = dm("info", "--json", "both.img").ok().json
    assert report["format"] == "qcow2"
    assert [(s["format"], s["offset"]) for s in report["signatures"]] == [
        ("qcow2", 0),
        ("vhd", os.path.getsize("both.img") - 512),
    ]
    assert "VHD footer" in dm("info", "both.img").ok().out


def test_damage_inside_is_a_warning_not_the_end(here: Path) -> None:
    partitioned("disk.raw")
    with open("disk.raw", "r+b") as file:
        for at in (512 + 20, 24 * MIB - 512 + 20):
            file.seek(at)
            file.write(b"\xff\xff\xff\xff")
    report = dm("info", "--json", "disk.raw").ok().json
    assert report["partitions"] == [] and "GPT header" in report["warnings"][0]
    done = dm("info", "disk.raw").ok()
    assert "GPT header" in done.err and len(done.err.splitlines()) == 1


def test_a_truncated_image_still_tells_its_headers(here: Path) -> None:
    with open("disk.raw", "wb") as file:
        file.write(data("full", 8 * MIB))
    run("qemu-img", "convert", "-O", "qcow2", "disk.raw", "disk.qcow2")
    os.truncate("disk.qcow2", 400_000)
    done = dm("info", "disk.qcow2")
    assert (done.status, "8 MiB" in done.out) == (0, True) or (done.status == 1 and "truncated" in done.err)
    assert "Traceback" not in done.err


def test_stored_and_allocated(here: Path) -> None:
    with open("disk.raw", "wb") as file:
        file.write(data("some", 64 * 1024))
        file.truncate(64 * MIB)
    report = dm("info", "--json", "disk.raw").ok().json
    assert report["stored_size"] == 64 * MIB and report["allocated_size"] == 64 * 1024


def test_json_has_no_note_on_standard_error(here: Path) -> None:
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "gone", "-F", "raw", "top.qcow2", "1M")
    done = dm("info", "--json", "top.qcow2").ok()
    assert done.err == "" and done.json["warnings"]
