"""What tests of trees share: a tree with everything that root file systems hold, snapshots of it, tar by hand, mounts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testkit import data, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.tree import Tree

EPOCH = 1_700_000_000
_NONE = 0xFFFFFFFF
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 6, _NONE), (2, 7, 4242), (4, 4, _NONE), (8, 5, 4343), (16, 7, _NONE), (32, 4, _NONE))
)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)

Snapshot = dict[bytes, dict[str, Any]]


def put(root: Path, name: str, content: bytes = b"", mode: int = 0o644, uid: int = 0, gid: int = 0) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def sample_tree(root: Path, *, special: bool = True, xattrs: bool = True) -> Path:
    """Fill `root` with what converters lose: owners, modes, times, links, devices, holes, xattrs, odd names."""
    root.mkdir(parents=True, exist_ok=True)
    put(root, "etc/hostname", b"box\n")
    put(root, "etc/os-release", b'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian 12"\n')
    put(root, "etc/shadow", b"root:*::0:::::\n", 0o640, 0, 42)
    put(root, "usr/bin/suid", b"\x7fELF" + b"s" * 5000, 0o4755)
    put(root, "empty")
    put(root, "one-block", data("block", 4096))
    put(root, "big", data("big", 2_500_001), 0o600, 1234567, 7654321)
    put(root, "zero-tail", b"x" * 5000 + bytes(50_000))
    for number in range(120):
        put(root, f"many/file-{number:04}", b"%d" % number * (number % 50))
    put(root, "n" * 255, b"longest name")
    put(root, "söme/кирил/日本語.txt", "é".encode())
    put(root, "/".join(f"d{i}" for i in range(40)) + "/leaf", b"leaf")
    put(root, os.fsdecode(b"latin1-\xe9\xff"), b"bytes")
    for name, target in (("link", "etc/hostname"), ("abs", "/usr/bin/suid"), ("broken", "no/such"), ("l59", "a" * 59)):
        (root / name).symlink_to(target)
    for length in (60, 200):
        (root / f"l{length}").symlink_to("b" * length)
    os.lchown(root / "link", 3, 4)
    os.link(root / "big", root / "etc/hard-b")
    os.link(root / "big", root / "many/hard-a")
    with (root / "sparse").open("wb") as file:
        file.truncate(32 << 20)
        file.seek(10 << 20)
        file.write(b"island" * 1000)
        file.seek((32 << 20) - 7)
        file.write(b"the end")
    for name, mode in (("tmp", 0o1777), ("srv/private", 0o700), ("emptydir", 0o750)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(mode)
    if special:
        os.mknod(root / "fifo", stat.S_IFIFO | 0o620)
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(root / "high", stat.S_IFBLK | 0o600, os.makedev(511, 70000))
    if xattrs:
        _xattrs(root)
    _times(root)
    return root


def _xattrs(root: Path) -> None:
    os.setxattr(root / "etc/hostname", "user.note", b"hello\0world\xff")
    os.setxattr(root / "srv", "user.dir", b"on a directory")
    os.setxattr(root / "one-block", "user.large", bytes(range(256)) * 8)
    os.setxattr(root / "one-block", "trusted.thing", b"y")
    os.setxattr(root / "usr/bin/suid", "security.capability", CAPABILITY)
    os.setxattr(root / "etc/shadow", "system.posix_acl_access", ACL)
    os.setxattr(root / "srv/private", "system.posix_acl_default", ACL)


def _times(root: Path) -> None:
    for folder, folders, files in os.walk(os.fsencode(root), topdown=False):
        for index, name in enumerate(sorted(folders + files)):
            stamp = (EPOCH - index * 86_401) * 10**9 + 123_456_789
            os.utime(os.path.join(folder, name), ns=(stamp, stamp), follow_symlinks=False)
    os.utime(root / "empty", (1, 1))
    os.utime(root / "one-block", (1, 4_102_444_800))  # the year 2100
    os.utime(root, (EPOCH, EPOCH))


def snapshot(root: Path | str) -> Snapshot:
    """Everything a tree on the machine says, by path."""
    top = os.fsencode(root)
    entries: Snapshot = {}
    groups: dict[tuple[int, int], list[bytes]] = {}
    stack = [b""]
    while stack:
        folder = stack.pop()
        for name in os.listdir(os.path.join(top, folder)):
            path = os.path.join(folder, name)
            if path == b"lost+found":
                continue
            full = os.path.join(top, path)
            status = os.lstat(full)
            entries[path] = _entry(full, status)
            if stat.S_ISDIR(status.st_mode):
                stack.append(path)
            elif status.st_nlink > 1:
                groups.setdefault((status.st_dev, status.st_ino), []).append(path)
    for names in groups.values():
        for name in names:
            entries[name]["links"] = sorted(names)
    return entries


def _entry(full: bytes, status: os.stat_result) -> dict[str, Any]:
    kind = stat.S_IFMT(status.st_mode)
    entry: dict[str, Any] = {"kind": kind, "uid": status.st_uid, "gid": status.st_gid, "mtime": status.st_mtime_ns}
    with contextlib.suppress(OSError):
        names = os.listxattr(full, follow_symlinks=False)
        entry["xattrs"] = {name: os.getxattr(full, name, follow_symlinks=False) for name in names}
    if kind == stat.S_IFLNK:
        return {**entry, "target": os.readlink(full)}
    entry["mode"] = stat.S_IMODE(status.st_mode)
    if kind == stat.S_IFREG:
        entry["size"] = status.st_size
        with open(full, "rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if kind in {stat.S_IFCHR, stat.S_IFBLK}:
        entry["device"] = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return entry


def told(tree: Tree) -> Snapshot:
    """The same of a Tree, read from its nodes."""
    entries: Snapshot = {}
    groups: dict[int, list[bytes]] = {}
    for path, node in tree.walk():
        if not path or path == b"lost+found":
            continue
        xattrs = {os.fsdecode(name): value for name, value in node.xattrs.items()}
        entry: dict[str, Any] = {
            "kind": node.kind,
            "uid": node.uid,
            "gid": node.gid,
            "mtime": node.mtime,
            "xattrs": xattrs,
        }
        if node.kind == stat.S_IFLNK:
            entry["target"] = node.target
        else:
            entry["mode"] = node.mode & 0o7777
        if node.kind == stat.S_IFREG:
            entry["size"] = node.size
            entry["sha256"] = hashlib.sha256(node.read()).hexdigest()
        if node.kind in {stat.S_IFCHR, stat.S_IFBLK}:
            entry["device"] = node.rdev
        if not node.is_dir:
            groups.setdefault(id(node), []).append(path)
        entries[path] = entry
    for names in groups.values():
        if len(names) > 1:
            for name in names:
                entries[name]["links"] = sorted(names)
    return entries


def same(expected: Snapshot, found: Snapshot, *drop: str, seconds: bool = False) -> None:
    """Assert that two snapshots say the same but for some fields; `seconds`: compare times in whole seconds."""
    complaints = [f"{path!r} is missing" for path in expected if path not in found]
    complaints += [f"{path!r} is extra" for path in found if path not in expected]
    for path in sorted(set(expected) & set(found)):
        one, other = expected[path], found[path]
        for name in sorted(set(one) | set(other) - set(drop)):
            a, b = one.get(name), other.get(name)
            if name in drop or (not a and not b):
                continue
            if name == "mtime" and seconds:
                a, b = a // 10**9, b // 10**9
            if a != b:
                complaints.append(f"{path!r}: {name} {str(a)[:80]} became {str(b)[:80]}")
    assert not complaints, f"{len(complaints)} differences: " + "; ".join(complaints[:5])


def without_acls(entries: Snapshot) -> Snapshot:
    drop = ("system.posix_acl_access", "system.posix_acl_default")
    return {
        path: {**entry, "xattrs": {k: v for k, v in entry.get("xattrs", {}).items() if k not in drop}}
        for path, entry in entries.items()
    }


def save(disk: Disk, path: Path) -> Path:
    """Write a disk's content as a sparse file."""
    with path.open("wb") as file:
        file.truncate(disk.size)
        for batch in disk.extents():
            for row in batch[batch["kind"] == 0]:
                file.seek(int(row["start"]))
                file.write(disk.files[int(row["file"])].read(int(row["offset"]), int(row["length"])))
    return path


