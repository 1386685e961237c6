"""What is read besides disk images: partition tables, file systems, trees, packages, kernels; how each is read whole."""

from __future__ import annotations

import binascii
import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import ovfkit
from formats.test_ami_kernel import bzimage
from formats.test_ami_ramdisk import CODECS, cpio
from formats.test_lvm import volume as lvm_volume

from diskmorph.formats import fsprobe, gpt
from diskmorph.formats.ami.kernel import read_kernel
from diskmorph.formats.ami.manifest import read_manifest
from diskmorph.formats.ami.ramdisk import read_ramdisk
from diskmorph.formats.fat import fat_disk
from diskmorph.formats.iso import open_tree as open_iso
from diskmorph.formats.iso.reader import describe
from diskmorph.formats.iso.writer import IsoLayout, IsoOptions
from diskmorph.formats.limits import Limits
from diskmorph.formats.lvm import groups_of
from diskmorph.formats.lvm.schema import crc_of
from diskmorph.formats.packages import open_package
from diskmorph.formats.source import FileSource
from diskmorph.formats.tree import Tree, dir_node, file_node, link_node
from diskmorph.formats.trees import open_tree
from diskmorph.formats.views import SourceDisk
from diskmorph.formats.volumes import open_volume

from testkit import KIB, MIB, data

_FILES = 20_000
_READ = 4096


# --- looking: each yields what it sees, to be hashed


def _tree(tree: Tree) -> Iterator[Any]:
    with tree:
        for number, (path, node) in enumerate(tree.walk()):
            yield path, node.mode, node.uid, node.size, node.target, node.rdev, sorted(node.xattrs.items())
            if node.kind == 0o100000:
                yield node.source().read_upto(0, _READ)
            if number > _FILES:
                return


def _partitions(path: Path) -> Iterator[Any]:
    with FileSource(path) as source:
        disk = SourceDisk(source)
        yield fsprobe.probe(disk)
        for partition in gpt.read_partitions(disk):
            yield partition
            if partition.start < disk.size:
                yield fsprobe.probe(disk, partition.start, min(partition.length, disk.size - partition.start))


def _volume(path: Path) -> Iterator[Any]:
    yield from _tree(open_volume(SourceDisk(FileSource(path))))


def _lvm(path: Path) -> Iterator[Any]:
    disk = SourceDisk(FileSource(path))
    found = groups_of([disk], Limits(), name=str(path))
    for error in found.failures.values():
        raise error
    for group in found.groups:
        yield group.name, group.uuid, group.extent_size, [(one.uuid, one.start, one.extents) for one in group.members]
        for volume in group.volumes:
            yield volume.name, volume.size, volume.kind, volume.opened().read(0, min(volume.size, _READ))


def _iso(path: Path) -> Iterator[Any]:
    yield repr(describe(FileSource(path)))
    yield from _tree(open_iso(FileSource(path)))


def _package(path: Path) -> Iterator[Any]:
    with open_package(path, parents=path.parent) as package:
        yield package.machines
        for disk in package.disks[:8]:
            with package.open_disk(disk.number) as opened:
                yield opened.read(0, min(opened.size, MIB))


def _kernel(path: Path) -> Iterator[Any]:
    with FileSource(path) as source:
        yield read_kernel(source).as_dict()


def _ramdisk(path: Path) -> Iterator[Any]:
    with FileSource(path) as source:
        yield read_ramdisk(source).as_dict()


def _manifest(path: Path) -> Iterator[Any]:
    yield read_manifest(path.read_bytes(), file=str(path), limits=Limits()).as_dict()


LOOKS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "partitions": _partitions,
    "ext4": _volume,
    "fat": _volume,
    "lvm": _lvm,
    "iso": _iso,
    "tar": lambda path: _tree(open_tree(path, format="tar")),
    "oci": lambda path: _tree(open_tree(path)),
    "ovf": _package,
    "kernel": _kernel,
    "ramdisk": _ramdisk,
    "manifest": _manifest,
}


def look(kind: str, path: Path) -> str:
    """Read a file as `kind` and return a digest of what was seen."""
    sha = hashlib.sha256()
    for seen in LOOKS[kind](path):
        sha.update(repr(seen).encode())
    return sha.hexdigest()


# --- making: each writes one file into a folder and returns its name


def _small_tree() -> Tree:
    tree = Tree()
    tree.put("etc", dir_node(0o750, 1000, 1001))
    tree.put("etc/hostname", file_node(b"box\n"))
    tree.put("link", link_node(b"etc/hostname"))
    tree.put("far", link_node(b"/" + b"/".join([b"x" * 120, b"..", b"y" * 200])))
    tree.put("n" * 200, file_node(data(1, 5000)))
    for number in range(40):
        tree.put(f"many/file number {number:04d}", file_node(b"%d" % number))
    return tree


