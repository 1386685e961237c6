"""LUKS volumes and encrypted qcow2, made by qemu-img and cryptsetup."""

import hashlib
from pathlib import Path

import pytest
from clikit import dm

import diskmorph
from diskmorph.formats.errors import FormatError, PolicyError, UnsupportedError
from diskmorph.formats.luks import schema
from diskmorph.formats.luks.cipher import SectorCipher
from diskmorph.formats.luks.unlock import unlock
from diskmorph.formats.policy import Parents
from diskmorph.formats.source import BytesSource

from testkit import MIB, data, run

QEMU = ("--object", "secret,id=s,file=pass")
SLOW = "iter-time=10"


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pass").write_bytes(b"open sesame")
    Path("line").write_bytes(b"open sesame\n")
    Path("wrong").write_bytes(b"close sesame")
    Path("disk.raw").write_bytes(data("luks", MIB) + bytes(2 * MIB) + data("end", MIB))


def test_qcow2_luks():
    run("qemu-img", "convert", *QEMU, "-f", "raw", "-O", "qcow2",
        "-o", f"encrypt.format=luks,encrypt.key-secret=s,encrypt.{SLOW}", "disk.raw", "e.qcow2")  # fmt: skip
    done = dm("convert", "e.qcow2", "o.raw")
    assert done.status == 1 and "--passphrase-file" in done.err
    done = dm("convert", "e.qcow2", "o.raw", "--passphrase-file", "wrong")
    assert done.status == 1 and "fits no key slot" in done.err
    for name, file in (("a.raw", "pass"), ("b.vmdk", "line")):
        dm("convert", "e.qcow2", name, "--passphrase-file", file).ok()
        assert dm("compare", "disk.raw", name).status == 0
    assert dm("info", "e.qcow2", "--json").ok().json["features"]["encryption"] == "LUKS"
    assert dm("compare", "disk.raw", "e.qcow2", "--passphrase-file", "pass").status == 0


@pytest.mark.parametrize(
    "words",
    [
        "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=plain64,hash-alg=sha512",
    ],
)
def test_luks1_by_qemu(words: str):
    run(
        "qemu-img",
        "convert",
        *QEMU,
        "-f",
        "raw",
        "-O",
        "luks",
        "-o",
        f"key-secret=s,{SLOW},{words}",
        "disk.raw",
        "v.luks",
    )
    dm("convert", "-f", "luks", "v.luks", "o.qcow2", "--passphrase-file", "pass").ok()
    assert dm("compare", "disk.raw", "o.qcow2").status == 0
    dm("convert", "v.luks", "as-it-is.raw").ok()
    assert Path("as-it-is.raw").read_bytes() == Path("v.luks").read_bytes()


