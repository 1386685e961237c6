"""Images that name a file outside their folder, and the command line run under strace."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ovfkit
import vhdxmade
import vmdkmade
from contract.cases import qcow, qcow2, vhd
from vhdxmade import Made
from vmdkmade import Hosted

from diskmorph.formats.iso.writer import IsoLayout, IsoOptions
from diskmorph.formats.tree import Tree, file_node, link_node

from testkit import KIB, MIB, data

SECRET = b"the canary sings" * 4096
NAMES = ("absolute", "relative", "link")


class Cage:
    """A folder with an image that names the canary beside it, by one of the NAMES."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.cage, outside = where / "cage", where / "secret"
        self.cage.mkdir()
        outside.mkdir()
        self.secret = outside / "canary.raw"
        self.secret.write_bytes(SECRET)
        (self.cage / "link.raw").symlink_to(self.secret)

    def name(self, kind: str) -> str:
        return {"absolute": str(self.secret), "relative": "../secret/canary.raw", "link": "link.raw"}[kind]


BATCH = """
import contextlib, io, json, os, sys, time
from diskmorph.cli import main
answers = []
for number, (folder, argv) in enumerate(json.load(sys.stdin)):
    os.chdir(folder)
    with contextlib.suppress(OSError):
        os.open(f"/case/{number}", os.O_RDONLY)
    out, err, begun = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except BaseException as error:
            status = repr(error)
    answers.append((status, out.getvalue() + err.getvalue(), time.monotonic() - begun))
print(json.dumps(answers))
"""


class Case(NamedTuple):
    """One run of the command line in a cage, and what came of it: exit status, text, seconds, all that was opened."""

    name: str
    cage: Cage
    argv: list[str]
    status: Any = None
    text: str = ""
    seconds: float = 0
    seen: frozenset[Path] = frozenset()


def traced(cases: list[Case], where: Path) -> list[Case]:
    """Run all cases in one process under strace: to start Python for each would take most of the time."""
    trace = where / "trace"
    calls = "trace=open,openat,openat2,creat,connect,link,linkat"
    argv = [
        "strace",
        "-f",
        "-qq",
        "--seccomp-bpf",
        "-s",
        "4096",
        "-e",
        calls,
        "-o",
        str(trace),
        sys.executable,
        "-c",
        BATCH,
    ]
    given = json.dumps([(str(case.cage.cage), case.argv) for case in cases])
    done = subprocess.run(argv, input=given, capture_output=True, text=True, check=True, timeout=300)
    parts = re.split(r'^.*"/case/\d+".*$', trace.read_text(errors="replace"), flags=re.MULTILINE)[1:]
    answers = json.loads(done.stdout)
    assert len(parts) == len(answers) == len(cases)
    return [
        case._replace(status=status, text=text, seconds=seconds, seen=frozenset(opened(part, case.cage.cage)))
        for case, part, (status, text, seconds) in zip(cases, parts, answers, strict=True)
    ]


def opened(trace: str, cwd: Path) -> set[Path]:
    """Every path that was opened with success, and /network if anything was connected to."""
    found = set()
    for line in trace.splitlines():
        match = re.search(
            r'\b(?:open|openat|openat2|creat|link|linkat)\((?:AT_FDCWD, |\d+, )?"((?:[^"\\]|\\.)*)"', line
        )
        if match and not re.search(r"= -1 E", line):
            name = match[1].encode().decode("unicode_escape").encode("latin-1").decode("utf-8", "replace")
            found.add(Path(os.path.realpath(cwd / name)))
        if "connect(" in line and "AF_INET" in line:
            found.add(Path("/network"))
    return found


def backing(cage: Cage, name: str) -> Path:
    return qcow2.handmade(cage.cage / "a.qcow2", MIB, {}, {}, backing=name.encode(), extensions=[(0xE2792ACA, b"raw")])


def backing_json(cage: Cage, name: str) -> Path:
    words = "json:" + json.dumps({"driver": "file", "filename": str(cage.where / "cage" / name)})
    return qcow2.handmade(cage.cage / "a.qcow2", MIB, {}, {}, backing=words.encode())


def backing_url(cage: Cage, name: str) -> Path:
    del name
    return qcow2.handmade(cage.cage / "a.qcow2", MIB, {}, {}, backing=b"http://127.0.0.1:9/canary")


def old_backing(cage: Cage, name: str) -> Path:
    return qcow.handmade(cage.cage / "a.qcow", MIB, {}, {}, backing=name.encode())


def data_file(cage: Cage, name: str) -> Path:
    entries = {0: qcow2.COPIED}
    extension = [(0x44415441, name.encode())]
    return qcow2.handmade(cage.cage / "a.qcow2", 1 << 16, entries, {}, features=(4, 0, 0), extensions=extension)


def flat_extent(cage: Cage, name: str) -> Path:
    return vmdkmade.descriptor(cage.cage / "a.vmdk", [f'RW 128 FLAT "{name}" 0'])


