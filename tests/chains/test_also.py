"""Several targets of one conversion."""

from pathlib import Path

import pytest
from clikit import dm

from testkit import content, little_disk


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(content(little_disk()))


def test_every_target_has_the_content():
    done = dm("convert", "disk.raw", "a.qcow2", "--also", "b.vmdk", "--also", "c.raw.gz", "--digest", "--json").ok()
    first = done.json
    assert [one["target"] for one in first["also"]] == ["b.vmdk", "c.raw.gz"]
    assert {one["digest"] for one in (first, *first["also"])} == {first["digest"]}
    for name in ("a.qcow2", "b.vmdk", "c.raw.gz"):
        assert dm("compare", "disk.raw", name).status == 0
    assert dm("convert", "disk.raw", "x.vdi", "--also", "y.vhd").ok().out.count("written") == 2


def test_overlays_and_failures():
    dm("convert", "disk.raw", "base.qcow2").ok()
    dm("convert", "disk.raw", "over.qcow2", "-B", "base.qcow2", "--also", "flat.vdi").ok()
    assert dm("compare", "disk.raw", "flat.vdi").status == 0
    assert dm("convert", "disk.raw", "one.qcow2", "--also", "flat.vdi").status == 1
    for words in (["-", "-O", "raw", "--also", "b.vdi"], ["b.vdi", "--also", "b.vdi"], ["b.vdi", "--also", "noformat"]):
        assert dm("convert", "disk.raw", *words, "--force").status == 2, words


def refused_before_anything_is_written(status: int, *words: str) -> str:
    before = sorted(path.name for path in Path().iterdir())
    done = dm("convert", "disk.raw", "first.qcow2", "--also", *words)
    assert done.status == status and sorted(path.name for path in Path().iterdir()) == before
    return done.err


def test_every_name_is_looked_at_before_anything_is_written():
    Path("there.vdi").touch()
    assert "format" in refused_before_anything_is_written(2, "noformat")
    assert "exists" in refused_before_anything_is_written(1, "there.vdi")
    assert "folder" in refused_before_anything_is_written(1, "nowhere/y.vdi")
    assert "exists" in refused_before_anything_is_written(1, "good.vdi", "--also", "there.vdi")


def test_options_go_to_further_targets_of_the_same_format():
    done = dm("convert", "-c", "-o", "cluster_size=128k", "disk.raw", "x.qcow2", "--also", "y.qcow2", "--json").ok()
    (other,) = done.json["also"]
    assert other["notes"] == [] and other["stored_size"] == done.json["stored_size"]
    assert dm("info", "--json", "y.qcow2").ok().json["allocation_unit"] == 128 << 10
    other = dm("convert", "-c", "disk.raw", "z.qcow2", "--also", "z.vdi").ok()
    assert "z.vdi is of another format: -c is for the first target" in other.err
    dm("convert", "--for", "azure", "disk.raw", "a.vhd", "--also", "b.vhd").ok()
    assert dm("info", "--json", "b.vhd").ok().json["subformat"] == "fixed"


def test_an_encrypted_first_target_is_read_again():
    Path("key").write_bytes(b"secret")
    words = ["-o", "encrypt.format=luks", "--target-passphrase-file", "key"]
    done = dm("convert", *words, "disk.raw", "x.qcow2", "--also", "y.qcow2", "--also", "z.vdi").ok()
    assert "clear" in done.err
    for name in ("x.qcow2", "y.qcow2"):
        assert dm("compare", "disk.raw", name).status == 1
        assert dm("compare", "--passphrase-file", "key", "disk.raw", name).status == 0
    assert dm("compare", "disk.raw", "z.vdi").status == 0


def test_a_dry_run_foretells_every_target():
    words = ["disk.raw", "a.qcow2", "--also", "b.vmdk", "--json"]
    dry = dm("convert", "--dry-run", *words).ok().json
    assert [path.name for path in Path().iterdir()] == ["disk.raw"]
    real = dm("convert", *words).ok().json
    assert [one["stored_size"] for one in dry["also"]] == [one["stored_size"] for one in real["also"]]