@pytest.mark.parametrize("kdf", ["pbkdf2", "argon2id"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_luks2_headers_by_cryptsetup(kdf: str, sector: int):
    """The header is cryptsetup's; what the payload must decrypt to is found by its own key (--dump-volume-key)."""
    Path("v.luks").write_bytes(bytes(20 * MIB))
    cost = ["--pbkdf-force-iterations", "1000" if kdf == "pbkdf2" else "4"]
    cost += ["--pbkdf-memory", "4096", "--pbkdf-parallel", "1"] if kdf == "argon2id" else []
    run("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", kdf, *cost, "--sector-size", str(sector),
        "v.luks", "pass")  # fmt: skip
    run("cryptsetup", "luksDump", "-q", "--dump-volume-key", "--key-file", "pass", "--volume-key-file", "key", "v.luks")
    with diskmorph.open_disk("v.luks", format="luks", parents=Parents(passphrase=b"open sesame")) as disk:
        assert disk.size == 4 * MIB and disk.info.subformat == "LUKS2"
        cipher = SectorCipher("aes", "xts-plain64", Path("key").read_bytes(), sector)
        expected = cipher.decrypt(memoryview(bytes(sector)), 3 * 4096 // 512)
        assert disk.read(3 * 4096, sector) == expected
        assert disk.read(3 * 4096 + 5, 100) == expected[5:105]
    with pytest.raises(PolicyError):
        diskmorph.open_disk("v.luks", format="luks", parents=Parents(passphrase=b"no"))
    bent = bytearray(Path("v.luks").read_bytes())
    bent[5000] ^= 1
    Path("bent").write_bytes(bent)
    with pytest.raises(FormatError, match="checksum"):
        diskmorph.open_disk("bent", format="luks", parents=Parents(passphrase=b"open sesame"))


@pytest.mark.parametrize(
    "text",
    [b"[" * 200_000, b'{"segments": {"0": {"type": "crypt", "sector_size": 1e999}}}'],
    ids=["nested", "infinite"],
)
def test_json_that_makes_no_sense_is_refused(text: bytes):
    size = 4096 + (1 << 18)
    fields = {"magic": schema.MAGIC, "version": 2, "size": size, "sequence": 0, "offset": 0}
    fields["checksum_name"] = b"sha256".ljust(32, b"\0")
    widths = {"label": 48, "salt": 64, "uuid": 40, "subsystem": 48, "padding": 184, "checksum": 64}
    head = schema.HEADER2.build(fields | {name: bytes(width) for name, width in widths.items()})
    raw = bytearray((head.ljust(4096, b"\0") + text).ljust(size, b"\0"))
    at = schema.HEADER2.sizeof() - 64
    raw[at : at + 32] = hashlib.sha256(raw).digest()
    with pytest.raises(FormatError, match="makes no sense"):
        unlock(BytesSource(bytes(raw), "v.luks"), b"x")


def test_what_is_refused():
    with pytest.raises(UnsupportedError, match="serpent"):
        SectorCipher("serpent", "xts-plain64", bytes(64))
    with pytest.raises(FormatError):
        SectorCipher("aes", "xts-plain64", bytes(7))
    with pytest.raises(FormatError):
        diskmorph.open_disk("disk.raw", format="luks", parents=Parents(passphrase=b"x"))
    assert "passphrase" not in repr(Parents(passphrase=b"secret"))


@pytest.mark.parametrize("words", ["cluster_size=64K", "cluster_size=4K", "extended_l2=on"])
def test_qcow2_is_encrypted(words: str):
    Path("few.raw").write_bytes(bytes(65536) + b"x" * 512 + bytes(300_000) + data("few", 1000) + bytes(5 * MIB - 40))
    for name in ("disk.raw", "few.raw"):
        dm("convert", "-o", f"{words},encrypt.format=luks,encrypt.iter-time=20", "--passphrase-file", "line", "--verify",
           "--force", name, "e.qcow2").ok()  # fmt: skip
        assert dm("compare", name, "e.qcow2", "--passphrase-file", "pass").status == 0
        image = "driver=qcow2,file.filename=e.qcow2,encrypt.key-secret=s"
        run("qemu-img", "convert", *QEMU, "--image-opts", image, "-O", "raw", "back.raw")
        got = Path("back.raw").read_bytes()
        want = Path(name).read_bytes()
        assert got[: len(want)] == want and not got[len(want) :].strip(b"\0")
        run("qemu-img", "check", *QEMU, "--image-opts", image)
        assert dm("check", "e.qcow2").status == 0
        run("qemu-io", *QEMU, "--image-opts", image, "-c", "write -P 5 2M 64k", "-c", "read -P 5 2M 64k")
        run("qemu-img", "check", *QEMU, "--image-opts", image)
    raw = Path("e.qcow2").read_bytes()
    assert data("few", 64) not in raw and b"x" * 512 not in raw


def test_passphrases_of_source_and_target_differ():
    words = ("-o", "encrypt.format=luks,encrypt.iter-time=20")
    dm("convert", *words, "--passphrase-file", "pass", "disk.raw", "one.qcow2").ok()
    dm(
        "convert", *words, "--passphrase-file", "pass", "--target-passphrase-file", "wrong", "one.qcow2", "two.qcow2"
    ).ok()
    assert dm("compare", "disk.raw", "two.qcow2", "--passphrase-file", "wrong").status == 0
    assert dm("compare", "disk.raw", "two.qcow2", "--passphrase-file", "pass").status == 1
    assert (
        Path("one.qcow2").read_bytes()[65536 + 4096 :][:4096] != Path("two.qcow2").read_bytes()[65536 + 4096 :][:4096]
    )


def test_what_cannot_be_encrypted_is_refused():
    words = ("-o", "encrypt.format=luks", "disk.raw", "e.qcow2")
    done = dm("convert", *words)
    assert done.status != 0 and "--target-passphrase-file" in done.err
    for more in (("-c",), ("--reproducible",), ("--resume",), ("-o", "preallocation=full"), ("-o", "compat=0.10")):
        assert dm("convert", *more, *words, "--passphrase-file", "pass").status != 0, more
    assert not list(Path().glob("*e.qcow2*"))


def test_trying_a_passphrase_takes_time():
    from diskmorph.formats.luks import making, schema

    for _ in range(5):  # it measures this machine, which other work may hold up
        quick, slow = (schema.HEADER1.parse(making.new_header(b"p", ms).data).slots[0].iterations for ms in (20, 200))
        assert quick >= 1000
        if slow > 3 * quick:
            return
    pytest.fail(f"{slow} iterations in 200 ms, {quick} in 20 ms")


def test_legacy_aes_is_read():
    run("qemu-img", "convert", *QEMU, "-f", "raw", "-O", "qcow2",
        "-o", "encrypt.format=aes,encrypt.key-secret=s,cluster_size=4k", "disk.raw", "e.qcow2")  # fmt: skip
    image = "driver=qcow2,file.filename=e.qcow2,encrypt.key-secret=s"
    # out of order, so that places in the file are not those of the disk
    run("qemu-io", *QEMU, "--image-opts", image, "-c", "write -P 3 3M 9k", "-c", "write -P 4 1500k 1k")
    run("qemu-img", "convert", *QEMU, "--image-opts", image, "-O", "raw", "want.raw")
    dm("convert", "--passphrase-file", "pass", "e.qcow2", "got.raw").ok()
    assert Path("got.raw").read_bytes() == Path("want.raw").read_bytes()
    assert dm("compare", "--passphrase-file", "line", "e.qcow2", "want.raw").status == 0
    assert dm("compare", "--passphrase-file", "wrong", "e.qcow2", "want.raw").status == 3
    done = dm("convert", "e.qcow2", "none.raw")
    assert done.status == 1 and "encrypted with AES" in done.err and "--passphrase-file" in done.err
    dm(
        "convert", "--passphrase-file", "pass", "-o", "encrypt.format=luks,encrypt.iter-time=20", "e.qcow2", "l.qcow2"
    ).ok()
    assert dm("compare", "--passphrase-file", "pass", "l.qcow2", "want.raw").status == 0
