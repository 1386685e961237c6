"""What `--json` prints is what docs/json.md says, key by key and type by type."""

from pathlib import Path
from typing import Any

import pytest
from clikit import dm, documented
from lvmkit import Lvm
from ocikit import docker_archive, oci_layout, tricky_layers

from testkit import MIB, data, run

DOCUMENTED = documented()
OPEN = {"info": ("features",)}
"""Objects whose keys are the formats' own."""


def paths(value: Any, path: str = "", star: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """Every path in a JSON value with the types found there; keys of objects in `star` are data."""
    kind = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}.get(
        type(value), "null"
    )
    found = {path: {kind}} if path else {}
    children: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        dot = f"{path}." if path else ""
        children = [(f"{path}.*" if path in star else dot + key, each) for key, each in value.items()]
    elif isinstance(value, list):
        children = [(f"{path}[]", each) for each in value]
    for name, each in children:
        for inner, kinds in paths(each, name, star).items():
            found.setdefault(inner, set()).update(kinds)
    return found


def hold(heading: str, *reports: dict[str, Any], missing: set[str] = frozenset()) -> None:
    """Every key that is printed is documented with its type, and every documented key is printed by some report."""
    table = DOCUMENTED[heading]
    seen: set[str] = set()
    for report in reports:
        for path, kinds in paths(report, star=("parent.expects",)).items():
            if path.startswith(OPEN.get(heading, ("\0",))) and path not in table:
                continue
            if (
                path not in table
                and kinds == {"object"}
                and any(key.startswith((path + ".", path + "[")) for key in table)
            ):
                continue  # `bytes`, `error`, `extents[]`: only their keys are listed
            assert path in table, f"{heading}: {path} is printed, but not documented"
            allowed = set(table[path].split(" or "))
            assert kinds <= allowed, f"{heading}: {path} is {kinds}, documented as {table[path]}"
            seen.add(path)
    assert set(table) - seen == set(missing), f"{heading}: documented, but not printed: {set(table) - seen}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    with open(folder / "disk.raw", "wb") as file:
        file.truncate(16 * MIB)
        file.write(data("head", 4096))
    script = "label: gpt\nstart=2048, size=16384, type=linux, name=root\n"
    (folder / "script").write_text(script)
    run("sh", "-c", f"sfdisk -q {folder}/disk.raw < {folder}/script")
    run("mke2fs", "-q", "-t", "ext4", "-E", f"offset={MIB}", folder / "disk.raw", "8192k")
    run("mke2fs", "-q", "-t", "ext2", folder / "plain.raw", "2048k")
    run("qemu-img", "create", "-q", "-f", "vmdk", folder / "base.vmdk", "4M")
    run("qemu-img", "create", "-q", "-f", "vmdk", "-b", folder / "base.vmdk", "-F", "vmdk", folder / "child.vmdk")
    run("qemu-img", "convert", "-O", "qcow2", "-c", folder / "disk.raw", folder / "disk.qcow2")
    run("qemu-img", "snapshot", "-c", "monday", folder / "disk.qcow2")
    run("qemu-img", "bitmap", "--add", folder / "disk.qcow2", "dirty")
    return folder


def test_error(images: Path) -> None:
    bad = images / "bad.qcow2"
    bad.write_bytes(b"QFI\xfb" + (99).to_bytes(4, "big") + bytes(200))
    for argv, status in (
        (["info", bad], 1),
        (["info", images / "none"], 1),
        (["convert", "--nosuch"], 2),
        (["nosuch"], 2),
    ):
        done = dm(*argv, "--json")
        assert done.status == status
        hold("error", done.json)
        assert done.json["error"]["message"] in done.err
        assert len(done.err.splitlines()) == 1


def test_convert(images: Path, tmp_path: Path) -> None:
    plain = dm("convert", "--json", "--digest", images / "disk.raw", tmp_path / "a.vmdk").ok().json
    lossy = dm("convert", "--json", images / "disk.qcow2", tmp_path / "b.vdi").ok().json
    dry = (
        dm("convert", "--json", "--dry-run", images / "child.vmdk", "--allow-parent", images, tmp_path / "c.vhd")
        .ok()
        .json
    )
    hold("convert", plain, lossy, dry)
    for report in (plain, lossy, dry):
        assert sum(report["bytes"].values()) == report["virtual_size"]
    assert not (tmp_path / "c.vhd").exists()


