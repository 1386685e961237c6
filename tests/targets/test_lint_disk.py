"""What importers would refuse of bare disks."""

from pathlib import Path

import pytest
from clikit import dm

from testkit import MIB


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(bytes(3 * MIB + 512))


def rules(path: str, target: str) -> list[str]:
    return [finding["rule"] for finding in dm("lint", path, "--for", target, "--json").json["findings"]]


def test_rules_are_those_of_convert():
    assert rules("disk.raw", "azure") == ["disk-format"]
    dm("convert", "disk.raw", "a.vhd").ok()
    assert rules("a.vhd", "azure") == ["disk-subformat", "disk-size"]
    for target, name in (("azure", "z.vhd"), ("hyperv", "h.vhdx"), ("openstack", "o.qcow2"), ("esxi", "e.vmdk")):
        dm("convert", "disk.raw", name, "--for", target).ok()
        assert rules(name, target) == [], target
    dm("convert", "disk.raw", "plain.vmdk").ok()
    assert rules("plain.vmdk", "esxi") == ["disk-subformat"]
    dm("convert", "disk.raw", "o.qcow2.gz").ok()
    assert rules("o.qcow2.gz", "openstack") == ["disk-wrapper"]
    assert dm("lint", "a.vhd", "--for", "azure").status == 3
    assert dm("lint", "z.vhd", "--for", "azure").status == 0
    assert dm("lint", "a.vhd", "--for", "moon").status == 2
