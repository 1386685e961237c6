"""Packages opened: disks read where they lie, in every form of reference; manifests verified whenever one is read."""

from __future__ import annotations

import gzip
import hashlib
from typing import TYPE_CHECKING

import pytest
from ovfkit import entry, envelope, hardware, item, ova, signed, system

from diskmorph.formats.disk import checked
from diskmorph.formats.errors import (
    DiskmorphError,
    FormatError,
    IntegrityError,
    OptionError,
    PolicyError,
    SourceError,
    UnsupportedError,
)
from diskmorph.formats.limits import Limits
from diskmorph.formats.packages import open_package
from diskmorph.formats.registry import open_disk
from diskmorph.formats.views import Memory

from testkit import MIB, content, data, little_disk, write_image

if TYPE_CHECKING:
    pass


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small disk as VDI: its bytes, and what it reads as."""
    disk = little_disk(3 * MIB)
    (path,) = write_image("vdi", disk, tmp_path_factory.mktemp("disk") / "d.vdi")
    return path.read_bytes(), content(disk)


def files(name: str = "d.vdi", attributes: str = "", key: str = "f1") -> str:
    return f'<File ovf:id="{key}" ovf:href="{name}" {attributes}/>'


def disks(size: int = 3 * MIB) -> str:
    return f'<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="{size}" ovf:format="urn:vdi"/>'


def test_an_ova_is_a_disk(tmp_path, stored):
    raw, want = stored
    path = ova(tmp_path / "x.ova", ("x.ovf", envelope(files(), disks())), ("d.vdi", raw))
    with open_disk(path) as disk:
        assert content(checked(disk)) == want
        assert (disk.info.format, disk.info.subformat) == ("ova", "vdi dynamic")
        assert disk.name == f"{path}:d.vdi"
    with open_package(path) as package:
        assert [m.name for m in package.machines] == ["box"]
        assert package.format == "ova"
        with package.open_disk() as disk:
            assert content(disk) == want


def test_a_descriptor_is_read_with_its_folder(tmp_path, stored):
    raw, want = stored
    (tmp_path / "d.vdi").write_bytes(raw)
    (tmp_path / "x.ovf").write_bytes(envelope(files(), disks()))
    with open_disk(tmp_path / "x.ovf") as disk:
        assert content(disk) == want


@pytest.mark.parametrize("form", ["ova", "ovf"])
def test_gzip_and_chunks_and_both(tmp_path, stored, form):
    raw, want = stored
    packed = gzip.compress(raw)
    step = len(packed) // 3 + 1
    chunks = [(f"d.vdi.gz.{n:09d}", packed[n * step : (n + 1) * step]) for n in range(3)]
    plain = [(f"d.vdi.{n:09d}", raw[n * (1 << 20) : (n + 1) * (1 << 20)]) for n in range(-(-len(raw) // (1 << 20)))]
    cases = {
        "gzip": (files("d.vdi.gz", f'ovf:compression="gzip" ovf:size="{len(packed)}"'), [("d.vdi.gz", packed)]),
        "chunks": (files("d.vdi", f'ovf:chunkSize="{1 << 20}" ovf:size="{len(raw)}"'), plain),
        "no size": (files("d.vdi", f'ovf:chunkSize="{1 << 20}"'), plain),
        "both": (files("d.vdi.gz", f'ovf:compression="gzip" ovf:chunkSize="{step}" ovf:size="{len(packed)}"'), chunks),
    }
    for name, (refs, members) in cases.items():
        text = envelope(refs, disks())
        if form == "ova":
            path = ova(tmp_path / f"{name}.ova", ("x.ovf", text), *members)
        else:
            folder = tmp_path / name
            folder.mkdir()
            path = folder / "x.ovf"
            path.write_bytes(text)
            for member, part in members:
                (folder / member).write_bytes(part)
        with open_disk(path) as disk:
            assert content(disk) == want, name
        if len(members) > 1 and form == "ovf":
            (folder / members[1][0]).unlink()
            with pytest.raises(DiskmorphError, match=r"000000001|cut off"):
                open_disk(path)


def test_a_chunk_of_the_wrong_size_is_refused(tmp_path, stored):
    raw, _ = stored
    parts = [("d.vdi.000000000", raw[:1000]), ("d.vdi.000000001", raw[1000:])]
    text = envelope(files("d.vdi", 'ovf:chunkSize="1500000"'), disks())
    with pytest.raises(FormatError, match=r"d\.vdi\.000000000 has the wrong size"):
        open_disk(ova(tmp_path / "x.ova", ("x.ovf", text), *parts))


def test_a_delta_disk_over_its_parent(tmp_path):
    below, above = bytearray(data("below", 2 * MIB)), {3: data("above", 65536), 20: bytes(65536)}
    (parent,) = write_image("qcow2", Memory(bytes(below)), tmp_path / "p.qcow2")
    from testkit import ZERO, pattern_disk

    pieces = [(n * 65536, 65536, part if any(part) else ZERO) for n, part in above.items()]
    (child,) = write_image("qcow2", pattern_disk(2 * MIB, pieces), tmp_path / "c.qcow2")
    for n, part in above.items():
        below[n * 65536 : (n + 1) * 65536] = part
    refs = files("p.qcow2", key="f1") + files("c.qcow2", key="f2")
    rows = (
        f'<Disk ovf:diskId="base" ovf:fileRef="f1" ovf:capacity="{2 * MIB}"/>'
        f'<Disk ovf:diskId="d1" ovf:fileRef="f2" ovf:parentRef="base" ovf:capacity="{2 * MIB}"/>'
    )
    path = ova(
        tmp_path / "x.ova",
        ("x.ovf", envelope(refs, rows)),
        ("p.qcow2", parent.read_bytes()),
        ("c.qcow2", child.read_bytes()),
    )
    with open_disk(path, disk=1) as disk:
        assert content(checked(disk)) == bytes(below)
    for bad, says in (("d1", "comes back"), ("gone", "parent that is not there")):
        text = envelope(refs, rows.replace('ovf:parentRef="base"', f'ovf:parentRef="{bad}"'))
        with pytest.raises(FormatError, match=says):
            open_disk(ova(tmp_path / "y.ova", ("x.ovf", text)), disk=1)


def test_an_empty_disk_has_its_capacity(tmp_path):
    text = envelope("", f'<Disk ovf:diskId="d1" ovf:capacity="{5 * MIB}"/>')
    with open_disk(ova(tmp_path / "x.ova", ("x.ovf", text))) as disk:
        assert disk.size == 5 * MIB
        assert not any(disk.read(0, disk.size))
    text = envelope("", '<Disk ovf:diskId="d1" ovf:capacity="${size}"/>')
    with pytest.raises(FormatError, match="no size"):
        open_disk(ova(tmp_path / "y.ova", ("x.ovf", text)))


def test_several_disks_need_a_number(tmp_path, stored):
    raw, want = stored
    refs = files("a.vdi", key="f1") + files("b.vdi", key="f2")
    rows = "".join(f'<Disk ovf:diskId="d{n}" ovf:fileRef="f{n}" ovf:capacity="1"/>' for n in (1, 2))
    path = ova(
        tmp_path / "x.ova",
        ("x.ovf", envelope(refs, rows, system("m", hardware(2)))),
        ("a.vdi", raw),
        ("b.vdi", b"not a disk" * 100),
    )
    with pytest.raises(OptionError, match=r"1: a\.vdi, 2: b\.vdi.*--disk"):
        open_disk(path)
    with open_disk(path, disk=1) as disk:
        assert content(disk) == want
    for number in (0, 3, -1):
        with pytest.raises(OptionError, match="no disk"):
            open_disk(path, disk=number)
    with pytest.raises(FormatError, match=r"b\.vdi should be vdi"):
        open_disk(path, disk=2)


def test_a_file_shorter_than_it_is_said_to_be_is_cut_off(tmp_path, stored):
    raw, _ = stored
    text = envelope(files("d.img", f'ovf:size="{len(raw) + 1}"'), disks())
    with pytest.raises(FormatError, match="cut off"):
        open_disk(ova(tmp_path / "x.ova", ("x.ovf", text), ("d.img", raw)))


def test_names_with_escapes(tmp_path, stored):
    raw, want = stored
    path = ova(tmp_path / "x.ova", ("x.ovf", envelope(files("my%20disk.vdi"), disks())), ("my disk.vdi", raw))
    with open_disk(path) as disk:
        assert content(disk) == want


@pytest.mark.parametrize(
    "href",
    [
        "../d.vdi",
        "sub/d.vdi",
        "sub/../../d.vdi",
        "..\\d.vdi",
        "http://127.0.0.1:9/d.vdi",
        "file:///etc/passwd",
        "/etc/passwd",
        "..",
        "%2e%2e%2fd.vdi",
    ],
)
@pytest.mark.parametrize("form", ["ova", "ovf"])
def test_names_that_leave_the_package_open_nothing(tmp_path, stored, href, form):
    raw, _ = stored
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "d.vdi").write_bytes(raw)
    text = envelope(files(href), disks())
    if form == "ova":
        path = ova(inner / "x.ova", ("x.ovf", text), ("d.vdi", raw))
    else:
        path = inner / "x.ovf"
        path.write_bytes(text)
    with pytest.raises((PolicyError, FormatError, SourceError)):
        open_disk(path)


def test_a_link_in_the_folder_is_not_followed(tmp_path, stored):
    raw, _ = stored
    (tmp_path / "outside.vdi").write_bytes(raw)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "d.vdi").symlink_to("../outside.vdi")
    (inner / "x.ovf").write_bytes(envelope(files(), disks()))
    with pytest.raises(PolicyError, match="allow-parent"):
        open_disk(inner / "x.ovf")
    with open_disk(inner / "x.ovf", parents=tmp_path) as disk:
        assert disk.size == 3 * MIB


def test_what_else_is_refused(tmp_path, stored):
    raw, _ = stored
    cases = {
        "missing": (envelope(files(), disks()), []),
        "no File": (envelope("", disks()), []),
        "bzip2": (envelope(files("d.vdi", 'ovf:compression="bzip2"'), disks()), [("d.vdi", raw)]),
    }
    for name, (text, members) in cases.items():
        with pytest.raises(DiskmorphError):
            open_disk(ova(tmp_path / f"{name}.ova", ("x.ovf", text), *members))
    (tmp_path / "two.ova").write_bytes(entry("a.ovf", b"<x/>") + entry("b.ovf", b"<x/>") + bytes(1024))
    with pytest.raises(FormatError, match="several descriptors"):
        open_disk(tmp_path / "two.ova")
    with pytest.raises(UnsupportedError, match="no disk"):
        open_disk(ova(tmp_path / "none.ova", ("x.ovf", envelope("", "", system("m", "")))))


def test_a_disk_with_a_backing_file_opens_nothing_outside(tmp_path):
    from testkit import NewParent

    write_image("raw", Memory(bytes(MIB)), tmp_path / "base.img")
    parent = NewParent("base.img", "raw", MIB, {}, tmp_path / "base.img")
    (top,) = write_image("qcow2", Memory(bytes(MIB)), tmp_path / "top.qcow2", parent=parent)
    path = ova(tmp_path / "x.ova", ("x.ovf", envelope(files("top.qcow2"), disks(MIB))), ("top.qcow2", top.read_bytes()))
    with pytest.raises(PolicyError):
        open_disk(path)


# --- manifests


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha384", "sha512"])
def test_a_true_manifest_is_taken(tmp_path, stored, algorithm):
    raw, _ = stored
    with open_package(
        ova(tmp_path / "x.ova", ("x.ovf", envelope(files(), disks())), ("d.vdi", raw), manifest=algorithm)
    ) as package:
        assert len(package.manifest) == 2
        assert not package.warnings


@pytest.mark.parametrize("form", ["ova", "ovf"])
@pytest.mark.parametrize("changed", ["x.ovf", "d.vdi", "other.txt"])
def test_a_false_digest_is_refused_whatever_is_asked(tmp_path, stored, form, changed):
    raw, _ = stored
    rows = {"x.ovf": envelope(files(), disks()), "d.vdi": raw, "other.txt": b"notes"}
    digests = {name: hashlib.sha256(part).hexdigest() for name, part in rows.items()}
    manifest = "".join(f"SHA256({name})= {value}\n" for name, value in digests.items()).encode()
    rows[changed] = rows[changed] + b" "
    if form == "ova":
        path = tmp_path / "x.ova"
        path.write_bytes(b"".join(entry(n, d) for n, d in (*rows.items(), ("x.mf", manifest))) + bytes(1024))
    else:
        path = tmp_path / "x.ovf"
        for name, part in (*rows.items(), ("x.mf", manifest)):
            (tmp_path / name).write_bytes(part)
    for call in (open_disk, open_package):
        with pytest.raises(IntegrityError, match=changed):
            call(path)


def test_a_manifest_of_a_missing_file_and_one_without_the_descriptor(tmp_path, stored):
    raw, _ = stored
    text = envelope(files(), disks())
    for lines, says in ((b"SHA256(gone)= " + b"0" * 64, "gone"), (b"SHA256(../x)= " + b"0" * 64, "x")):
        path = tmp_path / "x.ova"
        path.write_bytes(entry("x.ovf", text) + entry("x.mf", lines) + entry("d.vdi", raw) + bytes(1024))
        with pytest.raises((FormatError, PolicyError), match=says):
            open_package(path)
    line = f"SHA256(d.vdi)= {hashlib.sha256(raw).hexdigest()}\n".encode()
    path.write_bytes(entry("x.ovf", text) + entry("x.mf", line) + entry("d.vdi", raw) + bytes(1024))
    with open_package(path) as package:
        assert "descriptor" in package.warnings[0]


def test_a_certificate_signs_the_manifest(tmp_path, stored):
    raw, _ = stored
    text = envelope(files(), disks())
    manifest = f"SHA256(x.ovf)= {hashlib.sha256(text).hexdigest()}\n".encode()
    members = [entry("x.ovf", text), entry("x.mf", manifest), entry("x.cert", signed(manifest)), entry("d.vdi", raw)]
    path = tmp_path / "x.ova"
    path.write_bytes(b"".join(members) + bytes(1024))
    with open_package(path) as package:
        assert not package.warnings
    members[2] = entry("x.cert", signed(manifest + b"#"))
    path.write_bytes(b"".join(members) + bytes(1024))
    with pytest.raises(IntegrityError, match="certificate"):
        open_package(path)
    path.write_bytes(members[0] + members[2] + bytes(1024))
    with pytest.raises(FormatError, match="no manifest"):
        open_package(path)


def test_damaged_archives_are_not_taken_for_raw_disks(tmp_path, stored):
    raw, _ = stored
    for name, body in {
        "empty": b"",
        "noise": data("noise", 5000),
        "no descriptor": entry("d.vdi", raw) + bytes(1024),
    }.items():
        path = tmp_path / f"{name}.ova"
        path.write_bytes(body)
        with pytest.raises(FormatError, match="ova"):
            open_disk(path)


def test_mutants_end_in_errors_or_disks(tmp_path, stored):
    """Every byte of headers and descriptor, one after the other: no other exception, no wrong size of a read."""
    import random

    raw, _ = stored
    good = ova(tmp_path / "x.ova", ("x.ovf", envelope(files(), disks())), ("d.vdi", raw), manifest=None).read_bytes()
    rng = random.Random(5)
    path = tmp_path / "m.ova"
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            bad[rng.randrange(4096)] = rng.choice((0, 0xFF, 0x41, 0x3C, 0x22, rng.randrange(256)))
        path.write_bytes(bad)
        try:
            with open_disk(path, limits=Limits()) as disk:
                disk.read(0, min(disk.size, 65536))
        except DiskmorphError:
            pass


def test_items_refer_to_files_too(tmp_path, stored):
    raw, want = stored
    items = item(InstanceID=3, ResourceType=6) + item(
        InstanceID=4, ResourceType=17, Parent=3, HostResource="ovf:/file/f1"
    )
    path = ova(tmp_path / "x.ova", ("x.ovf", envelope(files(), "", system("m", items))), ("d.vdi", raw))
    with open_disk(path) as disk:
        assert content(disk) == want


def test_a_check_goes_through_manifest_and_disks(tmp_path, stored):
    from diskmorph.convert.check import check

    raw, _ = stored
    good = ova(tmp_path / "x.ova", ("x.ovf", envelope(files(), disks())), ("d.vdi", raw))
    assert check(good).clean
    cut = ova(tmp_path / "cut.ova", ("x.ovf", envelope(files(), disks())), ("d.vdi", raw[: len(raw) - MIB]))
    found = check(cut)
    assert not found.clean
    assert all(finding["structure"].startswith("d.vdi") for finding in found.findings)
    assert min(finding["offset"] for finding in found.findings if finding["offset"] is not None) > 2048
    false = tmp_path / "false.ova"
    false.write_bytes(
        entry("x.ovf", envelope(files(), disks()))
        + entry("x.mf", b"SHA1(d.vdi)= " + b"0" * 40)
        + entry("d.vdi", raw)
        + bytes(1024)
    )
    assert "d.vdi is not what the manifest says" in check(false).findings[0]["message"]
    with pytest.raises(UnsupportedError):
        check(good, repair="all")


def test_a_gzip_bomb_stops_at_what_the_disk_may_have(tmp_path):
    packed = gzip.compress(bytes(200 * MIB), 9)
    text = envelope(files("d.img.gz", 'ovf:compression="gzip"'), disks(MIB).replace("urn:vdi", ""))
    with pytest.raises(FormatError, match="expands"):
        open_disk(ova(tmp_path / "x.ova", ("x.ovf", text), ("d.img.gz", packed)))
