"""Packages of ours read by other products: COT, 7-Zip, bsdtar, GNU tar, qemu-img."""

from __future__ import annotations

import re
import sys

import pytest

import diskmorph
from diskmorph import ConvertOptions

from testkit import MIB, little_disk, run, sha256, write_image

# COT wants pkg_resources, which new setuptools no longer have, for the names of its own help files only.
_SHIM = """
import sys, types
shim = types.ModuleType("pkg_resources")
shim.resource_listdir = lambda *words: []
shim.resource_filename = lambda *words: ""
sys.modules["pkg_resources"] = shim
from COT.ui.cli import main
main()
"""
COT = (sys.executable, "-c", _SHIM)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """An OVA with two disks and all that a machine has, its raw disks beside it."""
    folder = tmp_path_factory.mktemp("package")
    for number, size in ((1, 3 * MIB), (2, 2 * MIB + 1536)):
        write_image("raw", little_disk(size, seed=number), folder / f"{number}.raw")
    words = {
        "cpus": "2",
        "memory": "2G",
        "name": "web",
        "nics": "2",
        "os": "debian12_64",
        "firmware": "efi",
        "manifest": "sha1",  # what COT expects of OVF 1
    }
    asked = ConvertOptions(format_options=words, sync=False)
    diskmorph.convert([folder / "1.raw", folder / "2.raw"], folder / "vm.ova", options=asked)
    return folder / "vm.ova"


def test_cot_reads_the_machine_and_believes_the_manifest(package):
    done = run(*COT, "info", "-v", package)
    assert "ERROR" not in done.stderr
    assert "tampered" not in done.stdout + done.stderr
    text = done.stdout
    for disk in ("web-disk1.vmdk", "web-disk2.vmdk"):
        assert re.search(rf"{disk}\s+[\d.]+ [KM]iB\s+[\d.]+ MiB harddisk @ SCSI 0:\d", text), text
    assert re.search(r"None \(default\)\s+2\s+2 GiB\s+2", text), text
    assert "vmx-13" in text
    assert "lsilogic" in text


def test_what_cot_writes_is_read(package, tmp_path):
    """COT edits the package: another CPU count, another name for its files."""
    edited = tmp_path / "edited.ova"
    run(*COT, "-f", "edit-hardware", package, "-o", edited, "-c", "4", "-m", "1024M")
    with diskmorph.open_package(edited) as found:
        (machine,) = found.machines
        assert (machine.cpus, machine.memory, machine.name) == (4, 1 << 30, "web")
        assert found.manifest
    for number in (1, 2):
        diskmorph.convert(edited, tmp_path / f"{number}.raw", options=ConvertOptions(disk=number, sync=False))
    assert sha256(tmp_path / "1.raw") == sha256(package.parent / "1.raw")
    assert (tmp_path / "2.raw").read_bytes()[: 2 * MIB + 1536] == (package.parent / "2.raw").read_bytes()


@pytest.mark.parametrize("words", [("tar", "-xf"), ("bsdtar", "-xf"), ("7z", "x", "-y")])
def test_archivers_unpack_it(package, tmp_path, words):
    if words[0] == "7z":
        run(*words, f"-o{tmp_path}", package)
    else:
        run(*words, package, "-C", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["web-disk1.vmdk", "web-disk2.vmdk", "web.mf", "web.ovf"]
    for line in (tmp_path / "web.mf").read_text().splitlines():
        name, digest = re.fullmatch(r"SHA1\((.+)\)= ([0-9a-f]{40})", line).groups()
        assert run("sha1sum", tmp_path / name).stdout.split()[0] == digest
    run("qemu-img", "convert", "-O", "raw", tmp_path / "web-disk1.vmdk", tmp_path / "1.raw")
    assert sha256(tmp_path / "1.raw") == sha256(package.parent / "1.raw")
    run("vmdkinfo", tmp_path / "web-disk1.vmdk")


def test_archives_of_tar_are_read(package, tmp_path):
    """The same files, packed by GNU tar and bsdtar in each of their forms."""
    run("tar", "-xf", package, "-C", tmp_path)
    names = ["web.ovf", "web.mf", "web-disk1.vmdk", "web-disk2.vmdk"]
    forms = [("tar", f"--format={form}") for form in ("ustar", "gnu", "pax", "oldgnu", "v7")]
    forms += [("bsdtar", f"--format={form}") for form in ("ustar", "pax", "gnutar")]
    for index, words in enumerate(forms):
        archive = tmp_path / f"{index}.ova"
        run(*words, "-cf", archive, "-C", tmp_path, *names)
        with diskmorph.open_package(archive) as found, found.open_disk(1) as disk:
            assert disk.read(0, disk.size) == (package.parent / "1.raw").read_bytes()
