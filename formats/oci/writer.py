"""Writes container images: OCI layouts and archives, docker-archives; the same bytes for the same content.

A layer's name is the hash of its bytes, so it is known when they are written: a layout's blobs are renamed then, an
archive's headers written afterwards into the room left for them.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from diskmorph.formats.errors import OptionError
from diskmorph.formats.oci import schema as s
from diskmorph.formats.spool import codec_of, decode_stream
from diskmorph.formats.tar.writer import header_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.source import ByteSource

_STEP = 1 << 20
_BLOCK = 512
_QUEUE = 8


class Stored(NamedTuple):
    """A layer as it was written: digest and size of the blob, digest of its content, media type."""

    digest: str
    size: int
    diff_id: str
    media_type: str


@dataclass(frozen=True)
class NewLayer:
    """A layer to be made of a tar archive (a disk of its bytes)."""

    archive: Disk


@dataclass(frozen=True)
class OldLayer:
    """A layer of another image, taken over as it is stored."""

    source: ByteSource
    diff_id: str
    media_type: str


class Sink(Protocol):
    """Where the files of an image go."""

    def blob(self, chunks: Iterator[bytes], name: Callable[[], str]) -> None:
        """Write a file whose name is known when all chunks were taken."""


@dataclass(frozen=True)
class NewImage:
    """An image to be written: configuration (without rootfs), layers from the lowest, name and tag, compression."""

    config: Mapping[str, Any]
    layers: Sequence[NewLayer | OldLayer]
    tag: str | None = None
    compress: str = "gzip"
    progress: Callable[[int], None] = field(default=lambda _: None)


def to_json(value: Any) -> bytes:
    """Return JSON in one form: keys sorted, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_blobs(image: NewImage, sink: Sink) -> bytes:
    """Write layers and configuration of an OCI image; return its manifest, which is not written."""
    stored = [_write_layer(layer, image, sink, _oci_blob_name, plain=False) for layer in image.layers]
    config = _put_json(sink, _config(image, stored))
    manifest = {
        "schemaVersion": 2,
        "mediaType": s.OCI_MANIFEST,
        "config": {"mediaType": s.OCI_CONFIG, "digest": config[0], "size": config[1]},
        "layers": [{"mediaType": one.media_type, "digest": one.digest, "size": one.size} for one in stored],
    }
    return to_json(manifest)


def write_layout(image: NewImage, sink: Sink) -> str:
    """Write an OCI layout; return the manifest's digest."""
    manifest = write_blobs(image, sink)
    digest, size = _put_body(sink, manifest)
    descriptor: dict[str, Any] = {"mediaType": s.OCI_MANIFEST, "digest": digest, "size": size}
    platform = {key: image.config[key] for key in ("architecture", "os", "variant") if image.config.get(key)}
    descriptor["platform"] = platform
    if image.tag:
        descriptor["annotations"] = {s.REF_NAME: image.tag}
    index = {"schemaVersion": 2, "mediaType": s.OCI_INDEX, "manifests": [descriptor]}
    put_bytes(sink, "index.json", to_json(index))
    put_bytes(sink, "oci-layout", s.LAYOUT)
    return digest


def write_docker(image: NewImage, sink: Sink) -> str:
    """Write a docker-archive; return the configuration's digest, which is the image's ID."""
    stored = [_write_layer(layer, image, sink, _docker_layer_name, plain=True) for layer in image.layers]
    body = to_json(_config(image, stored))
    digest = hashlib.sha256(body).hexdigest()
    put_bytes(sink, f"{digest}.json", body)
    tags = [image.tag if ":" in image.tag else f"{image.tag}:latest"] if image.tag else None
    layers = [_docker_layer_name(one.diff_id) for one in stored]
    put_bytes(sink, "manifest.json", to_json([{"Config": f"{digest}.json", "RepoTags": tags, "Layers": layers}]))
    return f"sha256:{digest}"


def put_bytes(sink: Sink, name: str, data: bytes) -> None:
    """Write a small file."""
    sink.blob(iter((data,)), lambda: name)


def _config(image: NewImage, stored: Sequence[Stored]) -> dict[str, Any]:
    return {**image.config, "rootfs": {"type": "layers", "diff_ids": [one.diff_id for one in stored]}}


def _oci_blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _docker_layer_name(diff_id: str) -> str:
    return f"{diff_id.partition(':')[2]}.tar"


def _put_json(sink: Sink, value: Any) -> tuple[str, int]:
    return _put_body(sink, to_json(value))


def _put_body(sink: Sink, body: bytes) -> tuple[str, int]:
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    put_bytes(sink, _oci_blob_name(digest), body)
    return digest, len(body)