def _write(name: str, make: Callable[[], bytes]) -> Callable[[Path], str]:
    def made(folder: Path) -> str:
        (folder / name).write_bytes(make())
        return name

    return made


def _whole(disk: Any) -> bytes:
    return bytes(disk.read(0, disk.size))


def _gpt() -> bytes:
    size = 8 * MIB
    root, esp = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
    parts = [
        gpt.Partition(1, esp, "esp", MIB, MIB, "11111111-1111-1111-1111-111111111111"),
        gpt.Partition(2, root, "root", 2 * MIB, 5 * MIB, "22222222-2222-2222-2222-222222222222"),
    ]
    start, end = gpt.build_gpt(size, parts, disk_guid="33333333-3333-3333-3333-333333333333")
    blob = bytearray(size)
    blob[: len(start)] = start
    blob[size - len(end) :] = end
    blob[2 * MIB + 1024 + 0x38 : 2 * MIB + 1024 + 0x3A] = b"\x53\xef"
    return bytes(blob)


def _mbr() -> bytes:
    blob = bytearray(4 * MIB)

    def table(at: int, *entries: tuple[int, int, int]) -> None:
        for number, (kind, start, length) in enumerate(entries):
            struct.pack_into("<BBHBBHII", blob, at + 446 + 16 * number, 0, 0, 0, kind, 0, 0, start, length)
        blob[at + 510 : at + 512] = b"\x55\xaa"

    table(0, (0x83, 64, 512), (0x0F, 1024, 4096))
    table(1024 * 512, (0x83, 64, 256), (0x05, 1024, 1024))
    table(2048 * 512, (0x82, 64, 256), (0x05, 2048, 1024))
    table(3072 * 512, (0x83, 64, 256))
    blob[64 * 512 + 65536 + 64 : 64 * 512 + 65536 + 72] = b"_BHRfS_M"
    return bytes(blob)


def _mkfs(name: str, *words: str) -> Callable[[Path], str]:
    """An ext file system that mke2fs fills; its clock and UUIDs stand still."""

    def made(folder: Path) -> str:
        tree = folder / "tree"
        (tree / "etc").mkdir(parents=True)
        (tree / "etc/hostname").write_bytes(b"box\n")
        (tree / "big").write_bytes(data("big", 300 * KIB))
        os.symlink("etc/hostname", tree / "link")
        os.symlink("x" * 300, tree / "far")
        os.link(tree / "big", tree / "hard")
        for number in range(200):
            (tree / f"file number {number}").write_bytes(b"%d" % number)
        uuid = "12345678-1234-1234-1234-123456789012"
        fixed = ["-U", uuid, "-E", f"hash_seed={uuid},lazy_itable_init=0", "-d", str(tree)]
        environment = {**os.environ, "E2FSPROGS_FAKE_TIME": "1600000000"}
        image = folder / name
        argv = ["mke2fs", "-q", "-F", *words, *fixed, str(image), "4M"]
        subprocess.run(argv, check=True, env=environment, capture_output=True)
        subprocess.run(["rm", "-r", str(tree)], check=True)
        return name

    return made


def _tar(format: int, mode: str = "w") -> Callable[[], bytes]:
    def made() -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode, format=format) as archive:  # type: ignore[call-overload]
            for name, kind, body in (
                ("etc/", tarfile.DIRTYPE, b""),
                ("etc/hostname", tarfile.REGTYPE, b"box\n"),
                ("d/" * 60 + "deep", tarfile.REGTYPE, data("deep", 3000)),
                ("link", tarfile.SYMTYPE, b""),
                ("hard", tarfile.LNKTYPE, b""),
                ("null", tarfile.CHRTYPE, b""),
            ):
                info = tarfile.TarInfo(name)
                info.type, info.size, info.mtime, info.uid = kind, len(body), 1_600_000_000, 1000
                info.linkname = "etc/hostname" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
                if format == tarfile.PAX_FORMAT:
                    info.pax_headers = {"mtime": "1600000000.5", "SCHILY.xattr.user.note": "remark"}
                archive.addfile(info, io.BytesIO(body))
        return out.getvalue()

    return made


def _sparse_tar() -> bytes:
    """GNU sparse 1.0 in PAX, and the old kind with an extension block."""
    parts = b"2\n0\n512\n65536\n512\n".ljust(512, b"\0") + b"a" * 512 + b"b" * 512
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "new",
        "GNU.sparse.realsize": "66048",
    }
    out = ovfkit.pax(**records) + ovfkit.entry("GNUSparseFile.0/new", parts)
    head = bytearray(ovfkit.header("old", 1024, kind=b"S", magic=b"ustar  \0"))
    for number, (start, length) in enumerate(((0, 512), (4096, 512))):
        head[386 + 24 * number : 410 + 24 * number] = b"%011o\0%011o\0" % (start, length)
    head[483:495] = b"%011o\0" % 8192
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(out + head + b"c" * 1024 + bytes(1024))


