"""Disks of 2 TiB whose every cluster is mapped, no two of them in order: tables in seconds and little memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from testkit import GIB, TIB

CLUSTER, SIZE = 64 << 10, 2 * TIB
TABLES = SIZE // CLUSTER // 8192
MEMORY = 210  # MiB, of which Python and NumPy are 30

_CHILD = """
import json, sys, time
from pathlib import Path
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import load, open_disk, require_format
begun = time.process_time()
{body}
# Not getrusage, whose peak is also that of the process which this one was forked from.
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
print(json.dumps(dict(count=count, seconds=time.process_time() - begun, peak=peak)))
"""

_READ = """
backing = Path(sys.argv[2]) if len(sys.argv) > 2 else None
with open_disk(sys.argv[1], parents=Parents(backing=backing)) as disk:
    count = sum(map(len, disk.extents()))
"""

_WRITE = """
import numpy as np
from diskmorph.formats.allocator import NewImage, RUN
size, step = int(sys.argv[2]), 64 << 20
words = dict(word.split("=") for word in sys.argv[3:])
allocator = load(require_format(sys.argv[1])).new_allocator(NewImage(size=size, name="disk", options=words))
count = sum(len(write.data) for write in allocator.begin())
for at in range(0, size, step):
    run = np.zeros(1, RUN)
    run["start"], run["length"] = at, min(step, size - at)
    allocator.place(run)
    count += sum(len(write.data) for write in allocator.settle(at + step))
count += sum(len(write.data) for write in allocator.finish())
"""


def child(body: str, *words: object) -> dict[str, float]:
    """Run code in a process of its own; return what it counted, its seconds of processor time, its peak in MiB."""
    line = [sys.executable, "-c", _CHILD.format(body=body), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def qcow2(path: Path, *, holes: bool = False, backing: str = "") -> Path:
    """A sparse file with tables that map every cluster, or with `holes` every second; neighbours change places."""
    l2 = CLUSTER * 16
    data = l2 + TABLES * CLUSTER
    numbers = np.arange(8192, dtype=np.uint64) ^ np.uint64(1)
    copied = np.uint64(1 << 63)
    with path.open("wb") as file:
        head = struct.pack(
            ">4sIQIIQIIQQIIQ",
            b"QFI\xfb",
            3,
            200 if backing else 0,
            len(backing),
            16,
            SIZE,
            0,
            TABLES,
            CLUSTER,
            0,
            0,
            0,
            0,
        )
        file.write(head + struct.pack(">QQQII", 0, 0, 0, 4, 104))
        file.seek(200)
        file.write(backing.encode())
        file.seek(CLUSTER)
        file.write((np.arange(TABLES, dtype=np.uint64) * CLUSTER + l2 | copied).astype(">u8").tobytes())
        for table in range(TABLES):
            entries = (numbers + np.uint64(table * 8192)) * np.uint64(CLUSTER) + np.uint64(data) | copied
            if holes:
                entries[::2] = 0
            file.seek(l2 + table * CLUSTER)
            file.write(entries.astype(">u8").tobytes())
        file.truncate(data + SIZE)
    return path


def vmdk(path: Path) -> Path:
    """A monolithicSparse VMDK of almost 2 TiB with every grain present; neighbours change places."""
    sectors, grain, entries = (SIZE - 16 * GIB) // 512, 128, 512
    tables = -(-sectors // (grain * entries))
    directory = 128
    first = directory + -(-tables * 4 // 512)
    overhead = -(-(first + tables * 4) // grain) * grain
    with path.open("wb") as file:
        file.write(
            struct.pack(
                "<4sIIQQQQIQQQB4sH",
                b"KDMV",
                1,
                1,
                sectors,
                grain,
                1,
                20,
                entries,
                0,
                directory,
                overhead,
                0,
                b"\n \r\n",
                0,
            )
        )
        descriptor = (
            '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicSparse"\n'
            f'RW {sectors} SPARSE "{path.name}"\n'
        )
        file.seek(512)
        file.write(descriptor.encode())
        file.seek(directory * 512)
        file.write((np.arange(tables, dtype=np.uint32) * 4 + first).astype("<u4").tobytes())
        numbers = np.arange(entries, dtype=np.uint32) ^ np.uint32(1)
        file.seek(first * 512)
        for table in range(tables):
            file.write(((numbers + table * entries) * grain + overhead).astype("<u4").tobytes())
        file.truncate((overhead + sectors) * 512)
    return path


@pytest.mark.slow
def test_extents_of_qcow2(tmp_path: Path) -> None:
    found = child(_READ, qcow2(tmp_path / "disk.qcow2"))
    assert found["count"] == SIZE // CLUSTER
    assert found["seconds"] < 20
    assert found["peak"] < MEMORY


@pytest.mark.slow
def test_extents_of_a_chain(tmp_path: Path) -> None:
    base = qcow2(tmp_path / "base.qcow2")
    found = child(_READ, qcow2(tmp_path / "top.qcow2", holes=True, backing="base.qcow2"), base)
    assert found["count"] == SIZE // CLUSTER
    assert found["seconds"] < 30
    assert found["peak"] < MEMORY


@pytest.mark.slow
def test_extents_of_vmdk(tmp_path: Path) -> None:
    found = child(_READ, vmdk(tmp_path / "disk.vmdk"))
    assert found["count"] == (SIZE - 16 * GIB) // CLUSTER
    assert found["seconds"] < 30
    assert found["peak"] < MEMORY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "size", "words", "tables"),
    [
        ("qcow2", SIZE, (), SIZE // CLUSTER * 8),
        ("vhdx", SIZE, ("block_size=1M",), SIZE // (1 << 20) * 8),
        ("vdi", SIZE, (), SIZE // (1 << 20) * 4),
        ("vhd", 2040 * GIB, (), 2040 * GIB // (2 << 20) * 516),
        ("vmdk", SIZE - 16 * GIB, (), (SIZE - 16 * GIB) // CLUSTER * 4),
    ],
)
def test_tables_are_written(format: str, size: int, words: tuple[str, ...], tables: int) -> None:
    """Every cluster is given a place; no data is moved."""
    found = child(_WRITE, format, size, *words)
    assert tables <= found["count"] < 3 * tables + (4 << 20)
    assert found["seconds"] < 30
    assert found["peak"] < MEMORY