def _write_layer(
    layer: NewLayer | OldLayer, image: NewImage, sink: Sink, name: Callable[[str], str], *, plain: bool
) -> Stored:
    """Write a layer, plain or as `image.compress` says; an old one as it is unless it must be plain."""
    if isinstance(layer, OldLayer):
        return _write_old(layer, sink, name, plain=plain)
    inner, outer = hashlib.sha256(), hashlib.sha256()
    size = 0

    def counted(chunks: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            outer.update(chunk)
            size += len(chunk)
            yield chunk

    compress = "none" if plain else image.compress
    content = _hashed(_chunks(layer.archive, image.progress), inner)
    sink.blob(counted(encoded(content, compress)), lambda: name(f"sha256:{outer.hexdigest()}"))
    suffix = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}[compress]
    return Stored(f"sha256:{outer.hexdigest()}", size, f"sha256:{inner.hexdigest()}", s.OCI_LAYER + suffix)


def _write_old(layer: OldLayer, sink: Sink, name: Callable[[str], str], *, plain: bool) -> Stored:
    source = layer.source
    codec = codec_of(source)
    digest = hashlib.sha256()
    size = 0

    def chunks() -> Iterator[bytes]:
        nonlocal size
        for chunk in decode_stream(source, codec) if plain and codec else _source_chunks(source):
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    sink.blob(chunks(), lambda: name(f"sha256:{digest.hexdigest()}"))
    media = s.OCI_LAYER + {None: "", "gzip": "+gzip", "zstd": "+zstd"}.get(None if plain else codec, "+gzip")
    return Stored(f"sha256:{digest.hexdigest()}", size, layer.diff_id, media)


def _source_chunks(source: ByteSource) -> Iterator[bytes]:
    for at in range(0, source.size, _STEP):
        yield source.read(at, min(_STEP, source.size - at))


def _chunks(disk: Disk, progress: Callable[[int], None]) -> Iterator[bytes]:
    for at in range(0, disk.size, _STEP):
        data = disk.read(at, min(_STEP, disk.size - at))
        progress(len(data))
        yield data


def _hashed(chunks: Iterator[bytes], found: Any) -> Iterator[bytes]:
    for chunk in chunks:
        found.update(chunk)
        yield chunk


def encoded(chunks: Iterator[bytes], compress: str) -> Iterator[bytes]:
    """Yield chunks compressed by "gzip" or "zstd", or as they are by "none"; they are made in a thread of their own."""
    if compress == "none":
        yield from chunks
        return
    encoder = _encoder(compress)
    for chunk in _ahead(chunks):
        out = encoder.compress(chunk)
        if out:
            yield out
    yield encoder.flush()


def _encoder(compress: str) -> Any:
    if compress == "gzip":
        from isal import isal_zlib  # noqa: PLC0415

        return isal_zlib.compressobj(2, isal_zlib.DEFLATED, zlib.MAX_WBITS + 16)  # a header without name and time
    if compress == "zstd":
        import zstandard  # noqa: PLC0415

        return zstandard.ZstdCompressor(level=3).compressobj()
    raise OptionError(f"layers are not compressed by {compress!r}", hint="gzip, zstd or none")


def _ahead(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what another thread takes from `chunks`, a few at most ahead; its error is raised here."""
    ready: queue.Queue[bytes | BaseException | None] = queue.Queue(_QUEUE)
    stopped = threading.Event()

    def work() -> None:
        last: BaseException | None = None
        try:
            for chunk in chunks:
                ready.put(chunk)
                if stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            last = error
        ready.put(last)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            found = ready.get()
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stopped.set()
        while thread.is_alive():
            try:
                ready.get(timeout=0.05)
            except queue.Empty:
                continue


class ArchiveSink:
    """Writes an image's files as members of a tar archive; `write(offset, data)` puts bytes of the archive."""

    def __init__(self, write: Callable[[int, bytes], None], mtime: int = 0) -> None:
        self._write = write
        self._mtime = mtime
        self._folders: set[str] = set()
        self.at = 0

    def blob(self, chunks: Iterator[bytes], name: Callable[[], str]) -> None:
        """See Sink."""
        start = self.at
        at = start + _BLOCK
        for chunk in chunks:
            self._write(at, chunk)
            at += len(chunk)
        self._write(start, header_bytes(name().encode(), at - start - _BLOCK, self._mtime))
        self.at = at + -(at - start) % _BLOCK

    def finish(self) -> int:
        """Write the end mark; return the archive's size."""
        self._write(self.at, bytes(2 * _BLOCK))
        return self.at + 2 * _BLOCK


__all__ = [
    "ArchiveSink",
    "NewImage",
    "NewLayer",
    "OldLayer",
    "Sink",
    "Stored",
    "encoded",
    "put_bytes",
    "to_json",
    "write_blobs",
    "write_docker",
    "write_layout",
]
