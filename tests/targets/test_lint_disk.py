"""What importers would refuse of bare disks."""

from pathlib import Path

import pytest
from clikit import dm

from testkit import MIB, run


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


def test_a_stream_of_qemu_img_is_judged_by_itself():
    """Its adapter is ide, and zeroes follow its end: ESXi takes neither."""
    run("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "disk.raw", "q.vmdk")
    assert rules("q.vmdk", "esxi") == ["vmdk-trailing", "vmdk-adapter"]
    assert rules("q.vmdk", "aws") == ["vmdk-trailing"]
    assert "cut the file at byte" in dm("lint", "q.vmdk", "--for", "esxi").out


def test_virtualbox_opens_vmdk_and_vhd():
    dm("convert", "-f", "raw", "disk.raw", "v.vmdk").ok()
    dm("convert", "-f", "raw", "disk.raw", "v.vhd").ok()
    dm("convert", "-f", "raw", "disk.raw", "v.qcow2").ok()
    assert [rules(name, "virtualbox") for name in ("v.vmdk", "v.vhd", "v.qcow2")] == [[], [], ["disk-format"]]
    dm("convert", "--for", "virtualbox", "v.qcow2", "by-suffix.vmdk").ok()
    assert dm("info", "--json", "by-suffix.vmdk").json["format"] == "vmdk"
    assert dm("convert", "--for", "virtualbox", "v.qcow2", "default.disk", "--json").ok().json["format"] == "vdi"
