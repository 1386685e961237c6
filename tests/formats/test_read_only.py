"""The formats that are read but not written, through the command line: info, map, measure, check, convert, no writing."""

from __future__ import annotations

from pathlib import Path

import pytest
from clikit import dm

from diskmorph.formats.allocator import NewImage
from diskmorph.formats.errors import OptionError, UnsupportedError
from diskmorph.formats.probe import FORMATS, Format
from diskmorph.formats.registry import load

from testkit import MIB, DiskCase, contract_cases

READ_ONLY = [entry for entry in FORMATS if entry.kind == "disk" and not entry.writes]
CASES = [(name, case) for name, case in contract_cases("DISKS") if name in {entry.name for entry in READ_ONLY}]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case.name}" for name, case in CASES])
def test_the_verbs_work(name: str, case: DiskCase, tmp_path: Path) -> None:
    path, want = case.make(tmp_path)
    info = dm("info", "--json", path).ok().json
    assert (info["format"], info["virtual_size"]) == (name, len(want))
    rows = dm("map", "--json", path).ok().json
    assert rows["extents"][0]["start"] == 0
    assert rows["virtual_size"] == len(want)
    assert dm("measure", "-O", "qcow2", path).ok().out
    checked = dm("check", path)
    assert checked.status == 0 or name == "qcow", checked.out  # a disk of odd size, which its check tells
    dm("convert", path, tmp_path / "out.qcow2").ok()
    dm("convert", tmp_path / "out.qcow2", tmp_path / "out.raw").ok()
    if len(want) % 512:  # qcow2 holds whole sectors
        return
    assert (tmp_path / "out.raw").read_bytes() == want
    dm("convert", "-c", path, tmp_path / "small.vmdk").ok()
    dm("compare", path, tmp_path / "small.vmdk").ok()


@pytest.mark.parametrize("entry", READ_ONLY, ids=lambda entry: entry.name)
def test_writing_is_refused(entry: Format, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(MIB))
    done = dm("convert", "-O", entry.name, tmp_path / "a.raw", tmp_path / "b")
    assert done.status != 0
    assert f"{entry.name} is read but not written" in done.err
    assert "qcow2, vmdk" in done.err
    assert not (tmp_path / "b").exists()
    with pytest.raises((OptionError, UnsupportedError)):
        load(entry).new_allocator(NewImage(MIB, "b"))
