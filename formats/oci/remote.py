"""Container images in registries: their files fetched as they are asked for, and sent, the manifest last."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Self

from diskmorph.formats.docker_registry import BlobCache, Repository, parse_reference
from diskmorph.formats.errors import FormatError, OptionError, TargetError, UnsupportedError
from diskmorph.formats.oci import schema as s
from diskmorph.formats.oci.archive import ImageFiles, blob_name, parse_json
from diskmorph.formats.oci.writer import to_json
from diskmorph.formats.source import ByteSource, BytesSource
from diskmorph.formats.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.formats.docker_registry import Reference
    from diskmorph.formats.limits import Limits

    Fetching = Callable[[int, int], None]

_TELLING = 0.2  # seconds
_AT_ONCE = 3  # transfers, as docker has it


class RegistryFiles(ImageFiles):
    """The files of an image in a registry, under the names that they have in a layout.

    Manifests and blobs come from the cache where it has them. When the first layer is opened all are fetched, a few at
    once. Sizes are those of the descriptors seen so far; what none names is not opened. `on_fetch` is called from the
    thread that opens a layer, with the bytes of all layers that are there and their sum, while it waits.
    """

    def __init__(self, name: str, limits: Limits, on_fetch: Fetching | None = None) -> None:
        reference = parse_reference(name)
        super().__init__(str(reference), limits)
        self._repository = Repository(reference)
        self._cache = BlobCache.of_user()
        self._on_fetch = on_fetch
        self._there: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._manifests: set[str] = set()
        self._layers: list[str] = []
        self._opened: dict[str, Future[ByteSource]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
        self._index = self._first(reference)

    def _first(self, reference: Reference) -> bytes:
        """Return an index that holds what the reference names, as a layout would have it."""
        held = self._cache.find(reference.digest) if reference.digest else None
        if held is not None and reference.digest and held.size <= self.limits.descriptor:
            with held:
                data, digest = held.read(0, held.size), reference.digest
        else:
            data, digest = self._repository.manifest(reference.wanted, self.limits.descriptor)
        media = _media_type(parse_json(data, self.name, "manifest"), self.name)
        self._keep(digest, data)
        return to_json({"manifests": [{"mediaType": media, "digest": digest, "size": len(data)}]})

    def _keep(self, digest: str, data: bytes) -> None:
        """Put a manifest where its file is looked for."""
        done: Future[ByteSource] = Future()
        done.set_result(self._cache.find(digest) or self._cache.store(digest, len(data), iter((data,)), self.name))
        self._opened[digest] = done

    def open(self, name: str) -> ByteSource:
        """See ImageFiles."""
        if name == "index.json":
            return BytesSource(self._index, self.name)
        digest = name.removeprefix("blobs/").replace("/", ":")
        if blob_name(digest, self.name) != name or not (digest in self._sizes or digest in self._opened):
            raise self.missing(name)
        with self._lock:
            for one in self._layers if digest in self._layers else ():
                self._start(one)
            self._start(digest)
        source = self._awaited(digest)
        return source.window(0, source.size, f"{self.name}: {name}")

    def _awaited(self, digest: str) -> ByteSource:
        future = self._opened[digest]
        layers = set(self._layers)
        finished = self._on_fetch is None or digest not in layers or future.done()
        while self._on_fetch is not None and not finished:
            wait((future,), timeout=_TELLING)
            finished = future.done()
            self._on_fetch(sum(self._there.get(one, 0) for one in layers), sum(self._sizes[one] for one in layers))
        return future.result()

    def _start(self, digest: str) -> None:
        if digest not in self._opened:
            self._opened[digest] = self._pool.submit(self._fetch, digest)

    def _fetch(self, digest: str) -> ByteSource:
        size = self._sizes[digest]
        held = self._cache.find(digest)
        if held is not None:
            self._there[digest] = size
            return held
        if digest in self._manifests:
            data = self._repository.manifest(digest, self.limits.descriptor).data
            return self._cache.store(digest, len(data), iter((data,)), self.name)
        return self._cache.store(digest, size, self._counted(digest, size), self.name)

    def _counted(self, digest: str, size: int) -> Iterator[bytes]:
        for chunk in self._repository.blob(digest, size):
            self._there[digest] = self._there.get(digest, 0) + len(chunk)
            yield chunk

    def has(self, name: str) -> bool:
        """See ImageFiles."""
        return name == "index.json"

    def json(self, name: str, digest: str | None = None) -> Any:
        """See ImageFiles; sizes of what the file names are noted."""
        found = super().json(name, digest)
        if isinstance(found, dict) and (digest is None or digest in self._manifests):
            self._note(found)
        return found

    def _note(self, found: dict[str, Any]) -> None:
        fields = s.Fields(found, self.name, "manifest")
        if "manifests" in found:
            for inner in fields.objects("manifests"):
                self._manifests.add(self._sized(inner))
        elif "layers" in found:
            layers = fields.objects("layers")
            if len(layers) > self.limits.members:
                raise FormatError("has too many layers", file=self.name, structure="manifest", found=len(layers))
            self._layers = [self._sized(layer) for layer in layers]
            config = fields.inner("config")
            if config.number("size") > self.limits.descriptor:
                raise FormatError("its configuration is too large", file=self.name, found=config.number("size"))
            self._sized(config)

    def _sized(self, descriptor: s.Fields) -> str:
        digest = descriptor.text("digest")
        blob_name(digest, self.name)  # refuses what is no digest: it becomes a file's name and part of an address
        size = descriptor.number("size")
        if self._sizes.setdefault(digest, size) != size:
            raise FormatError(
                f"names {digest[:80]} with two sizes", file=self.name, expected=self._sizes[digest], found=size
            )
        return digest

    def close(self) -> None:
        """See ImageFiles; transfers that still run are given up."""
        self._repository.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for future in self._opened.values():
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().close()
        self._opened.clear()
        self._repository.close()


def image_digest(name: str, limits: Limits) -> str:
    """Return the digest that a name in a registry stands for now. Raises SourceError, IntegrityError, OptionError."""
    reference = parse_reference(name)
    if reference.digest:
        return reference.digest
    repository = Repository(reference)
    try:
        return repository.manifest(reference.wanted, limits.descriptor).digest
    finally:
        repository.close()


def _media_type(found: Any, name: str) -> str:
    """Return whether what a registry gave is a manifest or an index, by its content.

    Raises FormatError for what is neither or both, UnsupportedError for other kinds by name.
    """
    fields = s.Fields(found, name, "manifest")
    if "manifests" in found and ("layers" in found or "config" in found):
        raise FormatError("is manifest and index at once", file=name, structure="manifest")
    if found.get("schemaVersion") == 1:
        raise UnsupportedError("is a manifest of schema 1", feature="docker schema 1", file=name)
    media = fields.text("mediaType", s.OCI_INDEX if "manifests" in found else s.OCI_MANIFEST)
    if media not in (s.INDEXES if "manifests" in found else s.MANIFESTS):
        raise UnsupportedError(f"holds no image but {media[:80]!r}", feature=media[:80], file=name)
    return media


class RegistryTarget:
    """A place for one image in a registry: a Sink for its blobs, the manifest last. Use it in `with`.

    A tag that exists is replaced only with `force`. A blob is made in `$TMPDIR`, since its name is its digest, and sent
    unless the registry has it. Nothing refers to the blobs before the manifest is there.
    """

    def __init__(self, name: str, *, force: bool) -> None:
        reference = parse_reference(name)
        if reference.digest:
            raise OptionError(f"{reference} is a digest, which is known only afterwards", hint="name a tag")
        self.name = str(reference)
        self.size = 0
        self._tag = reference.wanted
        self._repository = Repository(reference, push=True)
        self._sent: set[str] = set()
        try:
            if self._repository.has_manifest(self._tag) and not force:
                raise TargetError("exists already", file=self.name, hint="replace it with --force")
        except BaseException:
            self._repository.close()
            raise

    def blob(self, chunks: Iterator[bytes], name: Callable[[], str]) -> None:
        """See Sink."""
        with Spool(self.name) as spool:
            for chunk in chunks:
                spool.append(chunk)
            self.send(name().removeprefix("blobs/").replace("/", ":"), spool)

    def send(self, digest: str, source: ByteSource) -> None:
        """Send one blob."""
        self.size += source.size
        if digest not in self._sent:
            self._repository.put_blob(digest, source)
            self._sent.add(digest)

    def commit(self, manifest: bytes, media_type: str = s.OCI_MANIFEST) -> str:
        """Send the manifest, after which the image is there; return its digest."""
        self._repository.put_manifest(self._tag, manifest, media_type)
        self.size += len(manifest)
        return f"sha256:{hashlib.sha256(manifest).hexdigest()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._repository.close()
