"""Images that other products made: content, size and extents as those products tell them."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import numpy as np
import pytest

from diskmorph.formats.disk import checked
from diskmorph.formats.extents import DATA
from diskmorph.formats.registry import identify, open_disk
from diskmorph.formats.source import FileSource

FIXTURES = Path(__file__).parents[2] / "fixtures"
FLAT = {"vdi/static.vdi", "vhd/fixed.vhd", "vmdk/flat.vmdk"}
NAMES = sorted(str(p.relative_to(FIXTURES))[:-5] for p in FIXTURES.glob("*/*.toml"))


def test_every_fixture_has_its_provenance():
    images = {
        str(p.relative_to(FIXTURES))
        for p in FIXTURES.glob("*/*")
        if p.is_file() and p.suffix not in {".toml", ".sh"} and not p.stem.endswith(("-flat", "-s001"))
    }
    assert images == set(NAMES)
    assert len(NAMES) >= 15


@pytest.mark.parametrize("name", NAMES)
def test_fixture_reads_as_its_maker_says(name):
    path = FIXTURES / name
    told = tomllib.loads(Path(f"{path}.toml").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == told["sha256"], "the fixture was changed"
    with FileSource(path) as source:
        assert identify(source)[0].name == told["format"]
    with open_disk(path) as opened:
        disk = checked(opened)
        assert disk.size == told["virtual_size"]
        assert hashlib.sha256(disk.read(0, disk.size)).hexdigest() == told["content_sha256"]
        kinds = np.zeros(disk.size, bool)
        for batch in disk.extents():
            for row in batch[batch["kind"] == DATA]:
                kinds[int(row["start"]) : int(row["start"]) + int(row["length"])] = True
    if name in FLAT:
        return  # their zeroes are the file system's holes, which a checkout does not keep
    for start, length, kind in told["extents"]:
        if kind == "zero":
            assert not kinds[start : start + length].any(), (
                f"{start}..{start + length} is data here, zero for its maker"
            )
