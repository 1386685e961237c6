"""Manifests (.mf) and certificates (.cert) of OVF packages (DSP0243 6.2).

A manifest has a line `SHA256(name)= hex` for each file. It is written exactly so, and read with or without spaces, with
CRs, in SHA-1, SHA-256, SHA-384 and SHA-512. A certificate file signs the manifest's bytes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diskmorph.formats.errors import FormatError, IntegrityError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryptography.hazmat.primitives.hashes import HashAlgorithm

    from diskmorph.formats.source import ByteSource

ALGORITHMS = ("sha1", "sha256", "sha512")
"""What is written; SHA-384 is read too."""

_READ = frozenset({"SHA1", "SHA256", "SHA384", "SHA512"})
_LINE = re.compile(r"\s*([A-Za-z0-9-]+)\s*\(\s*(.+?)\s*\)\s*=\s*([0-9A-Fa-f]+)\s*")
_EXACT = re.compile(r"(SHA1|SHA256|SHA512)\(([^()]+)\)= ([0-9a-f]+)")
_STEP = 1 << 20
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Digest:
    """A line of a manifest: the digest (lower-case hex) of a file by an algorithm ("SHA256"). `exact`: in form."""

    algorithm: str
    name: str
    hex: str
    line: int
    exact: bool = True


def parse_manifest(text: bytes, *, file: str) -> list[Digest]:
    """Return a manifest's lines. Raises FormatError for what is no such line, UnsupportedError for algorithms."""
    found = []
    lines = text.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        digest = _parse_line(line, number, file, "manifest")
        found.append(digest)
    return found


def _parse_line(line: str, number: int, file: str, structure: str) -> Digest:
    match = _LINE.fullmatch(line)
    if match is None:
        raise FormatError(
            f"line {number} of its {structure} is damaged",
            file=file,
            format="ovf",
            structure=structure,
            expected="SHA256(name)= hex",
            found=repr(line.strip()[:80]),
        )
    word = match[1].upper().replace("-", "")
    if word not in _READ:
        raise UnsupportedError(
            f"its {structure} has digests by {match[1]}, which is not supported",
            feature=word,
            file=file,
            format="ovf",
        )
    return Digest(word, match[2], match[3].lower(), number, exact=_EXACT.fullmatch(line) is not None)


def digest_of(source: ByteSource, algorithms: tuple[str, ...]) -> dict[str, str]:
    """Return the digests of a source's bytes by each algorithm, read once."""
    hashes = {word: hashlib.new(word.lower()) for word in algorithms}  # SHA-1 is what old manifests have
    buffer = bytearray(min(_STEP, max(source.size, 1)))
    at = 0
    while at < source.size:
        piece = memoryview(buffer)[: min(len(buffer), source.size - at)]
        source.read_into(at, piece)
        for one in hashes.values():
            one.update(piece)
        at += len(piece)
    return {word: one.hexdigest() for word, one in hashes.items()}


def verify_digest(source: ByteSource, name: str, wanted: list[Digest], *, file: str) -> None:
    """Raise IntegrityError unless a file has every digest that the manifest says."""
    found = digest_of(source, tuple({digest.algorithm for digest in wanted}))
    for digest in wanted:
        if found[digest.algorithm] != digest.hex:
            raise IntegrityError(
                f"{name} is not what the manifest says: its {digest.algorithm} differs",
                file=file,
                format="ovf",
                structure="manifest",
                field=f"line {digest.line}",
                expected=digest.hex,
                found=found[digest.algorithm],
            )


def build_manifest(algorithm: str, digests: Mapping[str, str]) -> bytes:
    """Return a manifest's text: names to lower-case hex digests by `algorithm` ("sha256"), in order."""
    return "".join(f"{algorithm.upper()}({name})= {value}\n" for name, value in digests.items()).encode()


def manifest_size(algorithm: str, names: list[str]) -> int:
    """Return the bytes that a manifest of these names has, whatever the digests."""
    width = hashlib.new(algorithm).digest_size * 2
    return len(build_manifest(algorithm, dict.fromkeys(names, "0" * width)))


def verify_certificate(certificate: bytes, manifest: bytes, *, manifest_name: str, file: str) -> list[str]:
    """Check a certificate file's signature over the manifest; return warnings.

    The signature must be the certificate's own; who issued the certificate is not checked against anything, and one
    that has expired is taken with a warning. Raises FormatError and IntegrityError.
    """
    from cryptography import x509  # noqa: PLC0415 - slow to load, and rare
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import padding, rsa  # noqa: PLC0415

    signed, name = _signature(certificate, file)
    if name != manifest_name:
        raise FormatError(
            "its certificate signs another file than its manifest",
            file=file,
            format="ovf",
            structure="certificate",
            expected=manifest_name,
            found=name,
        )
    block = _CERTIFICATE.search(certificate)
    try:
        if block is None:
            raise ValueError("no certificate in it")
        loaded = x509.load_pem_x509_certificate(block[0])
        key = loaded.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError(
            f"its certificate cannot be read: {error}", file=file, format="ovf", structure="certificate"
        ) from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise UnsupportedError("its certificate's key is not RSA", feature="certificates", file=file, format="ovf")
    try:
        key.verify(bytes.fromhex(signed.hex), manifest, padding.PKCS1v15(), _hash(signed.algorithm))
    except (InvalidSignature, ValueError) as error:
        raise IntegrityError(
            "its manifest is not what its certificate signed", file=file, format="ovf", structure="certificate"
        ) from error
    return _validity(loaded.not_valid_before_utc, loaded.not_valid_after_utc)


def _signature(certificate: bytes, file: str) -> tuple[Digest, str]:
    for number, line in enumerate(certificate.decode("latin-1").split("\n"), 1):
        if line.startswith("-----BEGIN"):
            break
        if line.strip():
            digest = _parse_line(line, number, file, "certificate")
            return digest, digest.name
    raise FormatError("its certificate file has no signature", file=file, format="ovf", structure="certificate")


def _hash(word: str) -> HashAlgorithm:
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415

    known: dict[str, HashAlgorithm] = {
        "SHA1": hashes.SHA1(),  # noqa: S303 - what old packages are signed with
        "SHA256": hashes.SHA256(),
        "SHA384": hashes.SHA384(),
        "SHA512": hashes.SHA512(),
    }
    return known[word]


def _validity(begin: dt.datetime, end: dt.datetime) -> list[str]:
    now = dt.datetime.now(dt.UTC)
    if now > end:
        return [f"its certificate has expired on {end:%Y-%m-%d}"]
    if now < begin:
        return [f"its certificate is not valid before {begin:%Y-%m-%d}"]
    return []
