"""ISO for the contract suite: read as the plain disk that it is."""

from pathlib import Path

from diskmorph.formats.iso.writer import IsoLayout, IsoOptions
from diskmorph.formats.tree import Tree, file_node

from testkit import DiskCase, data


def _iso(folder: Path) -> tuple[Path, bytes]:
    tree = Tree()
    for number in range(20):
        tree.put(f"dir{number % 3}/file {number}", file_node(data(number, number * 1000)))
    disk = IsoLayout(tree, IsoOptions(label="CONTRACT")).image()
    path = folder / "disc.iso"
    want = disk.read(0, disk.size)
    path.write_bytes(want)
    return path, want


DISKS = [DiskCase("iso", _iso)]
ALLOCATORS: list = []
