"""EC2 bundles both ways, streaming: image, tar, gzip, AES-128-CBC in one stream, parts of 10 MiB.

`PartWriter` makes the parts and the manifest; `unbundle` proves a manifest and gives the image back.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from diskmorph.formats.ami.keys import Certificate, PrivateKey, decryptor, encryptor
from diskmorph.formats.ami.manifest import PART_SIZE, BundleManifest, Part, build_body, build_manifest
from diskmorph.formats.errors import FormatError, IntegrityError, OptionError, UnsupportedError
from diskmorph.formats.tar.schema import (
    BLOCK,
    GNU_SPARSE,
    GNU_SPARSE_MORE,
    GNU_SPARSE_OFFSET,
    HEADER,
    is_tar,
    number,
)
from diskmorph.formats.tarheader import END, build_header, padding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from diskmorph.formats.allocator import Identity
    from diskmorph.formats.source import Buffer, ByteSource

_CIPHER_BLOCK = 16
_STEP = 1 << 20
_LARGEST_EXTENSION = 1 << 20
_MOST_TRAILER = 1 << 20  # zeroes behind the member: GNU tar's blocking factor can be any, but not this
_SPARSE_PIECES = 1 << 20


class Sink(Protocol):
    """Where parts go, or the image: bytes at offsets of a file."""

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`."""


@dataclass(frozen=True, slots=True)
class BundleRequest:
    """What a new bundle shall say. `name` is the image's file name, `size` its bytes."""

    name: str
    size: int
    type: str
    user: str
    architecture: str
    kernel_id: str | None = None
    ramdisk_id: str | None = None
    mappings: Mapping[str, str] = field(default_factory=dict)


