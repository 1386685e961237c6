"""EC2 bundles, proven with openssl and tarfile, and made by them: no code of ours judges ours."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import subprocess
import tarfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from diskmorph.convert.bundles import BundleOptions, bundle, unbundle
from diskmorph.formats.ami.manifest import read_manifest
from diskmorph.formats.errors import DiskmorphError, FormatError, IntegrityError, OptionError, PolicyError, TargetError
from diskmorph.formats.limits import Limits
from diskmorph.formats.packages import open_package

from testkit import MIB, content, data, little_disk, sha256, write_image

PART = 10 << 20


def openssl(*words: str | Path, given: bytes = b"") -> bytes:
    done = subprocess.run(["openssl", *map(str, words)], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def new_keys(folder: Path, name: str, bits: int = 2048) -> tuple[Path, Path]:
    key, certificate = folder / f"{name}.pem", folder / f"{name}-cert.pem"
    request = ("req", "-x509", "-newkey", f"rsa:{bits}", "-nodes", "-days", "30", "-subj", f"/CN={name}")
    openssl(*request, "-keyout", key, "-out", certificate)
    return key, certificate


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return new_keys(folder, "user"), new_keys(folder, "ec2", 1024)


def by_hand(
    folder: Path, image: bytes, keys, *, name: str = "t.img", kind: str = "machine", sparse: bool = False
) -> Path:
    """A bundle as ec2-ami-tools lay it out, with blanks inside the signed slices and parts in reverse order."""
    folder.mkdir(parents=True, exist_ok=True)
    (user_key, user), (_, ec2) = keys
    if sparse:
        (folder / name).write_bytes(b"")
        os.truncate(folder / name, len(image))
        with open(folder / name, "r+b") as file:
            for at in range(0, len(image), 65536):
                if any(image[at : at + 65536]):
                    file.seek(at)
                    file.write(image[at : at + 65536])
        plain = subprocess.run(
            ["tar", "-cS", "--format=gnu", "-C", folder, name], capture_output=True, check=True
        ).stdout
        (folder / name).unlink()
    else:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
        plain = out.getvalue()
    key, vector = os.urandom(16).hex(), os.urandom(16).hex()
    secret = openssl("enc", "-aes-128-cbc", "-K", key, "-iv", vector, given=gzip.compress(plain, 1))
    parts = []
    for number in range(-(-len(secret) // PART)):
        piece = secret[number * PART : (number + 1) * PART]
        (folder / f"{name}.part.{number}").write_bytes(piece)
        parts.append(
            f'<part index="{number}">\n<filename>{name}.part.{number}</filename>'
            f'<digest algorithm="SHA1">{hashlib.sha1(piece).hexdigest()}</digest></part>'
        )

    def seal(text: str, certificate: Path) -> str:
        words = ("pkeyutl", "-encrypt", "-certin", "-inkey", certificate, "-pkeyopt", "rsa_padding_mode:pkcs1")
        return openssl(*words, given=text.encode()).hex()

    config = "<machine_configuration>\n <architecture>x86_64</architecture>\n</machine_configuration>"
    body = (
        f"<image>\n <name>{name}</name><user>123456789012</user><type>{kind}</type>"
        f'<digest algorithm="SHA1">{hashlib.sha1(plain).hexdigest()}</digest><size>{len(image)}</size>'
        f"<bundled_size>{len(secret)}</bundled_size>"
        f'<ec2_encrypted_key algorithm="AES-128-CBC">{seal(key, ec2)}</ec2_encrypted_key>'
        f'<user_encrypted_key algorithm="AES-128-CBC">{seal(key, user)}</user_encrypted_key>'
        f"<ec2_encrypted_iv>{seal(vector, ec2)}</ec2_encrypted_iv><user_encrypted_iv>{seal(vector, user)}</user_encrypted_iv>"
        f'\n<parts count="{len(parts)}">{"".join(reversed(parts))}</parts>\n</image>'
    )
    path = folder / f"{name}.manifest.xml"
    path.write_text(with_signature(config, body, user_key))
    return path


def with_signature(config: str, body: str, key: Path) -> str:
    signature = openssl("dgst", "-sha1", "-sign", key, given=(config + body).encode()).hex()
    return (
        '<?xml version="1.0"?>\n<manifest><version>2007-10-10</version><bundler><name>hand</name><version>1</version>'
        f"<release>1</release></bundler> {config}\n {body} <signature>{signature}</signature></manifest>"
    )


def prove(manifest: Path, keys) -> bytes:
    """Return the image inside, by openssl and tarfile alone."""
    (user_key, user), (ec2_key, _) = keys
    text = manifest.read_bytes()
    root = ET.fromstring(text)
    slices = b"".join(
        re.search(rb"<%s>.*</%s>" % (tag, tag), text, re.DOTALL)[0] for tag in (b"machine_configuration", b"image")
    )
    public, signature = manifest.parent / ".pub", manifest.parent / ".sig"
    public.write_bytes(openssl("x509", "-in", user, "-pubkey", "-noout"))
    signature.write_bytes(bytes.fromhex(root.findtext("signature")))
    openssl("dgst", "-sha1", "-verify", public, "-signature", signature, given=slices)
    public.unlink()
    signature.unlink()
    image = root.find("image")
    assert [child.tag for child in image][:3] == ["name", "user", "type"]

    def opened(tag: str, key: Path) -> str:
        words = ("pkeyutl", "-decrypt", "-inkey", key, "-pkeyopt", "rsa_padding_mode:pkcs1")
        text = openssl(*words, given=bytes.fromhex(image.findtext(tag)))
        assert re.fullmatch(rb"[0-9a-f]{32}", text)
        return text.decode()

    key, vector = opened("user_encrypted_key", user_key), opened("user_encrypted_iv", user_key)
    assert (key, vector) == (opened("ec2_encrypted_key", ec2_key), opened("ec2_encrypted_iv", ec2_key))
    secret = b""
    for number, part in enumerate(image.find("parts")):
        assert part.get("index") == str(number)
        piece = (manifest.parent / part.findtext("filename")).read_bytes()
        assert hashlib.sha1(piece).hexdigest() == part.findtext("digest")
        secret += piece
    assert len(secret) == int(image.findtext("bundled_size"))
    plain = gzip.decompress(openssl("enc", "-d", "-aes-128-cbc", "-K", key, "-iv", vector, given=secret))
    assert hashlib.sha1(plain).hexdigest() == image.findtext("digest")
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.size) == (image.findtext("name"), int(image.findtext("size")))
        return tar.extractfile(member).read()


def options(keys, **more) -> BundleOptions:
    (key, user), (_, ec2) = keys
    given = {"type": "machine", "user": "123456789012", "architecture": "x86_64", **more}
    return BundleOptions(key=key, certificate=user, ec2_certificate=ec2, **given)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 65536, 12 * MIB + 7])
def test_bundles_of_every_size(tmp_path, keys, size):
    image = data("bundle", size)
    (tmp_path / "t.img").write_bytes(image)
    report = bundle(tmp_path / "t.img", tmp_path / "out", options(keys))
    assert prove(Path(report.target), keys) == image
    assert report.parts == (2 if size > PART else 1)
    unbundle(report.target, tmp_path / "back.img", key=keys[0][0])
    assert (tmp_path / "back.img").read_bytes() == image


def test_what_a_manifest_says(tmp_path, keys):
    (tmp_path / "a & b.img").write_bytes(data("x", 5000))
    asked = options(
        keys,
        kernel_id="aki-1",
        ramdisk_id="ari-2",
        mappings={"root": "/dev/sda1", "ephemeral0": "sdb"},
        architecture="arm64",
    )
    report = bundle(tmp_path / "a & b.img", tmp_path / "out", asked)
    prove(Path(report.target), keys)
    root = ET.parse(report.target).getroot()
    config = root.find("machine_configuration")
    assert [child.tag for child in config] == ["architecture", "block_device_mapping", "kernel_id", "ramdisk_id"]
    assert {m.findtext("virtual"): m.findtext("device") for m in config.iter("mapping")} == dict(asked.mappings)
    with open_package(report.target) as package:
        said = package.details()["bundle"]
    assert (said["name"], said["kernel_id"], said["architecture"]) == ("a & b.img", "aki-1", "arm64")


@pytest.mark.parametrize("kind", ["kernel", "ramdisk"])
def test_kernels_and_ramdisks_are_taken_as_they_are(tmp_path, keys, kind):
    (tmp_path / "k").write_bytes(data(kind, 3 * MIB))
    report = bundle(tmp_path / "k", tmp_path / "out", options(keys, type=kind))
    assert prove(Path(report.target), keys) == data(kind, 3 * MIB)
    assert ET.parse(report.target).getroot().findtext("image/type") == kind


def test_a_machine_image_of_any_format_is_bundled_as_the_guest_sees_it(tmp_path, keys):
    disk = little_disk(2 * MIB)
    (path,) = write_image("qcow2", disk, tmp_path / "d.qcow2")
    report = bundle(path, tmp_path / "out", options(keys))
    assert report.target.endswith("d.img.manifest.xml")
    assert prove(Path(report.target), keys) == content(disk)


def test_the_same_image_makes_the_same_parts(tmp_path, keys):
    (tmp_path / "t.img").write_bytes(data("x", 300_000))
    sums = set()
    for name in ("a", "b"):
        bundle(tmp_path / "t.img", tmp_path / name, options(keys, reproducible=True))
        sums.add(sha256(tmp_path / name / "t.img.part.00"))
    assert len(sums) == 1
    bundle(tmp_path / "t.img", tmp_path / "c", options(keys))
    assert sha256(tmp_path / "c" / "t.img.part.00") not in sums


@pytest.mark.parametrize("sparse", [False, True])
def test_bundles_of_other_makers(tmp_path, keys, sparse):
    image = bytearray(14 * MIB + 300)
    for at in (0, 70_000, 5 * MIB, 14 * MIB + 200):
        image[at : at + 100] = data(at, 100)
    image[6 * MIB : 12 * MIB] = data("body", 6 * MIB)
    manifest = by_hand(tmp_path / "b", bytes(image), keys, sparse=sparse)
    unbundle(manifest, tmp_path / "out.img", key=keys[0][0], certificate=keys[0][1])
    assert (tmp_path / "out.img").read_bytes() == bytes(image)
    assert (tmp_path / "out.img").stat().st_blocks * 512 < 8 * MIB


def test_a_sparse_map_that_goes_on_in_further_blocks(tmp_path, keys):
    image = bytearray(8 * MIB)
    for at in range(0, 8 * MIB, 131072):
        image[at : at + 65536] = data(at, 65536)
    manifest = by_hand(tmp_path / "b", bytes(image), keys, sparse=True)
    unbundle(manifest, tmp_path / "out.img", key=keys[0][0])
    assert (tmp_path / "out.img").read_bytes() == bytes(image)


def test_tampering_is_found_and_leaves_nothing(tmp_path, keys):
    (key, _), _ = keys
    image = data("tamper", 11 * MIB)
    good = by_hand(tmp_path / "good", image, keys)
    text = good.read_text()
    config = re.search("<machine_configuration>.*</machine_configuration>", text, re.DOTALL)[0]
    body = re.search("<image>.*</image>", text, re.DOTALL)[0]

    def signed(changed: str) -> str:
        return with_signature(config, changed, key)

    evil = body.replace("x86_64", "i386")
    cases = {
        "account": (text.replace("123456789012", "999999999999"), IntegrityError),
        "architecture": (text.replace("x86_64", "i386"), IntegrityError),
        "signature": (re.sub("<signature>..", "<signature>00", text), IntegrityError),
        "no signature": (re.sub("<signature>.*</signature>", "", text), FormatError),
        "empty signature": (re.sub("<signature>.*</signature>", "<signature/>", text), FormatError),
        "count": (signed(body.replace('count="2"', 'count="3"')), FormatError),
        "a part twice": (signed(body.replace('index="1"', 'index="0"')), FormatError),
        "size": (signed(re.sub("<size>.*</size>", "<size>5</size>", body)), IntegrityError),
        "bundled size": (signed(re.sub("<bundled_size>.", "<bundled_size>9", body)), IntegrityError),
        "less bundled": (signed(re.sub("<bundled_size>.*</bundled_size>", "<bundled_size>9</bundled_size>", body)), IntegrityError),
        "digest": (signed(re.sub('</type><digest algorithm="SHA1">........', '</type><digest algorithm="SHA1">00000000', body)), IntegrityError),
        "path": (signed(body.replace("<filename>t.img.part.1", "<filename>../t.img.part.1")), PolicyError),
        "name": (signed(body.replace("<name>t.img", "<name>../t.img")), PolicyError),
        "iv": (signed(re.sub("(<user_encrypted_iv>)....", r"\g<1>0000", body)), IntegrityError),
        "version": (text.replace("2007-10-10", "2006-01-01"), FormatError),
        "type": (signed(body.replace("<type>machine", "<type>other")), FormatError),
        "dtd": (text.replace("?>\n", '?>\n<!DOCTYPE manifest [<!ENTITY x "y">]>\n'), PolicyError),
        "cut": (text[: len(text) // 2], FormatError),
        # What is signed must be what is read: another image beside it, in a comment, behind a prefix.
        "two images": (text.replace("</manifest>", f"{evil}</manifest>"), FormatError),
        "image in a comment": (text.replace("</manifest>", f"<!-- {evil} --></manifest>"), FormatError),
        "prefix": (text.replace("<image>", '<x:image xmlns:x="urn:x">').replace("</image>", "</x:image>").replace("<bundler>", f"<!--{body}--><bundler>"), FormatError),
        "deeper": (text.replace("<image>", "<a><image>").replace("</image>", "</image></a>"), FormatError),
    }  # fmt: skip
    for name, (changed, kind) in cases.items():
        good.write_text(changed)
        with pytest.raises(kind):
            unbundle(good, tmp_path / "out.img", key=key)
        assert not (tmp_path / "out.img").exists(), name
    good.write_text(text)
    part = good.parent / "t.img.part.1"
    whole = part.read_bytes()
    for name, damaged in {
        "flipped": bytes([whole[0] ^ 1]) + whole[1:],
        "short": whole[:16],
        "ragged": whole[:-1],
        "long": whole + whole[:16],
        "empty": b"",
    }.items():
        part.write_bytes(damaged)
        with pytest.raises((IntegrityError, FormatError)):
            unbundle(good, tmp_path / "out.img", key=key)
        assert not (tmp_path / "out.img").exists(), name
    part.unlink()
    with pytest.raises(DiskmorphError, match=r"part\.1"):
        unbundle(good, tmp_path / "out.img", key=key)
    part.symlink_to("t.img.part.0")
    with pytest.raises(PolicyError):
        unbundle(good, tmp_path / "out.img", key=key)
    part.unlink()
    part.write_bytes(whole)
    unbundle(good, tmp_path / "out.img", key=key)
    assert (tmp_path / "out.img").read_bytes() == image


def test_keys(tmp_path, keys):
    (key, user), (ec2_key, ec2) = keys
    manifest = by_hand(tmp_path / "b", b"x" * 1000, keys)
    with pytest.raises(IntegrityError, match="signature"):
        unbundle(manifest, tmp_path / "o", key=ec2_key)
    with pytest.raises(OptionError, match="not that of the certificate"):
        unbundle(manifest, tmp_path / "o", key=key, certificate=ec2)
    for wrong in (user, manifest):
        with pytest.raises(OptionError, match="no private key"):
            unbundle(manifest, tmp_path / "o", key=wrong)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(openssl("rsa", "-in", key, "-aes128", "-passout", "pass:x"))
    with pytest.raises(OptionError, match="passphrase"):
        unbundle(manifest, tmp_path / "o", key=locked)
    curve = tmp_path / "ec.pem"
    curve.write_bytes(openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout"))
    with pytest.raises(OptionError, match="RSA"):
        unbundle(manifest, tmp_path / "o", key=curve)
    assert not (tmp_path / "o").exists()


def test_an_expired_certificate_is_a_warning(tmp_path, keys):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    key, user = keys[0]
    old = x509.load_pem_x509_certificate(user.read_bytes())
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    late = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.subject)
        .public_key(old.public_key())
        .serial_number(1)
        .not_valid_before(old.not_valid_before_utc.replace(year=2001))
        .not_valid_after(old.not_valid_before_utc.replace(year=2002))
        .sign(private, hashes.SHA256())
    )
    expired = tmp_path / "late.pem"
    expired.write_bytes(late.public_bytes(serialization.Encoding.PEM))
    manifest = by_hand(tmp_path / "b", b"x" * 1000, keys)
    report = unbundle(manifest, tmp_path / "o", key=key, certificate=expired)
    assert "expired" in report.warnings[0]


def test_a_bundle_may_hold_one_file_only(tmp_path, keys):
    """Archives that hold something else than one file of that size."""
    with pytest.raises(FormatError, match="more than one file"):
        _unbundle_archive(tmp_path / "a", keys, _archive(("t.img", b"x" * 600), ("other", b"y")), 600)
    with pytest.raises(IntegrityError, match="another size"):
        _unbundle_archive(tmp_path / "b", keys, _archive(("t.img", b"x" * 600)), 601)
    with pytest.raises(FormatError, match="no tar archive"):
        _unbundle_archive(tmp_path / "c", keys, b"z" * 4096, 600)
    with pytest.raises(FormatError, match="cut off"):
        _unbundle_archive(tmp_path / "d", keys, _archive(("t.img", b"x" * 6000))[:2000], 6000)
    with pytest.raises(DiskmorphError, match="something else"):
        link = io.BytesIO()
        with tarfile.open(fileobj=link, mode="w") as tar:
            info = tarfile.TarInfo("t.img")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
        _unbundle_archive(tmp_path / "e", keys, link.getvalue(), 0)


def _archive(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def _unbundle_archive(folder: Path, keys, plain: bytes, size: int) -> None:
    """Put another archive into a bundle made by hand, and open it."""
    manifest = by_hand(folder, b"", keys)
    text = manifest.read_text()
    key, vector = "00" * 16, "11" * 16
    secret = openssl("enc", "-aes-128-cbc", "-K", key, "-iv", vector, given=gzip.compress(plain))
    (folder / "t.img.part.0").write_bytes(secret)

    def seal(text: str) -> str:
        words = ("pkeyutl", "-encrypt", "-certin", "-inkey", keys[0][1], "-pkeyopt", "rsa_padding_mode:pkcs1")
        return openssl(*words, given=text.encode()).hex()

    body = re.search("<image>.*</image>", text, re.DOTALL)[0]
    for tag, value in {"size": size, "bundled_size": len(secret), "user_encrypted_iv": seal(vector)}.items():
        body = re.sub(f"<{tag}>.*?</{tag}>", f"<{tag}>{value}</{tag}>", body)
    body = re.sub(r"(<user_encrypted_key[^>]*>)[^<]*", rf"\g<1>{seal(key)}", body)
    digests = [hashlib.sha1(plain).hexdigest(), hashlib.sha1(secret).hexdigest()]
    body = re.sub(r'(<digest algorithm="SHA1">)[^<]*', lambda m: m[1] + digests.pop(0), body)
    config = re.search("<machine_configuration>.*</machine_configuration>", text, re.DOTALL)[0]
    manifest.write_text(with_signature(config, body, keys[0][0]))
    unbundle(manifest, folder / "out", key=keys[0][0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "other"},
        {"user": "me"},
        {"architecture": "vax"},
        {"type": "kernel", "kernel_id": "aki-1"},
        {"kernel_id": "a b"},
        {"mappings": {"root": "<x>"}},
    ],
)
def test_options_that_are_refused(tmp_path, keys, wrong):
    (tmp_path / "t.img").write_bytes(b"x" * 512)
    with pytest.raises(OptionError):
        bundle(tmp_path / "t.img", tmp_path / "out", options(keys, **wrong))
    assert not (tmp_path / "out").exists()


def test_targets(tmp_path, keys):
    (tmp_path / "t.img").write_bytes(b"x" * 512)
    full = tmp_path / "full"
    full.mkdir()
    (full / "keep").write_text("")
    with pytest.raises(TargetError, match="not an empty folder"):
        bundle(tmp_path / "t.img", full, options(keys))
    (tmp_path / "empty").mkdir()
    report = bundle(tmp_path / "t.img", tmp_path / "empty", options(keys))
    assert bundle(tmp_path / "t.img", tmp_path / "dry", options(keys, dry_run=True)).parts == 1
    assert not (tmp_path / "dry").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "t.img"]
    with pytest.raises(TargetError, match="exists"):
        unbundle(report.target, tmp_path / "t.img", key=keys[0][0])
    unbundle(report.target, tmp_path / "t.img", key=keys[0][0], force=True)
    unbundle(report.target, tmp_path / "no.img", key=keys[0][0], dry_run=True)
    assert not (tmp_path / "no.img").exists()


def test_mutants_of_a_manifest(tmp_path, keys):
    import contextlib
    import random

    good = by_hand(tmp_path / "b", b"x", keys).read_bytes()
    rng = random.Random(6)
    for _ in range(500):
        bad = bytearray(good)
        for _ in range(2):
            bad[rng.randrange(len(bad))] = rng.choice((0, 60, 62, 38, 34, rng.randrange(256)))
        with contextlib.suppress(DiskmorphError):
            read_manifest(bytes(bad), file="m", limits=Limits())