def _docker() -> bytes:
    """A docker-archive of two layers, the second with whiteouts."""
    layers = [
        _tar(tarfile.PAX_FORMAT)(),
        b"".join((ovfkit.entry("etc/.wh.hostname"), ovfkit.entry("new", b"n"), bytes(1024))),
    ]
    ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["A=b"]},
            "rootfs": {"type": "layers", "diff_ids": ids},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": ["a:b"], "Layers": ["0.tar", "1.tar"]}]).encode()
    members = [("manifest.json", manifest), ("config.json", config), ("0.tar", layers[0]), ("1.tar", layers[1])]
    return b"".join(ovfkit.entry(name, body) for name, body in members) + bytes(1024)


def _oci() -> bytes:
    layer = gzip.compress(_tar(tarfile.PAX_FORMAT)(), mtime=0)
    plain = hashlib.sha256(gzip.decompress(layer)).hexdigest()
    blobs: list[bytes] = []

    def stored(body: bytes, media: str) -> dict[str, Any]:
        blobs.append(body)
        return {
            "mediaType": f"application/vnd.oci.image.{media}",
            "digest": "sha256:" + hashlib.sha256(body).hexdigest(),
            "size": len(body),
        }

    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [f"sha256:{plain}"]}}
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "config": stored(config, "config.v1+json"),
        "layers": [stored(layer, "layer.v1.tar+gzip")],
    }
    index = {"schemaVersion": 2, "manifests": [stored(json.dumps(manifest).encode(), "manifest.v1+json")]}
    members = [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), ("index.json", json.dumps(index).encode())]
    members += [("blobs/sha256/" + hashlib.sha256(blob).hexdigest(), blob) for blob in blobs]
    return b"".join(ovfkit.entry(name, body) for name, body in members) + bytes(1024)


def _ova(manifest: str | None) -> Callable[[Path], str]:
    def made(folder: Path) -> str:
        stream = (Path(__file__).parents[2] / "fixtures/vmdk/stream.vmdk").read_bytes()
        ovfkit.ova(folder / "x.ova", ("x.ovf", ovfkit.envelope()), ("d.vmdk", stream), manifest=manifest)
        return "x.ova"

    return made


def _ovf(folder: Path) -> str:
    (folder / "d.vmdk").write_bytes((Path(__file__).parents[2] / "fixtures/vmdk/stream.vmdk").read_bytes())
    (folder / "x.ovf").write_bytes(ovfkit.envelope())
    return "x.ovf"


_CPIO = cpio(("init", b"#!/bin/sh\n" * 300), ("lib/modules/6.1.0/kernel/ext4.ko", b"m" * 3000))
_MANIFEST = b"""<?xml version="1.0"?><manifest><version>2007-10-10</version><bundler><name>a</name><version>1</version>
<release>2</release></bundler><machine_configuration><architecture>x86_64</architecture></machine_configuration><image>
<name>i</name><user>000000000000</user><type>machine</type><digest algorithm="SHA1">%s</digest><size>1024</size>
<bundled_size>2048</bundled_size><ec2_encrypted_key algorithm="AES-128-CBC">00</ec2_encrypted_key><user_encrypted_key
algorithm="AES-128-CBC">00</user_encrypted_key><ec2_encrypted_iv>00</ec2_encrypted_iv><user_encrypted_iv>00</user_encrypted_iv>
<parts count="1"><part index="0"><filename>i.part.0</filename><digest algorithm="SHA1">%s</digest></part></parts></image>
<signature>00</signature></manifest>""" % (b"0" * 40, b"1" * 40)


def _mend_tar(blob: bytearray) -> None:
    """Make the checksums of headers right again."""
    for at in range(0, len(blob) - 511, 512):
        if blob[at + 257 : at + 262] == b"ustar":
            blob[at + 148 : at + 156] = b" " * 8
            blob[at + 148 : at + 156] = b"%06o\0 " % sum(blob[at : at + 512])


def _mend_gpt(blob: bytearray) -> None:
    for at in (512, len(blob) - 512):
        if at >= 0 and at + 92 <= len(blob) and blob[at : at + 8] == b"EFI PART":
            size, lba = struct.unpack_from("<I", blob, at + 12)[0], struct.unpack_from("<Q", blob, at + 72)[0]
            count, width = struct.unpack_from("<II", blob, at + 80)
            if lba * 512 + count * width <= len(blob):
                struct.pack_into("<I", blob, at + 88, binascii.crc32(blob[lba * 512 : lba * 512 + count * width]))
            blob[at + 16 : at + 20] = bytes(4)
            struct.pack_into("<I", blob, at + 16, binascii.crc32(blob[at : at + min(size, 512)]))


