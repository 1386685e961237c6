"""RSA keys and certificates of EC2 bundles. Everything of `cryptography` that bundles need passes through here."""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from diskmorph.formats.errors import FormatError, IntegrityError, OptionError, SourceError

if TYPE_CHECKING:
    import os
    from pathlib import Path

_LARGEST_PEM = 1 << 20
_HEX32 = re.compile(rb"[0-9a-fA-F]{32}")


class PrivateKey:
    """A user's RSA key: signs manifests, and opens what was sealed for its certificate."""

    def __init__(self, path: Path | str | os.PathLike[str]) -> None:
        self.name = str(path)
        try:
            key = serialization.load_pem_private_key(_pem(self.name), password=None)
        except TypeError as error:
            raise OptionError("is protected by a passphrase, which is not asked for", file=self.name) from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise OptionError("is no private key in PEM", file=self.name) from error
        if not isinstance(key, rsa.RSAPrivateKey):
            raise OptionError("is no RSA key", file=self.name)
        self._key = key

    def sign(self, data: bytes) -> str:
        """Return the RSA signature (PKCS#1 v1.5, SHA-1) of `data` in hex."""
        return self._key.sign(data, padding.PKCS1v15(), _sha1()).hex()

    def verify(self, signature: str, data: bytes) -> bool:
        """Return whether this key made the signature."""
        return _verified(self._key.public_key(), signature, data)

    def open(self, sealed: str, *, file: str, field: str) -> bytes:
        """Return the 16 bytes whose hex text was sealed for this key. Raises IntegrityError."""
        try:
            text = self._key.decrypt(bytes.fromhex(sealed), padding.PKCS1v15())
        except ValueError:
            text = b""
        if not _HEX32.fullmatch(text):  # a wrong key gives noise, not an error (implicit rejection)
            raise IntegrityError(
                "its key cannot be opened: it was bundled for another key than this",
                file=file,
                format="ami",
                structure="manifest",
                field=field,
                hint=f"give the key of the account that bundled it, not {self.name}",
            )
        return bytes.fromhex(text.decode())

    def matches(self, certificate: Certificate) -> bool:
        """Return whether the certificate is this key's."""
        return self._key.public_key().public_numbers() == certificate.key.public_numbers()


class Certificate:
    """An X.509 certificate with an RSA key."""

    def __init__(self, path: Path | str | os.PathLike[str]) -> None:
        self.name = str(path)
        try:
            self._certificate = x509.load_pem_x509_certificate(_pem(self.name))
            key = self._certificate.public_key()
        except (ValueError, UnsupportedAlgorithm) as error:
            raise OptionError("is no certificate in PEM", file=self.name) from error
        if not isinstance(key, rsa.RSAPublicKey):
            raise OptionError("has no RSA key", file=self.name)
        self.key = key

    def seal(self, secret: bytes) -> str:
        """Return the hex text of `secret`, encrypted for this certificate (PKCS#1 v1.5), in hex."""
        return self.key.encrypt(secret.hex().encode(), padding.PKCS1v15()).hex()

    def verify(self, signature: str, data: bytes) -> bool:
        """Return whether this certificate's key made the signature."""
        return _verified(self.key, signature, data)

    def warnings(self) -> list[str]:
        """Return what to tell of its validity."""
        now = dt.datetime.now(dt.UTC)
        if now > self._certificate.not_valid_after_utc:
            return [f"the certificate {self.name} has expired on {self._certificate.not_valid_after_utc:%Y-%m-%d}"]
        if now < self._certificate.not_valid_before_utc:
            return [
                f"the certificate {self.name} is not valid before {self._certificate.not_valid_before_utc:%Y-%m-%d}"
            ]
        return []


def _verified(key: rsa.RSAPublicKey, signature: str, data: bytes) -> bool:
    try:
        key.verify(bytes.fromhex(signature), data, padding.PKCS1v15(), _sha1())
    except (InvalidSignature, ValueError):
        return False
    return True


def _sha1() -> hashes.SHA1:
    return hashes.SHA1()  # noqa: S303 - what manifest 2007-10-10 demands


def _pem(name: str) -> bytes:
    try:
        with open(name, "rb") as file:  # noqa: PTH123 - a name that the user gave, perhaps a descriptor's
            data = file.read(_LARGEST_PEM + 1)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=name) from error
    if len(data) > _LARGEST_PEM:
        raise FormatError("is too large for a key or certificate", file=name)
    return data


def encryptor(key: bytes, iv: bytes) -> CipherContext:
    """Return AES-128-CBC, encrypting; PKCS#7 is the caller's."""
    return Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()


def decryptor(key: bytes, iv: bytes) -> CipherContext:
    """Return AES-128-CBC, decrypting; PKCS#7 is the caller's."""
    return Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
