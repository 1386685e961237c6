"""Disks for the tests of AWS: blocks of 512 KiB, some data, some zeroes, some holes; and ones that boot."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

from aws.fake import BLOCK, Fake, Snapshot

from testkit import MIB, data, run


def block(seed: int) -> bytes:
    return data(("block", seed), 4096) + b"fill" * ((BLOCK - 4096) // 4)


def disk_file(path: Path, indexes: list[int], length: int | None = None, seed: int = 0) -> Path:
    """A sparse raw disk with data in some blocks; it ends within its last block."""
    length = (max(indexes) + 1) * BLOCK - 4096 if length is None else length
    with path.open("wb") as file:
        file.truncate(length)
        for index in indexes:
            file.seek(index * BLOCK)
            file.write(block(seed + index)[: length - index * BLOCK])
    return path


def content(path: Path) -> dict[int, bytes]:
    """The blocks of a raw file that are not zero."""
    raw = path.read_bytes()
    parts = {at // BLOCK: raw[at : at + BLOCK].ljust(BLOCK, b"\0") for at in range(0, len(raw), BLOCK)}
    return {index: part for index, part in parts.items() if any(part)}


def only_snapshot(fake: Fake) -> Snapshot:
    (found,) = fake.account.snapshots.values()
    return found


def holds(snapshot: Snapshot, path: Path) -> None:
    assert snapshot.state == "completed"
    have, want = snapshot.content(), content(path)
    assert sorted(have) == sorted(want)
    assert have == want


def wait(until: Callable[[], bool], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def bootable(path: Path, kind: str) -> Path:
    """A disk of 48 MiB that boots by `bios`, `uefi`, `arm64` (UEFI) or `hybrid`."""
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(48 * MIB)
    code = b"\xeb\x63\x90" + data("code", 300)
    if kind == "bios":
        run("sh", "-c", f"echo 'start=2048, type=83, bootable' | sfdisk -q -X dos {path}")
    else:
        bios = "start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649\n" if kind == "hybrid" else ""
        script = f"{bios}start=4096, size=32768, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\nstart=40960, type=linux\n"
        (path.parent / "script").write_text(script)
        run("sh", "-c", f"sfdisk -q -X gpt {path} < {path.parent / 'script'}")
        machine, name = (0xAA64, "BOOTAA64.EFI") if kind == "arm64" else (0x8664, "BOOTX64.EFI")
        program = (
            (b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)).ljust(64, b"\0") + b"PE\0\0" + struct.pack("<H", machine)
        )
        (path.parent / name).write_bytes(program + bytes(600))
        esp = path.parent / "esp.img"
        esp.unlink(missing_ok=True)
        run("mkfs.vfat", "-C", esp, "16384")
        run("mmd", "-i", esp, "::/EFI", "::/EFI/BOOT")
        run("mcopy", "-i", esp, path.parent / name, f"::/EFI/BOOT/{name}")
        with path.open("r+b") as file:
            file.seek(4096 * 512)
            file.write(esp.read_bytes())
    with path.open("r+b") as file:
        if kind in {"bios", "hybrid"}:
            file.write(code)
            file.seek(2048 * 512)
            file.write(code * 20)
        file.seek(30 * MIB)
        file.write(data("root", MIB))
    return path
