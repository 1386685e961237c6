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
    done = dm("convert", "disk.raw", "one.qcow2", "--also", "flat.vdi")
    assert done.status == 1 and "one.qcow2 is complete" in done.err and Path("one.qcow2").exists()
    for words in (["-", "-O", "raw", "--also", "b.vdi"], ["b.vdi", "--also", "b.vdi"], ["b.vdi", "--also", "noformat"]):
        assert dm("convert", "disk.raw", *words, "--force").status == 2, words
