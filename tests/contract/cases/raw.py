"""raw for the contract suite."""

from pathlib import Path

from testkit import KIB, MIB, AllocatorCase, DiskCase, content, data, little_disk

ODD = 3 * MIB + 777


def sparse(folder: Path) -> tuple[Path, bytes]:
    path = folder / "sparse.raw"
    want = bytearray(ODD)
    with open(path, "wb") as file:
        file.truncate(ODD)
        for at, length in ((64 * KIB, 4096), (MIB + 5, 100), (2 * MIB, 512 * KIB), (ODD - 9, 9)):
            want[at : at + length] = piece = data(at, length)
            file.seek(at)
            file.write(piece)
    return path, bytes(want)


def dense(folder: Path) -> tuple[Path, bytes]:
    path = folder / "dense.img"
    path.write_bytes(want := content(little_disk(2 * MIB + 512)))
    return path, want


def tiny(folder: Path) -> tuple[Path, bytes]:
    path = folder / "tiny.raw"
    path.write_bytes(b"!")
    return path, b"!"


DISKS = [DiskCase("sparse", sparse), DiskCase("dense", dense), DiskCase("one byte", tiny)]
ALLOCATORS = [
    AllocatorCase("raw", "raw", peer="raw"),
    AllocatorCase("raw falloc", "raw", {"preallocation": "falloc"}, peer="raw"),
    AllocatorCase("raw full", "raw", {"preallocation": "full"}, peer="raw"),
]
