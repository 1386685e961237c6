"""Trees: names, links and pieces; nothing leads out of them."""

from __future__ import annotations

import stat

import pytest

from diskmorph.formats.errors import FormatError
from diskmorph.formats.limits import Limits
from diskmorph.formats.source import BytesSource
from diskmorph.formats.tree import Node, Piece, Tree, chunks, dir_node, file_node, link_node


def paths(tree: Tree) -> list[bytes]:
    return [path for path, _ in tree.walk()]


def test_walk_yields_parents_first_in_order() -> None:
    tree = Tree()
    for name in ("z/b", "z/a", "a"):
        tree.put(name, file_node(b""))
    assert paths(tree) == [b"", b"z", b"z/b", b"z/a", b"a"]
    assert [path for path, _ in tree.walk(ordered=True)] == [b"", b"a", b"z", b"z/a", b"z/b"]


def test_names_are_made_plain() -> None:
    tree = Tree()
    for name in ("./a", "/b", "c//d/./e", "f/"):
        tree.put(name, file_node(b"") if name != "f/" else dir_node())
    assert paths(tree) == [b"", b"a", b"b", b"c", b"c/d", b"c/d/e", b"f"]


@pytest.mark.parametrize("name", ["../a", "a/../../b", "a/..", "..", b"a\0b", b"x\0/b"])
def test_names_that_leave_the_tree_are_refused(name: str | bytes) -> None:
    tree = Tree()
    with pytest.raises(FormatError, match="not allowed"):
        tree.put(name, file_node(b""))


def test_the_root_takes_attributes_of_a_directory_only() -> None:
    tree = Tree()
    tree.put("./", dir_node(0o711, 5, 6, 7))
    assert (tree.root.mode, tree.root.uid, tree.root.gid, tree.root.mtime) == (stat.S_IFDIR | 0o711, 5, 6, 7)
    with pytest.raises(FormatError, match="root"):
        tree.put("", file_node(b"x"))


def test_links_on_the_way_are_followed_within_the_tree() -> None:
    tree = Tree()
    tree.put("usr/lib", dir_node())
    tree.put("lib", link_node(b"usr/lib"))
    tree.put("lib/one", file_node(b"1"))
    tree.put("out", link_node(b"/etc/../../../../outside"))
    tree.put("out/two", file_node(b"2"))
    assert b"usr/lib/one" in paths(tree)
    assert b"outside/two" in paths(tree)
    assert tree.find("lib/one") is tree.find("usr/lib/one")
    assert tree.find("lib", follow=False) is not tree.find("lib")


def test_links_that_loop_end() -> None:
    tree = Tree()
    tree.put("a", link_node(b"b"))
    tree.put("b", link_node(b"a"))
    assert tree.find("a") is None
    assert tree.find("a", follow=False) is not None
    with pytest.raises(FormatError, match="leads through"):
        tree.put("a/x", file_node(b""))


def test_a_name_through_a_file_is_refused() -> None:
    tree = Tree()
    tree.put("a", file_node(b""))
    with pytest.raises(FormatError, match="leads through"):
        tree.put("a/b", file_node(b""))


def test_the_last_of_two_names_counts_and_comes_last() -> None:
    tree = Tree()
    tree.put("a", file_node(b"1"))
    tree.put("b", file_node(b"2"))
    tree.put("a", file_node(b"3"))
    assert paths(tree) == [b"", b"b", b"a"]
    found = tree.find("a")
    assert found is not None
    assert found.read() == b"3"


def test_a_directory_over_a_directory_keeps_node_and_children() -> None:
    tree = Tree()
    tree.put("d/x", file_node(b""))
    before = tree.find("d")
    tree.put("d", dir_node(0o700, 1, 2, 3))
    after = tree.find("d")
    assert after is before
    assert after is not None
    assert (after.mode & 0o7777, after.uid, list(after.children)) == (0o700, 1, [b"x"])


def test_replacing_a_directory_takes_its_content_away() -> None:
    tree = Tree()
    tree.put("d/sub/x", file_node(b""))
    tree.put("d", file_node(b"now a file"))
    assert paths(tree) == [b"", b"d"]
    tree.put("d", link_node(b"e"))
    tree.put("e", dir_node())
    tree.put("d/y", file_node(b""))  # the folder cache must not remember the old d
    assert paths(tree) == [b"", b"d", b"e", b"e/y"]


def test_remove_forgets_folders() -> None:
    tree = Tree()
    tree.put("a/b/c", file_node(b""))
    assert tree.remove("a") is not None
    assert tree.remove("a") is None
    assert tree.remove("no/such") is None
    tree.put("a/b/d", file_node(b""))
    assert paths(tree) == [b"", b"a", b"a/b", b"a/b/d"]


def test_hard_links_share_the_node() -> None:
    tree = Tree()
    tree.put("a", file_node(b"1"))
    tree.link("b/c", "./a")
    assert tree.find("a") is tree.find("b/c")
    tree.put("s", link_node(b"a"))
    tree.link("t", "s")
    found = tree.find("t", follow=False)
    assert found is not None
    assert found.kind == stat.S_IFLNK


@pytest.mark.parametrize("target", ["none", "d", "x"])
def test_hard_links_to_nothing_or_a_directory_are_refused(target: str) -> None:
    tree = Tree()
    tree.put("d", dir_node())
    with pytest.raises(FormatError, match="hard link"):
        tree.link("x", target)
    with pytest.raises(FormatError, match="not allowed"):
        tree.link("x", "../d")


def test_limits_bound_names() -> None:
    tree = Tree(limits=Limits(directory_entries=10))
    with pytest.raises(FormatError, match="more than 10 names"):
        for number in range(20):
            tree.put(f"{number}", file_node(b""))

    lazy = Node(stat.S_IFDIR | 0o755, children=lambda: {b"%d" % n: file_node(b"") for n in range(20)})
    with pytest.raises(FormatError, match="more than 10 names"):
        list(Tree(lazy, limits=Limits(directory_entries=10)).walk())


def test_children_are_read_when_first_asked_for() -> None:
    calls = []

    def read() -> dict[bytes, Node]:
        calls.append(1)
        return {b"x": file_node(b"")}

    node = Node(stat.S_IFDIR | 0o755, children=read)
    assert not calls
    assert list(node.children) == list(node.children) == [b"x"]
    assert calls == [1]
    unread = Node(stat.S_IFDIR | 0o755, children=read)
    unread.clear()
    assert not unread.children
    assert calls == [1]


def sparse_node() -> Node:
    source = BytesSource(b"abcdefghij")
    return Node(stat.S_IFREG, size=30, pieces=(Piece(5, 3, source, 0), Piece(8, 2, source, 7), Piece(20, 5, source, 5)))


def test_pieces_read_with_holes_between() -> None:
    want = bytes(5) + b"abc" + b"hi" + bytes(10) + b"fghij" + bytes(5)
    source = sparse_node().source()
    assert source.read(0, 30) == want
    for start in range(30):
        for stop in range(start, 31):
            assert source.read(start, stop - start) == want[start:stop]
    assert b"".join(chunks(sparse_node(), 7)) == want
    with pytest.raises(FormatError):
        source.read(25, 6)


def test_runs_tell_holes() -> None:
    runs = list(sparse_node().source().runs(0, 30))
    assert runs == [(0, 5, False), (5, 3, True), (8, 2, True), (10, 10, False), (20, 5, True), (25, 5, False)]
    assert list(sparse_node().source().runs(6, 9)) == [(6, 2, True), (8, 1, True)]
