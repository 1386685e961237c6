"""Make a disk with real files on it, convert it into every format and back, compare. Run by `make demo`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import diskmorph
from diskmorph.formats.gpt import Partition, build_gpt

MIB = 1 << 20
SIZE = 512 * MIB
COMMAND = [sys.executable, "-m", "diskmorph"]
TARGETS = (
    ("disk.qcow2",),
    ("small.qcow2", "--compress", "zstd"),
    ("disk.vmdk",),
    ("stream.vmdk", "-o", "subformat=streamOptimized"),
    ("disk.vdi",),
    ("disk.vhd",),
    ("azure.vhd", "--for", "azure"),
    ("disk.vhdx",),
    ("back.raw",),
)


def make_disk(path: Path) -> None:
    """Write a GPT disk with one partition of Python's own library: as ext4 where mke2fs is at hand, else as it is."""
    root = Partition(1, "0FC63DAF-8483-4772-8E79-3D69D8477DE4", "root", MIB, SIZE - 2 * MIB, str(uuid.uuid4()))
    head, tail = build_gpt(SIZE, [root], disk_guid=uuid.uuid4())
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(head)
        file.seek(SIZE - len(tail))
        file.write(tail)
    fill(path, root)


def fill(path: Path, root: Partition) -> None:
    """Put Python's library into the partition."""
    library = Path(sys.base_prefix, "lib", f"python3.{sys.version_info.minor}")
    mke2fs = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin")
    if mke2fs is not None:
        with tempfile.TemporaryDirectory() as tree:
            shutil.copytree(library, tree, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*-packages"))
            place = ["-E", f"offset={root.start}", "-d", tree, str(path), f"{root.length // 1024}k"]
            subprocess.run([mke2fs, "-q", "-t", "ext4", "-L", "demo", *place], check=True)
        return
    with path.open("r+b") as file:
        file.seek(root.start)
        for source in sorted(library.rglob("*.py")):
            file.write(source.read_bytes())


def say(folder: Path, *words: str) -> None:
    """Run diskmorph as a user would, and show the command."""
    print(f"\n$ diskmorph {' '.join(words)}", flush=True)
    subprocess.run([*COMMAND, *words], check=True, cwd=folder)


def main() -> None:
    """Make the disk, convert and compare; exit 1 where content is not the same."""
    with tempfile.TemporaryDirectory(prefix="diskmorph-demo-") as name:
        folder = Path(name)
        make_disk(folder / "disk.raw")
        say(folder, "info", "disk.raw")
        say(folder, "map", "disk.raw")
        previous = "disk.raw"
        want = diskmorph.digest(folder / previous).digest
        for target, *words in TARGETS:
            say(folder, "convert", *words, previous, target)
            found = diskmorph.digest(folder / target).digest
            if found != want:
                sys.exit(f"{target}: the content is not the same: {found}, expected {want}")
            previous = target
        print(f"\nEvery one of them was read back and holds the same content, sha256 {want}.")


if __name__ == "__main__":
    main()