def test_create_and_resize_and_extract(images: Path, tmp_path: Path) -> None:
    made = dm("create", "--json", tmp_path / "a.qcow2", "8M").ok().json
    larger = dm("resize", "--json", tmp_path / "a.qcow2", "+4M").ok().json
    taken = dm("snapshot", "--json", images / "disk.qcow2", "--extract", "monday", tmp_path / "m.raw").ok().json
    assert (made["virtual_size"], larger["virtual_size"], taken["virtual_size"]) == (8 * MIB, 12 * MIB, 16 * MIB)
    for report in (made, larger, taken):
        hold("convert", report, missing=set(DOCUMENTED["convert"]) - set(paths(report)))


def with_group(folder: Path) -> Path:
    """A disk that is a physical volume with an ext4 in its logical volume."""
    disk, inside = folder / "group.raw", folder / "inside.img"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    with Lvm(folder) as lvm:
        device = lvm.attach(disk)
        lvm("pvcreate", device)
        lvm("vgcreate", "vg", device)
        lvm.create("vg", "root", "-L", "16m")
        with inside.open("wb") as file:
            file.truncate(16 * MIB)
        run("mke2fs", "-q", "-t", "ext4", "-L", "inside", inside)
        lvm.fill("vg/root", inside)
    return disk


def test_info(images: Path, tmp_path: Path) -> None:
    reports = [
        dm("info", "--json", images / "disk.raw").ok().json,
        dm("info", "--json", images / "plain.raw").ok().json,
        dm("info", "--json", images / "disk.qcow2").ok().json,
        dm("info", "--json", images / "child.vmdk").ok().json,
        dm("info", "--json", with_group(tmp_path)).ok().json,
    ]
    hold("info", *reports, missing={"chain"})
    chain = dm("info", "--json", "--chain", "--allow-parent", images, images / "child.vmdk").ok().json["chain"]
    assert [Path(layer["file"]).name for layer in chain] == ["child.vmdk", "base.vmdk"]
    for layer in chain:
        assert set(layer) == set(reports[0])


BESIDE_DISKS = {"file", "format", "subformat", "virtual_size", "stored_size", "sector_size", "allocation_unit", "features", "snapshots", "parent", "signatures", "partitions", "warnings"}  # fmt: skip


def test_info_of_trees(tmp_path: Path) -> None:
    made = oci_layout(tmp_path / "layout", tricky_layers(), author="me")
    old = docker_archive(tmp_path / "d.tar", tricky_layers())
    images = [dm("info", "--json", name).ok().json for name in (made, old)]
    tree = dm("info", "--json", tmp_path).ok().json
    for one in (*images, tree):
        assert set(one) >= BESIDE_DISKS
    own = [{key: one[key] for key in set(one) - BESIDE_DISKS} for one in (*images, tree)]
    hold("info of a container image", *({**one, "config": {}} for one in own[:2]))
    hold("info of a tar or a directory", own[2])


def test_map(images: Path) -> None:
    reports = [dm("map", "--json", images / name).ok().json for name in ("disk.raw", "disk.qcow2", "plain.raw")]
    hold("map", *reports)
    for report in reports:
        ends = [extent["start"] + extent["length"] for extent in report["extents"]]
        assert [extent["start"] for extent in report["extents"]] == [0, *ends[:-1]]
        assert ends[-1] == report["virtual_size"]


def test_measure_check_compare_digest(images: Path, tmp_path: Path) -> None:
    hold("measure", dm("measure", "--json", "-O", "qcow2", images / "disk.raw").ok().json)
    broken = tmp_path / "broken.vhdx"
    run("qemu-img", "convert", "-O", "vhdx", images / "plain.raw", broken)
    with open(broken, "r+b") as file:
        file.seek(65536 + 20)
        file.write(b"\xa5\x5a")
    damaged = dm("check", "--json", broken)
    assert damaged.status == 3
    mended = dm("check", "--json", "--repair", "all", broken)
    hold("check", damaged.json, mended.json)
    (tmp_path / "other.raw").write_bytes(data("other", 2 * MIB))
    differ = dm("compare", "--json", images / "plain.raw", tmp_path / "other.raw")
    assert differ.status == 3
    hold("compare", differ.json, dm("compare", "--json", images / "plain.raw", images / "plain.raw").ok().json)
    hold("digest", dm("digest", "--json", images / "disk.qcow2").ok().json)


def test_snapshot_formats_completion(images: Path) -> None:
    hold("snapshot", dm("snapshot", "--json", images / "disk.qcow2").ok().json)
    hold("formats", dm("formats", "--json").ok().json)
    hold("completion", dm("completion", "--json", "bash").ok().json)


def test_progress(images: Path, tmp_path: Path) -> None:
    import json

    done = dm("convert", "--progress", "json", "-q", images / "disk.raw", tmp_path / "a.vdi").ok()
    rows = [json.loads(line) for line in done.err.splitlines()]
    assert rows[-1]["done"] == rows[-1]["total"] == 16 * MIB
    for row in rows:
        hold("progress", row)
