"""Directories with an index: clean to e2fsck, every name found by the kernel, hashes as debugfs says them."""

from __future__ import annotations

import os
import random
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from treekit import fsck, mounted, save

from diskmorph.formats.allocator import Identity
from diskmorph.formats.disk import checked
from diskmorph.formats.ext4 import Ext4Options, Ext4Writer, directories, htree
from diskmorph.formats.registry import open_disk
from diskmorph.formats.tree import Tree, file_node
from diskmorph.formats.volumes import open_volume

from testkit import run

if TYPE_CHECKING:
    from pathlib import Path

SEED = Identity(b"seed").uuid("ext4 directory hash")


def tree_of(names: list[bytes], folder: bytes = b"big") -> Tree:
    """A directory of names that all mean one file."""
    tree = Tree()
    one = file_node(b"content")
    for name in names:
        tree.put(folder + b"/" + name, one)
    return tree


def image_of(tree: Tree, path: Path, **more: int) -> Path:
    writer = Ext4Writer(Ext4Options(identity=Identity(b"seed")))
    writer.take(tree)
    save(checked(writer.disk(**more)), path)
    fsck(path)
    return path


def dump(image: Path, folder: str = "/big") -> str:
    return run("debugfs", "-R", f"htree_dump {folder}", image).stdout


def all_lengths(count: int, seed: int = 1) -> list[bytes]:
    """Names of every length and every byte that a name may have."""
    rng = random.Random(seed)
    allowed = bytes(byte for byte in range(256) if byte not in b"/\0")
    return [b"%06d" % number + bytes(rng.choices(allowed, k=rng.randrange(250))) for number in range(count)]


def found_by_kernel(image: Path, names: list[bytes], folder: bytes = b"big") -> None:
    with mounted(image, "ro,noload") as point:
        place = os.fsencode(point) + b"/" + folder + b"/"
        assert sorted(os.listdir(place)) == sorted(names)
        for name in names:
            os.lstat(place + name)
        for number in range(200):
            assert not os.path.lexists(place + b"absent-%d" % number)


@pytest.mark.parametrize(("count", "levels"), [(30, 0), (700, 0), (9000, 1)])
def test_every_name_is_found(tmp_path: Path, count: int, levels: int) -> None:
    names = all_lengths(count) if levels == 0 else [b"%06d" % n + b"\xff" * 249 for n in range(count)]
    image = image_of(tree_of(names), tmp_path / "image")
    text = dump(image)
    assert f"Indirect levels: {levels}" in text
    assert "Hash Version: 1" in text
    found_by_kernel(image, names)
    with open_volume(open_disk(image)) as tree:
        assert set(tree.root.children[b"big"].children) == set(names)


def test_one_block_has_no_index(tmp_path: Path) -> None:
    names = [b"%03d" % number for number in range(335)]  # 12 bytes each, 24 for `.` and `..`: 4044 of 4084
    image = image_of(tree_of(names), tmp_path / "image")
    assert "Not a hash-indexed directory" in run("debugfs", "-R", "htree_dump /big", image).stderr
    names += [b"%03d" % number for number in range(335, 340)]
    image = image_of(tree_of(names), tmp_path / "image")
    assert "limit): 507" in dump(image)
    found_by_kernel(image, names)


def test_the_root_itself(tmp_path: Path) -> None:
    names = [b"name-%05d-\xe9" % number for number in range(3000)]
    image = image_of(tree_of(names, b""), tmp_path / "image")
    with mounted(image, "ro,noload") as point:
        assert sorted(os.listdir(os.fsencode(point))) == sorted([*names, b"lost+found"])
        for name in names:
            os.lstat(os.fsencode(point) + b"/" + name)


def test_the_kernel_goes_on_with_it(tmp_path: Path) -> None:
    names = all_lengths(900)
    image = image_of(tree_of(names), tmp_path / "image", slack=8 << 20, inodes=4000)
    with mounted(image, "rw") as point:
        place = os.fsencode(point) + b"/big/"
        for number in range(3000):
            with open(place + b"new-%d" % number, "xb"):
                pass
        for name in names[::2]:
            os.unlink(place + name)
        left = sorted([*names[1::2], *(b"new-%d" % number for number in range(3000))])
        assert sorted(os.listdir(place)) == left
    fsck(image)


def test_names_of_one_hash_that_lie_in_two_blocks(tmp_path: Path) -> None:
    names = [b"%08d" % number for number in range(200_000)]
    hashes = htree.name_hashes(names, SEED.bytes)
    order = np.argsort(hashes, kind="stable")
    twins = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    per = 4084 // 16  # names of a block
    at = int(twins[twins >= per][0])
    chosen = [names[number] for number in order[at - per + 1 : at + 2 * per].tolist()]
    image = image_of(tree_of(chosen), tmp_path / "image")
    second = re.search(r"Entry #1: Hash 0x([0-9a-f]+)", dump(image))
    assert second is not None
    assert int(second[1], 16) == int(hashes[order[at]]) | 1, "both names lie in one block: the test says nothing"
    found_by_kernel(image, chosen)


def test_hashes_are_debugfs(tmp_path: Path) -> None:
    rng = random.Random(3)
    names = [bytes(rng.choices(b"abcdefgXYZ0189", k=length)) for length in range(1, 256)]
    (tmp_path / "words").write_bytes(
        b"".join(b"dx_hash -h half_md4 -s %s %s\n" % (str(SEED).encode(), n) for n in names)
    )
    text = run("debugfs", "-f", tmp_path / "words").stdout
    want = [int(word, 16) for word in re.findall(r" is 0x([0-9a-f]+)", text)]
    assert htree.name_hashes(names, SEED.bytes).tolist() == want


def test_the_last_hash_is_never_given(monkeypatch: pytest.MonkeyPatch) -> None:
    state = np.full((1, 4), 0xFFFFFFFF, np.uint32)
    monkeypatch.setattr(htree, "_transformed", lambda *_: state)
    assert htree.name_hashes([b"x"], SEED.bytes).tolist() == [0xFFFFFFFC]


def test_a_directory_that_grows_from_layer_to_layer(tmp_path: Path) -> None:
    tree = tree_of([b"%04d" % number for number in range(20)])
    one = Ext4Writer(Ext4Options(identity=Identity(b"seed")))
    states, names = [one.take(tree)], []
    for reach in (20, 400, 9000, 300, 15):
        now = [b"%04d" % number + b"x" * (200 if reach == 9000 else 0) for number in range(reach)]
        for name in set(tree.root.children[b"big"].children) - set(now):
            tree.remove(b"big/" + name)
        shared = file_node(b"more")
        for name in now:
            if name not in tree.root.children[b"big"].children:
                tree.put(b"big/" + name, shared)
        states.append(one.take(tree))
        names.append(now)
    for number, state in enumerate(states):
        image = save(one.disk(state=state), tmp_path / f"image-{number}")
        fsck(image)
        if number:
            found_by_kernel(image, names[number - 1])


def test_more_than_two_levels_stay_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MOST_LEAVES", 3)
    names = all_lengths(400)
    image = image_of(tree_of(names), tmp_path / "image")
    assert "Not a hash-indexed directory" in run("debugfs", "-R", "htree_dump /big", image).stderr
    found_by_kernel(image, names)
