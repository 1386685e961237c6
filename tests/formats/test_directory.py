"""Directories of the machine: read without following links, written whole or not at all, never outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from treekit import put, same, sample_tree, snapshot, told

import diskmorph
from diskmorph.formats.directory import DirectoryTarget, read_directory
from diskmorph.formats.errors import FormatError, IntegrityError, SourceError, TargetError
from diskmorph.formats.source import BytesSource, FileSource
from diskmorph.formats.tree import Node, Piece, Tree, dir_node, file_node, link_node
from diskmorph.formats.trees import open_tree

NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all")


def write(tree: Tree, path: Path) -> list[str]:
    lost: list[str] = []
    with DirectoryTarget(path, sync=False) as target:
        target.write(tree, lost)
        target.commit()
    return lost


def test_read_is_what_the_kernel_says(tmp_path: Path) -> None:
    root = sample_tree(tmp_path / "tree")
    with read_directory(root) as tree:
        same(snapshot(root), told(tree))
        sparse = tree.find("sparse")
        assert sparse is not None
        assert sum(piece.length for piece in sparse.pieces) < 1 << 20


def test_round_trip(tmp_path: Path) -> None:
    root = sample_tree(tmp_path / "tree")
    with read_directory(root) as tree:
        lost = write(tree, tmp_path / "out")
    same(snapshot(root), snapshot(tmp_path / "out"))
    assert lost == []
    assert (tmp_path / "out/sparse").stat().st_blocks * 512 < 1 << 20
    assert {p.name for p in tmp_path.iterdir()} == {"tree", "out"}


def test_a_socket_is_no_trouble(tmp_path: Path) -> None:
    put(tmp_path / "tree", "a", b"x")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "tree/s"))
        with read_directory(tmp_path / "tree") as tree:
            write(tree, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a", "s"}


def test_a_file_changed_after_it_was_seen_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "tree", "a", b"x" * 100)
    put(tmp_path / "tree", "b", b"x" * 100)
    with read_directory(tmp_path / "tree") as tree:
        nodes = [tree.find(name) for name in "ab"]
        put(tmp_path / "tree", "a", b"y" * 101)
        with pytest.raises(IntegrityError, match="changed"):
            nodes[0].read()  # type: ignore[union-attr]
        assert nodes[1].read() == b"x" * 100  # type: ignore[union-attr]
        os.utime(tmp_path / "tree/b", (1, 1))
        with pytest.raises(IntegrityError, match="changed"):
            tree.verify_unchanged()


def test_a_link_put_in_a_folders_place_is_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "tree", "d/secret", b"mine")
    put(tmp_path / "other", "secret", b"not yours")
    with read_directory(tmp_path / "tree") as tree:
        node = tree.find("d/secret")
        assert node is not None
        (tmp_path / "tree/d").rename(tmp_path / "tree/e")
        (tmp_path / "tree/d").symlink_to(tmp_path / "other")
        with pytest.raises(SourceError):
            node.read()


def test_many_files_need_few_descriptors(tmp_path: Path) -> None:
    for number in range(300):
        put(tmp_path / "tree", f"f{number}", b"%d" % number)
    before = len(os.listdir("/proc/self/fd"))  # another test in this process may hold some
    with read_directory(tmp_path / "tree") as tree:
        nodes = dict(tree.root.children)
        for number in (*range(300), *range(300)):
            assert nodes[b"f%d" % number].read() == b"%d" % number
        assert len(os.listdir("/proc/self/fd")) - before < 100


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        read_directory(tmp_path / "none")
    put(tmp_path, "file", b"")
    with pytest.raises(SourceError, match="Not a directory"):
        read_directory(tmp_path / "file")


@pytest.mark.parametrize("name", [b"../x", b"a/b", b"..", b".", b"", b"a\0b"])
def test_names_that_would_lead_out_are_refused(tmp_path: Path, name: bytes) -> None:
    tree = Tree()
    tree.root.children[name] = file_node(b"evil")
    with pytest.raises(FormatError, match="holds the name"):
        write(tree, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_links_in_the_tree_are_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    tree = Tree()
    tree.root.children[b"l"] = link_node(bytes(tmp_path / "outside"))
    inner = dir_node()
    inner.children[b"x"] = file_node(b"evil")
    tree.root.children[b"d"] = inner
    write(tree, tmp_path / "out")
    assert not list((tmp_path / "outside").iterdir())
    assert os.readlink(tmp_path / "out/l") == str(tmp_path / "outside")


def test_existing_targets(tmp_path: Path) -> None:
    put(tmp_path / "full", "mine", b"mine")
    (tmp_path / "empty").mkdir()
    put(tmp_path, "file", b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    tree = Tree()
    tree.put("a", file_node(b"x"))
    write(tree, tmp_path / "empty")
    assert (tmp_path / "empty/a").read_bytes() == b"x"
    for name, words in (("full", "not empty"), ("file", "not a directory"), ("link", "not a directory")):
        with pytest.raises(TargetError, match=words):
            write(tree, tmp_path / name)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    class Broken(BytesSource):
        def pread(self, offset: int, buffer: memoryview) -> int:
            raise SourceError("broken", file="x", offset=offset)

    tree = Tree()
    tree.put("a", file_node(b"x"))
    tree.put("b", Node(0o100644, size=5, pieces=(Piece(0, 5, Broken(b"12345"), 0),)))
    with pytest.raises(SourceError):
        write(tree, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_as_nobody_owners_and_devices_are_told_as_lost(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from diskmorph.formats.directory import DirectoryTarget
from diskmorph.formats.tree import Node, Tree, file_node
tree = Tree()
tree.put("a", file_node(b"x", 0o4755, 5, 6))
tree.put("null", Node(0o020666, rdev=(1, 3)))
tree.link("null2", "null")
lost = []
with DirectoryTarget(Path("out"), sync=False) as target:
    target.write(tree, lost)
    target.commit()
print(lost)
"""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    words = (*NOBODY[:-1], "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")
    done = subprocess.run([*words, sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['devices of 2 files', 'owners of 2 files']"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a"}


def test_holes_in_what_holds_a_file_stay_holes(tmp_path: Path) -> None:
    """An ISO of a sparse file is sparse; so is what is taken out of it. A kernel may copy holes as data."""
    (tmp_path / "in").mkdir()
    with (tmp_path / "in/big").open("wb") as file:
        file.write(b"begin")
        file.truncate(64 << 20)
    diskmorph.convert(tmp_path / "in", tmp_path / "x.iso")
    with open_tree(tmp_path / "x.iso") as tree:
        write(tree, tmp_path / "out")
    assert (tmp_path / "out/big").read_bytes() == (tmp_path / "in/big").read_bytes()
    assert (tmp_path / "out/big").stat().st_blocks * 512 < 1 << 20


def test_a_piece_beyond_its_source_is_refused(tmp_path: Path) -> None:
    """Behind a file's end there is no hole."""
    (tmp_path / "short").write_bytes(bytes(4096))
    root = dir_node()
    with FileSource(tmp_path / "short") as source:
        root.children[b"x"] = Node(0o100644, size=1 << 20, pieces=(Piece(0, 1 << 20, source, 0),))
        with pytest.raises(FormatError, match="truncated"):
            write(Tree(root), tmp_path / "out")


def test_what_the_file_system_cannot_hold_is_told(tmp_path: Path) -> None:
    """One attribute or time too large is no reason to have nothing."""
    tree = Tree()
    tree.put("long", Node(0o100644, xattrs={b"user." + b"n" * 300: b"v", b"user.fine": b"v"}))
    tree.put("large", Node(0o100644, xattrs={b"user.large": bytes(70_000)}))
    tree.put("block", Node(0o100644, xattrs={b"user.k%d" % number: bytes(3000) for number in range(30)}))
    tree.put("far", file_node(b"", mtime=(1 << 55) * 10**9))
    lost: list[str] = []
    with DirectoryTarget(tmp_path / "out", sync=False) as target:
        target.write(tree, lost)
        target.commit()
    assert os.listxattr(tmp_path / "out/long") == ["user.fine"]
    assert [line.split(" of ")[0] for line in lost] == ["extended attributes", "times"]


def test_a_name_that_is_too_long_is_named(tmp_path: Path) -> None:
    tree = Tree()
    tree.put("n" * 300, file_node(b""))
    with DirectoryTarget(tmp_path / "out", sync=False) as target, pytest.raises(TargetError, match=r"too long.*nnn"):
        target.write(tree)