class PartWriter:
    """Takes an image's bytes from front to back; writes parts, then returns the manifest.

    `new_part` opens the file of a part by its name. `identity` gives key, IV and the archive's time: with a seed the
    same image makes the same parts (RSA padding keeps the manifest from ever being the same).
    """

    def __init__(self, request: BundleRequest, new_part: Callable[[str], Sink], identity: Identity) -> None:
        if len(request.name.encode()) > 100:
            raise OptionError(f"the name {request.name!r} is too long for a bundle", hint="at most 100 bytes")
        self._request, self._new_part = request, new_part
        self._key, self._iv = identity.bytes("ami/key", 16), identity.bytes("ami/iv", 16)
        self._cipher = encryptor(self._key, self._iv)
        self._packer = zlib.compressobj(6, zlib.DEFLATED, 31)
        self._plain = hashlib.sha1()  # noqa: S324 - what manifest 2007-10-10 demands
        self._left = request.size
        self._ragged = b""  # compressed bytes short of a cipher block
        self._parts: list[Part] = []
        self._sink: Sink | None = None
        self._sha1 = hashlib.sha1()  # noqa: S324
        self._at = 0
        self.total = 0
        self._archive(build_header(request.name, request.size, int(identity.time())))

    def add(self, data: Buffer) -> None:
        """Append the image's next bytes."""
        self._left -= memoryview(data).nbytes
        self._archive(data)

    def finish(self) -> BundleManifest:
        """End the archive and the last part; return the manifest without its keys."""
        if self._left:
            raise IntegrityError("the image has another size than was said", expected=0, found=self._left)
        self._archive(bytes(padding(self._request.size)) + END)
        rest = self._ragged + self._packer.flush()
        short = _CIPHER_BLOCK - len(rest) % _CIPHER_BLOCK
        self._emit(self._cipher.update(rest + bytes((short,)) * short) + self._cipher.finalize())
        self._end_part()
        request = self._request
        return BundleManifest(
            name=request.name,
            user=request.user,
            type=request.type,
            architecture=request.architecture,
            digest=self._plain.hexdigest(),
            size=request.size,
            bundled_size=self.total,
            user_key="",
            user_iv="",
            parts=tuple(self._parts),
            kernel_id=request.kernel_id,
            ramdisk_id=request.ramdisk_id,
            mappings=request.mappings,
        )

    def sealed(self, manifest: BundleManifest, user: Certificate, ec2: Certificate) -> BundleManifest:
        """Return the manifest with key and IV sealed for both sides."""
        return replace(
            manifest,
            user_key=user.seal(self._key),
            user_iv=user.seal(self._iv),
            ec2_key=ec2.seal(self._key),
            ec2_iv=ec2.seal(self._iv),
        )

    def _archive(self, data: Buffer) -> None:
        self._plain.update(data)
        packed = self._ragged + self._packer.compress(data)
        whole = len(packed) // _CIPHER_BLOCK * _CIPHER_BLOCK
        self._ragged = packed[whole:]
        if whole:
            self._emit(self._cipher.update(packed[:whole]))

    def _emit(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._at == PART_SIZE:
                self._end_part()
            if self._sink is None:
                self._sink = self._new_part(self._name())
            piece = view[: PART_SIZE - self._at]
            self._sink.write(self._at, piece)
            self._sha1.update(piece)
            self._at += len(piece)
            self.total += len(piece)
            view = view[len(piece) :]

    def _name(self) -> str:
        return f"{self._request.name}.part.{len(self._parts):02d}"

    def _end_part(self) -> None:
        if self._sink is None:
            return
        self._parts.append(Part(len(self._parts), self._name(), self._sha1.hexdigest()))
        self._sink, self._at, self._sha1 = None, 0, hashlib.sha1()  # noqa: S324


def signed_manifest(manifest: BundleManifest, key: PrivateKey, bundler: tuple[str, str]) -> bytes:
    """Return the text of a manifest, signed."""
    body = build_body(manifest)
    return build_manifest(body, key.sign(b"".join(body)), bundler)


# --- back again


def verify_manifest(manifest: BundleManifest, key: PrivateKey, certificate: Certificate | None, *, file: str) -> None:
    """Raise IntegrityError unless the manifest was signed by that key (and is the certificate's, if one is given)."""
    if certificate is not None and not key.matches(certificate):
        raise OptionError(f"the key {key.name} is not that of the certificate {certificate.name}")
    if not key.verify(manifest.signature, manifest.signed):
        raise IntegrityError(
            "its signature is not that of this key over what it says",
            file=file,
            format="ami",
            structure="manifest",
            field="signature",
            hint="it was changed, or bundled with another key",
        )


def unbundle(
    manifest: BundleManifest,
    key: PrivateKey,
    open_part: Callable[[str], ByteSource],
    sink: Sink,
    *,
    file: str,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the image of a verified manifest into `sink`, leaving out zeroes; every digest and size is checked.

    Raises IntegrityError (a digest or size is another), FormatError (damaged), UnsupportedError.
    """
    secret = key.open(manifest.user_key, file=file, field="user_encrypted_key")
    vector = key.open(manifest.user_iv, file=file, field="user_encrypted_iv")
    parts = _PartReader(manifest, open_part, file)
    digest = hashlib.sha1()  # noqa: S324 - what manifest 2007-10-10 demands
    archive = _Archive(_inflated(_decrypted(parts.pieces(), secret, vector, file), file), digest.update, file)
    _Member(manifest, archive, sink, file, on_progress).read()
    if digest.hexdigest() != manifest.digest:
        raise IntegrityError(
            "the archive inside is another than the manifest says",
            file=file,
            format="ami",
            structure="manifest",
            field="image/digest",
            expected=manifest.digest,
            found=digest.hexdigest(),
        )


class _PartReader:
    """The ciphertext, part after part, each checked when it ends."""

    def __init__(self, manifest: BundleManifest, open_part: Callable[[str], ByteSource], file: str) -> None:
        self._manifest, self._open, self._file = manifest, open_part, file

    def pieces(self) -> Iterator[bytes]:
        """Yield the ciphertext."""
        total = 0
        for part in self._manifest.parts:
            digest = hashlib.sha1()  # noqa: S324
            with self._open(part.name) as source:
                total += source.size
                self._require_size(total)
                for at in range(0, source.size, _STEP):
                    piece = source.read(at, min(_STEP, source.size - at))
                    digest.update(piece)
                    yield piece
            if digest.hexdigest() != part.digest:
                raise IntegrityError(
                    f"its part {part.name} is not what the manifest says: its SHA-1 differs",
                    file=self._file,
                    format="ami",
                    structure="part",
                    expected=part.digest,
                    found=digest.hexdigest(),
                )
        if total != self._manifest.bundled_size:
            self._require_size(total + self._manifest.bundled_size)

    def _require_size(self, total: int) -> None:
        if total > self._manifest.bundled_size:
            raise IntegrityError(
                "its parts have another size than the manifest says",
                file=self._file,
                format="ami",
                structure="manifest",
                field="bundled_size",
                expected=self._manifest.bundled_size,
                found=total,
            )


def _decrypted(pieces: Iterator[bytes], key: bytes, vector: bytes, file: str) -> Iterator[bytes]:
    """Yield the plain bytes; the last block's padding (PKCS#7) is checked and taken off."""
    cipher = decryptor(key, vector)
    held = b""
    for piece in pieces:
        plain = held + cipher.update(piece)
        held = plain[-_CIPHER_BLOCK:]
        yield plain[:-_CIPHER_BLOCK]
    try:
        held += cipher.finalize()
    except ValueError:
        raise _damaged("its ciphertext is no whole number of blocks: it is cut off", file) from None
    count = held[-1] if held else 0
    if not 1 <= count <= _CIPHER_BLOCK or held[-count:] != bytes((count,)) * count:
        raise _damaged("its ciphertext is damaged, or of another key: the padding is wrong", file)
    yield held[:-count]


def _damaged(problem: str, file: str) -> FormatError:
    return FormatError(problem, file=file, format="ami", structure="bundle")


def _inflated(pieces: Iterator[bytes], file: str) -> Iterator[bytes]:
    """Yield the decoded bytes of one gzip stream that is all there is."""
    decoder = zlib.decompressobj(31)
    for piece in pieces:
        rest = piece
        while rest or (decoder.unconsumed_tail and not decoder.eof):
            if decoder.eof:
                raise _damaged("bytes follow the compressed archive", file)
            try:
                data = decoder.decompress(rest, _STEP)
            except zlib.error as error:
                raise _damaged(f"its compressed archive is damaged: {error}", file) from error
            rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if data:
                yield data
    if not decoder.eof:
        raise _damaged("its compressed archive is cut off", file)


class _Archive:
    """A tar archive from front to back."""

    def __init__(self, pieces: Iterator[bytes], digest: Callable[[bytes], None], file: str) -> None:
        self._pieces, self._digest, self._file = pieces, digest, file
        self._held = b""

    def some(self, most: int) -> bytes:
        """Return between 1 and `most` bytes; none at the end."""
        if not self._held:
            self._held = next(self._pieces, b"")
            self._digest(self._held)
        data, self._held = self._held[:most], self._held[most:]
        return data

    def exactly(self, count: int) -> bytes:
        """Return `count` bytes. Raises FormatError where the archive ends before."""
        out = bytearray()
        while len(out) < count:
            data = self.some(count - len(out))
            if not data:
                raise _damaged("the archive inside is cut off", self._file)
            out += data
        return bytes(out)


class _Member:
    """The one file of the archive, written into a sink."""

    def __init__(
        self,
        manifest: BundleManifest,
        archive: _Archive,
        sink: Sink,
        file: str,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._manifest, self._archive, self._sink, self._file = manifest, archive, sink, file
        self._tell = on_progress or (lambda _: None)

    def read(self) -> None:
        """Read everything up to the archive's end."""
        header = self._header()
        stored = number(header.size)
        if header.typeflag == b"S":
            real, pieces = self._sparse()
        else:
            real, pieces = stored, [(0, stored or 0)]
        if real is None or stored is None or real != self._manifest.size or sum(p[1] for p in pieces) != stored:
            raise IntegrityError(
                "the image inside has another size than the manifest says",
                file=self._file,
                format="ami",
                structure="manifest",
                field="size",
                expected=self._manifest.size,
                found=real,
            )
        for start, length in pieces:
            self._copy(start, length)
        self._archive.exactly(padding(stored))
        self._require_end()

    def _header(self) -> Any:
        """Return the member's header; GNU's long names and PAX attributes before it are passed over."""
        while True:
            block = self._archive.exactly(BLOCK)
            if not is_tar(block):
                raise _damaged("what is inside is no tar archive", self._file)
            header = HEADER.parse(block)
            size = number(header.size)
            if header.typeflag in {b"0", b"\0", b"S"}:
                self._raw = block
                return header
            if header.typeflag not in {b"L", b"x", b"g"} or size is None or not 0 <= size <= _LARGEST_EXTENSION:
                raise UnsupportedError(
                    "the archive inside holds something else than a file",
                    feature="tar member kinds",
                    file=self._file,
                    format="ami",
                )
            if b"GNU.sparse" in self._archive.exactly(size + padding(size)):
                raise UnsupportedError(
                    "the archive inside has a sparse map in PAX form",
                    feature="PAX sparse members",
                    file=self._file,
                    format="ami",
                )

    def _sparse(self) -> tuple[int | None, list[tuple[int, int]]]:
        """Return real size and pieces of an old GNU sparse member, as ec2-ami-tools make (`tar -S`)."""
        first = GNU_SPARSE.parse(self._raw[GNU_SPARSE_OFFSET:])
        entries, more = list(first.entries), first.isextended != b"\0"
        while more:
            block = GNU_SPARSE_MORE.parse(self._archive.exactly(BLOCK))
            entries.extend(block.entries)
            more = block.isextended != b"\0"
            if len(entries) > _SPARSE_PIECES:
                raise _damaged("the archive inside has a sparse map that is too large", self._file)
        pieces, reach = [], 0
        for entry in entries:
            if not entry.numbytes.strip(b"\0 "):
                continue
            start, length = number(entry.offset), number(entry.numbytes)
            if start is None or length is None or start < reach or length < 0 or start + length > self._manifest.size:
                raise _damaged("the archive inside has a damaged sparse map", self._file)
            pieces.append((start, length))
            reach = start + length
        return number(first.realsize), pieces

    def _copy(self, start: int, length: int) -> None:
        while length:
            data = self._archive.some(length)
            if not data:
                raise _damaged("the archive inside is cut off", self._file)
            self._put(start, data)
            start, length = start + len(data), length - len(data)
            self._tell(start)

    def _put(self, start: int, data: bytes) -> None:
        """Write what is not zero, by pages of the image."""
        if not data.strip(b"\0"):
            return
        view = memoryview(data)
        at = begin = 0
        while at < len(view):
            stop = min(len(view), at + 65536 - (start + at) % 65536)
            if data.count(0, at, stop) == stop - at:
                if begin < at:
                    self._sink.write(start + begin, view[begin:at])
                begin = stop
            at = stop
        if begin < at:
            self._sink.write(start + begin, view[begin:at])

    def _require_end(self) -> None:
        total = 0
        while data := self._archive.some(_STEP):
            total += len(data)
            if data.strip(b"\0") or total > _MOST_TRAILER:
                raise _damaged("the archive inside holds more than one file", self._file)
