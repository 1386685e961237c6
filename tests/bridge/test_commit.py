"""`commit`: what changed on a disk is one small layer; what the build put in is not in it."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from typing import TYPE_CHECKING

import pytest
from clikit import dm
from ocikit import CONFIG, docker_archive, folder, oci_layout
from treekit import same, tar_entry, tar_file, told

from diskmorph.convert.bridge import BuildOptions, CommitOptions, ExtractOptions, build, commit, extract
from diskmorph.convert.bridge.diff import Known, changes
from diskmorph.convert.bridge.injected import Injector, read_record
from diskmorph.convert.bridge.options import Size
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import OptionError
from diskmorph.formats.gpt import read_table
from diskmorph.formats.registry import open_disk
from diskmorph.formats.tree import Tree, dir_node, file_node, link_node
from diskmorph.formats.trees import open_tree

from testkit import run

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ConvertOptions(sync=False)
MIB = 1 << 20


def layers() -> list[bytes]:
    entries = [folder("bin"), folder("etc"), folder("srv/app", uid=1000), folder("root"), folder("tmp", 0o1777)]
    entries += [
        tar_entry("bin/marker", b"#!/bin/sh\n", mode=0o755),
        tar_entry("etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
    ]
    entries += [
        tar_entry("etc/group", b"root:x:0:\n"),
        tar_entry(".dockerenv"),
        tar_entry("bin/hard", type=b"1", link="bin/marker"),
    ]
    return [tar_file(*entries), tar_file(tar_entry("etc/two", b"2"))]


def built(tmp_path: Path, base: Path) -> Path:
    disk = tmp_path / "disk.raw"
    build(base, disk, options=BuildOptions(boot=(), size=Size(slack=16 * MIB), convert=QUICK))
    return disk


def change(disk: Path, *commands: str) -> None:
    with open_disk(disk) as opened:
        offset = read_table(opened).partitions[-1].start  # type: ignore[union-attr]
    script = disk.with_name("script")
    script.write_text("\n".join(commands) + "\n")
    run("debugfs", "-w", "-f", script, f"{disk}?offset={offset}")


def options(base: Path, **more: object) -> CommitOptions:
    return CommitOptions(base=str(base), message="m", author="a <a@x>", extract=ExtractOptions(convert=QUICK, **more))  # type: ignore[arg-type]


def top_layer(layout: Path) -> tuple[dict[str, tarfile.TarInfo], int]:
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads((layout / "blobs" / index["manifests"][0]["digest"].replace(":", "/")).read_text())
    data = (layout / "blobs" / manifest["layers"][-1]["digest"].replace(":", "/")).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as tar:
        return {member.name: member for member in tar}, len(manifest["layers"])


@pytest.mark.parametrize("kind", ["docker", "oci"])
def test_changes_become_one_layer(tmp_path: Path, kind: str) -> None:
    base = (docker_archive if kind == "docker" else oci_layout)(tmp_path / "base", layers())
    disk = built(tmp_path, base)
    (tmp_path / "new.txt").write_bytes(b"hello\n")
    change(
        disk,
        f"write {tmp_path}/new.txt srv/app/new.txt",
        "sif srv/app/new.txt mode 0100640",
        "sif srv/app/new.txt uid 1000",
        "rm etc/group",
        "mkdir opt",
        "rmdir root",
        "sif etc/two mode 0100600",
    )
    report = commit(disk, f"oci:{tmp_path}/out", options=options(base))
    assert report.lost == ()
    names, count = top_layer(tmp_path / "out")
    assert count == 3
    needed = {"srv/app/new.txt", "etc/.wh.group", "opt", ".wh.root", "etc/two"}
    assert needed <= set(names) <= needed | {"srv", "srv/app", "etc"}
    assert (names["srv/app/new.txt"].mode, names["srv/app/new.txt"].uid) == (0o640, 1000)
    run("skopeo", "copy", "-q", f"oci:{tmp_path}/out", f"oci:{tmp_path}/tagged:latest")
    config = json.loads(run("skopeo", "inspect", "--config", f"oci:{tmp_path}/out").stdout)
    assert config["config"] == CONFIG
    last = config["history"][-1]
    assert (last["comment"], last["author"]) == ("m", "a <a@x>")
    assert config["author"] == "a <a@x>"
    with open_tree(f"oci:{tmp_path}/out") as tree:
        found = told(tree)
    assert found[b"srv/app/new.txt"]["sha256"]
    assert b"root" not in found
    assert found[b"bin/hard"]["links"] == [b"bin/hard", b"bin/marker"]


def test_nothing_changed_adds_no_layer(tmp_path: Path) -> None:
    base = oci_layout(tmp_path / "base", layers())
    disk = built(tmp_path, base)
    for target in (f"oci:{tmp_path}/out", f"docker-archive:{tmp_path}/out.tar"):
        report = commit(disk, target, options=options(base))
        assert any("nothing changed" in note for note in report.notes)
        with open_tree(base) as before, open_tree(target) as after:
            same(told(before), told(after))
            assert after.config["rootfs"] == before.config["rootfs"]
            assert after.config["history"][-1]["empty_layer"] is True


def test_configuration_can_be_changed(tmp_path: Path) -> None:
    base = oci_layout(tmp_path / "base", layers())
    disk = built(tmp_path, base)
    words = ("--entrypoint", "/bin/other", "--env", "A=2", "-m", "x")
    dm("commit", disk, "--base", base, f"oci:{tmp_path}/out", *words).ok()
    config = json.loads(run("skopeo", "inspect", "--config", f"oci:{tmp_path}/out").stdout)["config"]
    assert config["Entrypoint"] == ["/bin/other"]
    assert config["Env"] == ["PATH=/bin", "A=2"]
    assert config["User"] == CONFIG["User"]


def test_what_is_no_container_image_is_refused(tmp_path: Path) -> None:
    base = oci_layout(tmp_path / "base", layers())
    disk = built(tmp_path, base)
    (tmp_path / "plain.tar").write_bytes(layers()[0])
    for source, target in ((base, tmp_path / "x.tar"), (tmp_path / "plain.tar", f"oci:{tmp_path}/x")):
        with pytest.raises(OptionError, match="no container image"):
            commit(disk, target, options=options(source))
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- differences


def small() -> Tree:
    tree = Tree()
    tree.put("d", dir_node(mtime=5))
    tree.put("d/f", file_node(b"x", mtime=1_500_000_000))
    tree.put("d/l", link_node(b"f"))
    tree.put("h1", file_node(b"h"))
    tree.link("h2", "h1")
    return tree


def difference(change: object, known: Known | None = None) -> list[bytes]:
    one, two = small(), small()
    change(two)  # type: ignore[operator]
    return [path for path, _ in changes(one, two, known or Known())]


def test_what_counts_as_a_change() -> None:
    def attribute(path: str, **values: object) -> object:
        return lambda tree: [setattr(tree.find(path, follow=False), name, value) for name, value in values.items()]

    assert difference(lambda tree: None) == []
    assert difference(attribute("d/f", uid=5)) == [b"d/f"]
    assert difference(attribute("d/f", mode=0o100600)) == [b"d/f"]
    assert difference(attribute("d/f", xattrs={b"user.a": b"1"})) == [b"d/f"]
    assert difference(attribute("d/f", mtime=1_500_000_001)) == [b"d/f"]
    assert difference(attribute("d/f", mtime=1_000_000_000)) == []  # the same second, and one has no more
    assert difference(attribute("d", mtime=6 * 10**9)) == [b"d"]
    assert difference(attribute("d/l", target=b"g")) == [b"d/l"]
    assert difference(attribute("d/l", mode=0o120700)) == []  # links have no modes
    assert difference(lambda tree: tree.put("d/f", file_node(b"y", mtime=1_500_000_000))) == [b"d/f"]
    assert difference(lambda tree: tree.put("d/f/g", file_node(b"")) if tree.remove("d/f") else None) == [
        b"d/f",
        b"d/f/g",
    ]
    assert difference(lambda tree: tree.put("d", file_node(b"now a file"))) == [b"d"]
    assert difference(lambda tree: tree.remove("d")) == [b".wh.d"]
    assert difference(lambda tree: tree.remove("h2")) == [b"h1", b".wh.h2"]


def test_links_that_came_apart_are_changes() -> None:
    assert difference(lambda tree: tree.put("h2", file_node(b"h"))) == [b"h1", b"h2"]
    assert difference(lambda tree: tree.link("h3", "h1")) == [b"h1", b"h2", b"h3"]


def test_contents_of_pseudo_file_systems_do_not_count() -> None:
    one, two = Tree(), Tree()
    one.put("tmp/x", file_node(b"x"))
    two.put("tmp/y", file_node(b"y"))
    two.put("lost+found", dir_node())
    assert changes(one, two, Known()) == []


def test_what_a_build_put_in_does_not_count() -> None:
    base, tree = small(), small()
    base.put("etc/hostname", file_node(b"old\n"))
    tree.put("etc/hostname", file_node(b"old\n"))
    base.put(".dockerenv", file_node(b""))
    tree.put(".dockerenv", file_node(b""))
    injector = Injector(tree)
    injector.put("boot/grub/grub.cfg", file_node(b"menu"))
    injector.put("etc/hostname", file_node(b"box\n"))
    injector.put("etc/fstab", file_node(b"fstab"))
    injector.remove(".dockerenv")
    injector.finish()
    added, removed = read_record(tree)
    assert removed == {b".dockerenv"}
    known = Known(added, frozenset(removed))
    assert changes(base, tree, known) == []
    tree.put("etc/fstab", file_node(b"changed since"))
    tree.put("boot/grub/mine", file_node(b"mine"))
    assert [path for path, _ in changes(base, tree, known)] == [b"boot/grub/mine", b"etc/fstab"]


def test_a_record_that_makes_no_sense_is_passed_over() -> None:
    tree = Tree()
    tree.put(".diskmorph/added", file_node(b'not json\n{"path": 5}\n[]\n{"path": "YQ=="}\n{"path": "!"}\n'))
    added, removed = read_record(tree)
    assert set(added) == {b".diskmorph/added"}
    assert removed <= {b"a", b""}
    assert read_record(Tree()) == ({}, set())


def test_a_name_on_the_disk_is_no_whiteout(tmp_path: Path) -> None:
    """Whoever may write to the disk must not hide the base's files by a name."""
    base = oci_layout(tmp_path / "base", layers())
    disk = built(tmp_path, base)
    (tmp_path / "new").write_bytes(b"x")
    change(disk, *(f"write {tmp_path}/new etc/{name}" for name in (".wh.passwd", ".wh..wh..opq", "kept")))
    report = commit(disk, f"oci:{tmp_path}/out", options=options(base))
    assert [line.split(":")[0] for line in report.lost] == ["etc/.wh..wh..opq", "etc/.wh.passwd"]
    extracted = extract(disk, f"oci:{tmp_path}/whole")
    assert [line.split(":")[0] for line in extracted.lost] == ["etc/.wh..wh..opq", "etc/.wh.passwd"]
    for image in ("out", "whole"):
        with open_tree(f"oci:{tmp_path}/{image}") as tree:
            assert {b"passwd", b"group", b"kept"} <= set(tree.find("etc").children)  # type: ignore[union-attr]
    assert extract(disk, tmp_path / "plain.tar").lost == ()


def test_the_root_directory_itself_is_kept(tmp_path: Path) -> None:
    base = oci_layout(tmp_path / "base", layers())
    disk = built(tmp_path, base)
    change(disk, "sif <2> mode 0040711", "sif <2> uid 7")
    commit(disk, f"oci:{tmp_path}/out", options=options(base))
    extract(disk, f"oci:{tmp_path}/whole")
    for image in ("out", "whole"):
        with open_tree(f"oci:{tmp_path}/{image}") as tree:
            assert (tree.root.mode, tree.root.uid) == (0o40711, 7)
        run("skopeo", "copy", "-q", f"oci:{tmp_path}/{image}", f"oci:{tmp_path}/{image}2:latest")
        run("umoci", "unpack", "--image", f"{tmp_path}/{image}2:latest", tmp_path / f"{image}3")
        found = (tmp_path / f"{image}3/rootfs").stat()
        assert (found.st_mode, found.st_uid) == (0o40711, 7)
    report = commit(disk, f"oci:{tmp_path}/again", options=options(tmp_path / "out"))
    assert any("nothing changed" in note for note in report.notes)