def tar_entry(
    name: bytes | str,
    content: bytes = b"",
    type: bytes = b"0",
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = EPOCH,
    link: bytes | str = b"",
    dev: tuple[int, int] = (0, 0),
    pax: dict[str, bytes] | None = None,
    magic: bytes = b"ustar\x0000",
    size: int | None = None,
    prefix: bytes = b"",
) -> bytes:
    """One member of a tar archive, made by hand, its PAX header before it."""
    name, link = os.fsencode(name), os.fsencode(link)
    head = tar_entry("PaxHeaders/x", pax_records(pax), b"x") if pax else b""

    def octal(value: int, width: int) -> bytes:
        return b"%0*o\0" % (width - 1, value)

    length = len(content) if size is None else size
    header = bytearray(name[:100].ljust(100, b"\0") + octal(mode, 8) + octal(uid, 8) + octal(gid, 8))
    header += octal(length, 12) + octal(mtime, 12) + b" " * 8 + type + link[:100].ljust(100, b"\0") + magic
    header += bytes(64) + octal(dev[0], 8) + octal(dev[1], 8) + prefix.ljust(155, b"\0") + bytes(12)
    return head + sealed(header) + content + bytes(-len(content) % 512)


def sealed(header: bytes | bytearray) -> bytes:
    """A header with its checksum made right."""
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_records(records: dict[str, bytes]) -> bytes:
    body = b""
    for key, value in records.items():
        rest = b" " + key.encode() + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length += 1
        body += str(length).encode() + rest
    return body


def tar_file(*entries: bytes) -> bytes:
    return b"".join(entries) + bytes(1024)


@contextlib.contextmanager
def mounted(image: Path, *options: str, fs: str = "ext4") -> Iterator[Path]:
    """The kernel's view of a file-system image."""
    with tempfile.TemporaryDirectory() as point:
        run("mount", "-t", fs, "-o", ",".join(("loop", *(options or ("ro",)))), image, point)
        try:
            yield Path(point)
        finally:
            for _ in range(50):
                if run("umount", point, ok=False).returncode == 0:
                    break
                time.sleep(0.1)


def fsck(image: Path) -> None:
    done = run("e2fsck", "-fn", image, ok=False)
    assert done.returncode == 0, f"e2fsck: {done.returncode}: {done.stdout[-600:]}"