def sparse_extent(cage: Cage, name: str) -> Path:
    cage.secret.write_bytes(Hosted(128, {0: data("s", 64 * KIB)}, text=None).build())
    return vmdkmade.descriptor(cage.cage / "a.vmdk", [f'RW 128 SPARSE "{name}"'], "custom")


def vmdk_parent(cage: Cage, name: str) -> Path:
    cage.secret.write_bytes(Hosted(128, {0: data("s", 64 * KIB)}, text=vmdkmade.words(['RW 128 SPARSE "x"'])).build())
    text = vmdkmade.words(['RW 128 SPARSE "a.vmdk"'], parent="12345678", hint=name)
    path = cage.cage / "a.vmdk"
    path.write_bytes(Hosted(128, {}, text=text).build())
    return path


def vhd_parent(cage: Cage, name: str) -> Path:
    vhd.dynamic(cage.secret, 128 * KIB, {0: (None, data("s", 64 * KIB))}, block=64 * KIB, name="parent")
    wide = name.replace("/", "\\").encode("utf-16-le")
    locators = [(b"W2ru", wide), (b"W2ku", wide), (b"MacX", b"file://" + name.encode())]
    words = {"block": 64 * KIB, "kind": 4, "parent": "parent", "parent_name": name, "name": "child"}
    vhd.dynamic(cage.cage / "a.vhd", 128 * KIB, {}, locators=locators, **words)
    return cage.cage / "a.vhd"


def vhdx_parent(cage: Cage, name: str) -> Path:
    cage.secret.write_bytes(Made(MIB, {}).build())
    linkage = {"parent_linkage": f"{{{vhdxmade.DATA_WRITE}}}", "relative_path": name.replace("/", "\\")}
    linkage |= {"absolute_win32_path": "\\\\?\\C:" + name.replace("/", "\\"), "volume_path": name.replace("/", "\\")}
    (cage.cage / "a.vhdx").write_bytes(Made(MIB, {}, parent=linkage).build())
    return cage.cage / "a.vhdx"


def ovf_reference(cage: Cage, name: str) -> Path:
    text = ovfkit.envelope(files=f'<File ovf:id="f1" ovf:href="{name}"/>')
    (cage.cage / "a.ovf").write_bytes(text)
    return cage.cage / "a.ovf"


def ovf_url(cage: Cage, name: str) -> Path:
    return ovf_reference(cage, "file://" + str(cage.where / "cage" / name))


def ovf_entity(cage: Cage, name: str) -> Path:
    prolog = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "{cage.where / "cage" / name}">]>'
    (cage.cage / "a.ovf").write_bytes(ovfkit.envelope(prolog=prolog, sections="<x>&e;</x>"))
    return cage.cage / "a.ovf"


def ova_member(cage: Cage, name: str) -> Path:
    """An archive whose disk is a link."""
    link = ovfkit.header("d.vmdk", 0, kind=b"2", link=name.encode())
    (cage.cage / "a.ova").write_bytes(ovfkit.entry("a.ovf", ovfkit.envelope()) + link + bytes(1024))
    return cage.cage / "a.ova"


DISKS: list[Callable[[Cage, str], Path]] = [
    backing,
    backing_json,
    backing_url,
    old_backing,
    data_file,
    flat_extent,
    sparse_extent,
    vmdk_parent,
    vhd_parent,
    vhdx_parent,
    ovf_reference,
    ovf_url,
    ovf_entity,
    ova_member,
]


def tar_of(*members: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 1 if kind == tarfile.REGTYPE else 0
    return info


def tars(cage: Cage) -> dict[str, bytes]:
    secret = str(cage.secret)
    outside = str(cage.secret.parent)
    return {
        "dots": tar_of(member("../secret/canary.raw")),
        "absolute": tar_of(member(secret)),
        "through a link": tar_of(member("d", tarfile.SYMTYPE, outside), member("d/canary.raw")),
        "hard link": tar_of(member("h", tarfile.LNKTYPE, "../secret/canary.raw")),
        "over a link": tar_of(member("l", tarfile.SYMTYPE, secret), member("l")),
    }


def iso_of_links(cage: Cage) -> str:
    tree = Tree()
    tree.put("link", link_node(str(cage.secret).encode()))
    tree.put("dir", link_node(str(cage.secret.parent).encode()))
    tree.put("file", file_node(b"x"))
    disk = IsoLayout(tree, IsoOptions(label="T", time=1e9)).image()
    (cage.cage / "a.iso").write_bytes(disk.read(0, disk.size))
    return "a.iso"


def layout_of(cage: Cage, digest: str) -> str:
    layout = cage.cage / "layout"
    (layout / "blobs/sha256").mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": len(SECRET)}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "blobs/sha256" / ("0" * 64)).symlink_to(cage.secret)
    return "layout"
