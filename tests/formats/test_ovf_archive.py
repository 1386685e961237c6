"""The index of OVAs, chunked and gzip'd files, manifests and certificates."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import tarfile

import pytest
from ovfkit import entry, header, pax, signed

from diskmorph.formats.errors import DiskmorphError, FormatError, IntegrityError, PolicyError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.ovf.archive import read_index
from diskmorph.formats.ovf.manifest import build_manifest, manifest_size, parse_manifest, verify_certificate
from diskmorph.formats.ovf.sources import GzipSource, JoinedSource
from diskmorph.formats.source import BytesSource
from diskmorph.formats.tar.schema import HEADER
from diskmorph.formats.tarheader import build_header

END = bytes(1024)


def index(data: bytes, **limits: int):
    return read_index(BytesSource(data, "x.ova"), Limits(**limits))


def test_members_are_windows_of_the_archive():
    data = entry("a.ovf", b"one") + entry("d.vmdk", b"x" * 700) + END
    found = index(data)
    assert [(m.name, m.offset, m.size) for m in found.values()] == [("a.ovf", 512, 3), ("d.vmdk", 1536, 700)]
    assert not any(m.extensions for m in found.values())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_the_standard_library(form):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name in ("a.ovf", "n" * 95 + "-long.vmdk" if form != tarfile.USTAR_FORMAT else "d.vmdk"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 4, 1.5
            tar.addfile(info, io.BytesIO(b"data"))
    found = index(out.getvalue())
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        assert [(m.name, m.offset) for m in found.values()] == [(m.name, m.offset_data) for m in tar]
    assert ("PAX" in found["a.ovf"].extensions) == (form == tarfile.PAX_FORMAT)


def test_a_size_in_base_256_and_its_build():
    big = 9 << 30
    for size in (big, (8 << 30) - 1, 0):
        built = HEADER.parse(build_header("d.vmdk", size, 5))
        assert (built.size[0] == 0x80) == (size > (8 << 30) - 1)
        with tarfile.open(fileobj=io.BytesIO(build_header("d.vmdk", size, 5) + END), mode="r|") as tar:
            assert next(iter(tar)).size == size
    field = b"\x80" + (3).to_bytes(11, "big")
    assert index(header("a.ovf", 0, size_field=field) + b"abc" + bytes(509) + END)["a.ovf"].size == 3


def test_an_archive_may_end_without_zeroes_but_not_go_on_behind_them():
    assert list(index(entry("a.ovf", b"x"))) == ["a.ovf"]
    with pytest.raises(FormatError, match="behind a block of zeroes"):
        index(entry("a.ovf", b"x") + bytes(512) + entry("b", b""))


def test_directories_and_a_leading_dot_are_passed_over():
    assert list(index(entry("./", kind=b"5") + entry("./a.ovf", b"x") + END)) == ["a.ovf"]


BAD = {
    "twice": (entry("a", b"x") * 2 + END, FormatError, "twice"),
    "twice, by a dot": (entry("a", b"x") + entry("./a", b"y") + END, FormatError, "twice"),
    "symbolic link": (entry("a", kind=b"2", link=b"/etc/passwd") + END, PolicyError, "symbolic link"),
    "hard link": (entry("a", kind=b"1", link=b"b") + END, PolicyError, "hard link"),
    "device": (entry("a", kind=b"3") + END, PolicyError, "device"),
    "block device": (entry("a", kind=b"4") + END, PolicyError, "device"),
    "fifo": (entry("a", kind=b"6") + END, PolicyError, "FIFO"),
    "sparse": (entry("a", b"x", kind=b"S") + END, UnsupportedError, "read in place"),
    "sparse by PAX": (pax(**{"GNU.sparse.major": "1"}) + entry("a", b"x") + END, UnsupportedError, "sparse"),
    "outside": (entry("../a", b"x") + END, FormatError, "leaves"),
    "inner outside": (entry("b/../../a", b"x") + END, FormatError, "leaves"),
    "absolute": (entry("/a", b"x") + END, FormatError, "leaves"),
    "backslash": (entry("..\\a", b"x") + END, FormatError, "leaves"),
    "outside by PAX": (pax(path="../a") + entry("a", b"x") + END, FormatError, "leaves"),
    "outside by prefix": (entry("a", b"x", prefix=b"..") + END, FormatError, "leaves"),
    "cut": ((entry("a", b"x" * 5000) + END)[:3000], FormatError, "cut off"),
    "cut in a header": (entry("a", b"x") + entry("b", b"x")[:100], FormatError, "cut off"),
    "size beyond": (header("a", 0o77777777777) + END, FormatError, "cut off"),
    "huge base 256": (header("a", 0, size_field=b"\x80" + b"\x7f" * 11) + END, FormatError, "cut off"),
    "negative": (header("a", 0, size_field=b"\xff" * 12) + END, FormatError, "none"),
    "letters": (header("a", 0, size_field=b"xyz".ljust(12, b"\0")) + END, FormatError, "none"),
    "checksum": (entry("a", b"x")[:10] + b"Z" + entry("a", b"x")[11:] + END, FormatError, "checksum"),
    "not UTF-8": (entry(b"\xff\xfe", b"x") + END, FormatError, "UTF-8"),
    "no member behind": (pax(path="b") + END, FormatError, "no member follows"),
    "PAX too long": (header("x", 2 << 20, kind=b"x") + bytes(3 << 20) + END, FormatError, "too long"),
    "damaged PAX": (entry("x", b"99 path=a\n", kind=b"x") + entry("a") + END, FormatError, "PAX"),
    "PAX size": (pax(size="12x") + entry("a") + END, FormatError, "PAX size"),
    "PAX size that is a digit to some": (pax(size="\u00b2") + entry("a") + END, FormatError, "PAX size"),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile_archives(name):
    data, kind, says = BAD[name]
    with pytest.raises(kind, match=says) as caught:
        index(data)
    assert caught.value.offset is not None


def test_too_many_members():
    with pytest.raises(FormatError, match="more than 3 members"):
        index(b"".join(entry(str(i)) for i in range(5)) + END, members=3)


# --- sources


def test_joined_sources_read_over_their_borders():
    parts = [b"abc", b"", b"defgh", b"i"]
    joined = JoinedSource([BytesSource(p) for p in parts], "j")
    whole = b"".join(parts)
    assert joined.size == 9
    for start in range(10):
        for stop in range(start, 10):
            assert joined.read(start, stop - start) == whole[start:stop]
    assert sum(length for _, length, _ in joined.runs(2, 8)) == 6


def test_gzip_is_read_at_any_offset():
    rng = random.Random(1)
    plain = b"".join(rng.randbytes(700_000) + bytes(900_000) for _ in range(30))
    packed = gzip.compress(plain[: 20 << 20], 1) + gzip.compress(plain[20 << 20 :], 1) + bytes(100)
    source = GzipSource(BytesSource(packed, "g"), Limits())
    assert source.size == len(plain)
    assert hashlib.sha256(source.read(0, source.size)).digest() == hashlib.sha256(plain).digest()
    for _ in range(40):
        start = rng.randrange(len(plain))
        assert source.read_upto(start, 3000) == plain[start : start + 3000]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (gzip.compress(b"x" * 1000, mtime=0)[:-5], "cut off"),
        (gzip.compress(b"x" * 1000, mtime=0) + b"junk", "damaged"),
        (b"no gzip", "damaged"),
        (b"", "cut off"),
    ],
)
def test_damaged_gzip(data, says):
    with pytest.raises(FormatError, match=says):
        GzipSource(BytesSource(data, "g"), Limits())


def test_a_gzip_bomb_is_stopped():
    with pytest.raises(FormatError, match="expands"):
        GzipSource(BytesSource(gzip.compress(bytes(64 << 20)), "g"), Limits(expansion=100))


# --- manifests


@pytest.mark.parametrize(
    ("line", "exact"),
    [
        ("SHA256(a b.vmdk)= {}", True),
        ("SHA256(a b.vmdk)={}", False),
        ("SHA256 (a b.vmdk) = {}\r", False),
        ("sha256(a b.vmdk)= {}", False),
        ("SHA-256(a b.vmdk)= {}", False),
    ],
)
def test_lines_of_manifests(line, exact):
    digest = "ab" * 32
    (found,) = parse_manifest((line.format(digest) + "\n\n").encode(), file="m")
    assert (found.algorithm, found.name, found.hex, found.exact) == ("SHA256", "a b.vmdk", digest, exact)


@pytest.mark.parametrize("line", [b"SHA256(a)= xyz", b"junk", b"SHA256 a = 00", b"\0\0"])
def test_damaged_lines(line):
    with pytest.raises(FormatError, match="line 1"):
        parse_manifest(line, file="m")


def test_unknown_digests_are_named():
    with pytest.raises(UnsupportedError, match="MD5"):
        parse_manifest(b"MD5(a)= 00", file="m")


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
def test_manifests_are_as_long_as_foretold(algorithm):
    names = ["x.ovf", "x-disk1.vmdk"]
    digests = {name: hashlib.new(algorithm, name.encode()).hexdigest() for name in names}
    text = build_manifest(algorithm, digests)
    assert len(text) == manifest_size(algorithm, names)
    assert {d.name: d.hex for d in parse_manifest(text, file="m")} == digests
    assert all(d.exact for d in parse_manifest(text, file="m"))


@pytest.mark.parametrize("algorithm", ["SHA1", "SHA256", "SHA512"])
def test_certificates(algorithm):
    manifest = b"SHA256(x.ovf)= 00\n"
    text = signed(manifest, algorithm=algorithm)
    assert verify_certificate(text, manifest, manifest_name="x.mf", file="x") == []
    with pytest.raises(IntegrityError, match="certificate signed"):
        verify_certificate(text, manifest + b" ", manifest_name="x.mf", file="x")
    with pytest.raises(FormatError, match="another file"):
        verify_certificate(text, manifest, manifest_name="y.mf", file="x")


def test_an_expired_certificate_is_taken_with_a_warning():
    manifest = b"SHA256(x.ovf)= 00\n"
    (warning,) = verify_certificate(signed(manifest, days=-3), manifest, manifest_name="x.mf", file="x")
    assert "expired" in warning


@pytest.mark.parametrize(
    "data", [b"", b"SHA1(x.mf)= 00\n", b"SHA1(x.mf)= 00\n-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n"]
)
def test_damaged_certificates(data):
    with pytest.raises(DiskmorphError):
        verify_certificate(data, b"", manifest_name="x.mf", file="x")