def _mend_lvm(blob: bytearray) -> None:
    """Make the CRCs of label, metadata area and text right again."""
    area = 4096
    if len(blob) < area + 512:
        return
    at, size = struct.unpack_from("<QQ", blob, area + 40)
    if size <= len(blob) and area + at + size <= len(blob):
        struct.pack_into("<I", blob, area + 56, crc_of(bytes(blob[area + at : area + at + size])))
    struct.pack_into("<I", blob, area, crc_of(bytes(blob[area + 4 : area + 512])))
    struct.pack_into("<I", blob, 512 + 16, crc_of(bytes(blob[512 + 20 : 1024])))


MENDERS = {"lvm": _mend_lvm, "tar": _mend_tar, "oci": _mend_tar, "ovf": _mend_tar, "partitions": _mend_gpt}

MAKERS: dict[str, dict[str, Callable[[Path], str]]] = {
    "partitions": {"gpt": _write("gpt.raw", _gpt), "mbr": _write("mbr.raw", _mbr)},
    "ext4": {
        "ext4": _mkfs("ext4.img", "-t", "ext4", "-b", "1024", "-O", "^has_journal,^metadata_csum,inline_data"),
        "checksums": _mkfs("sums.img", "-t", "ext4", "-b", "4096", "-O", "^has_journal,metadata_csum"),
        "ext3": _mkfs("ext3.img", "-t", "ext3", "-b", "1024", "-J", "size=1"),
        "ext2": _mkfs("ext2.img", "-t", "ext2", "-b", "1024", "-I", "128"),
    },
    "fat": {
        "fat16": _write("fat16.img", lambda: _whole(fat_disk(_fat_tree(), 8 * MIB))),
        "fat12": _write("fat12.img", lambda: _fat12()),
    },
    "lvm": {"two segments": _write("pv.raw", lvm_volume)},
    "iso": {
        "rock ridge": _write("r.iso", lambda: _whole(IsoLayout(_small_tree(), IsoOptions(label="T", time=1e9)).image()))
    },
    "tar": {
        "ustar": _write("u.tar", _tar(tarfile.USTAR_FORMAT)),
        "pax": _write("p.tar", _tar(tarfile.PAX_FORMAT)),
        "gnu": _write("g.tar", _tar(tarfile.GNU_FORMAT)),
        "sparse": _write("s.tar", _sparse_tar),
        "gzip": _write("z.tar.gz", lambda: gzip.compress(_tar(tarfile.PAX_FORMAT)(), mtime=0)),
    },
    "oci": {"docker": _write("docker.tar", _docker), "oci": _write("oci.tar", _oci)},
    "ovf": {"ova": _ova("sha256"), "ova, no manifest": _ova(None), "ovf": _ovf},
    "kernel": {"bzImage": _write("vmlinuz", bzimage)},
    "ramdisk": {name: _write(name, lambda code=code: code(_CPIO)) for name, code in CODECS.items()},
    "manifest": {"manifest": _write("m.xml", lambda: _MANIFEST)},
}


def _fat_tree() -> Tree:
    tree = Tree()
    tree.put("EFI/BOOT/BOOTX64.EFI", file_node(data("efi", 9000)))
    for number in range(60):
        tree.put(f"A longer name {number}.txt", file_node(b"%d" % number))
    return tree


def _fat12() -> bytes:
    """A FAT12 volume of 64 clusters by hand: one file of three clusters, one folder."""
    blob = bytearray(100 * 512)
    struct.pack_into(
        "<3s8sHBHBHHBHHHII", blob, 0, b"\xeb\x3c\x90", b"mkfs.fat", 512, 1, 1, 2, 32, 100, 0xF8, 1, 32, 2, 0, 0
    )
    blob[38], blob[510], blob[511] = 0x29, 0x55, 0xAA
    blob[54:62] = b"FAT12   "
    for at in (512, 1024):
        blob[at : at + 9] = bytes((0xF8, 0xFF, 0xFF, 0x03, 0x40, 0x00, 0xFF, 0xFF, 0xFF))
    root = 3 * 512
    blob[root : root + 32] = b"FILE    TXT " + bytes(14) + struct.pack("<HI", 2, 1400)
    blob[root + 32 : root + 64] = b"FOLDER     \x10" + bytes(14) + struct.pack("<HI", 5, 0)
    body = 5 * 512
    blob[body : body + 1536] = data("fat12", 1536)
    blob[body + 3 * 512 : body + 3 * 512 + 32] = b".          \x10" + bytes(14) + struct.pack("<HI", 5, 0)
    return bytes(blob)
