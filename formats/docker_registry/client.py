"""One repository of a registry: manifests and blobs, read and written (OCI distribution-spec 1.1)."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from diskmorph.formats.docker_registry.auth import Authorizer
from diskmorph.formats.docker_registry.transport import ATTEMPTS, RETRIED, BrokenOffError, Origin, Transport, joined
from diskmorph.formats.errors import IntegrityError, SourceError, TargetError
from diskmorph.formats.numbers import whole_number
from diskmorph.formats.pools import is_local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from diskmorph.formats.docker_registry.reference import Reference
    from diskmorph.formats.docker_registry.transport import Answer
    from diskmorph.formats.source import ByteSource

ACCEPTED = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_STEP = 1 << 20
_PROGRESS = 64 << 20  # bytes that earn a transfer one more attempt
_ERROR = 64 << 10


class Manifest(NamedTuple):
    """A manifest or an index as the registry gave it, and its digest."""

    data: bytes
    digest: str


class Repository:
    """A repository under one reference. `push`: it is to be written as well. Thread-safe; close it."""

    def __init__(self, reference: Reference, *, push: bool = False) -> None:
        self.name = str(reference)
        self.reference = reference
        self._transport = Transport(plain=reference.plain)
        self._base = ""
        self._auth = Authorizer(reference, self._transport, "pull,push" if push else "pull")

    def stop(self) -> None:
        """Let transfers that still run end with SourceError."""
        self._transport.stop()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    # ------------------------------------------------------------ reading

    def manifest(self, wanted: str, most: int) -> Manifest:
        """Return a manifest or index by tag or digest, at most `most` bytes, its digest verified.

        Raises SourceError (not there, refused), IntegrityError.
        """
        answer = self._call("GET", f"manifests/{wanted}", {"Accept": ", ".join(ACCEPTED)})
        self._require(answer, {200}, "such an image")
        told = answer.header("Docker-Content-Digest")
        data = answer.read(most)
        kind = (wanted if ":" in wanted else "sha256:").partition(":")[0]
        digest = f"{kind}:{hashlib.new(kind, data).hexdigest()}"
        for expected in (wanted if ":" in wanted else digest, told if told.startswith(f"{kind}:") else digest):
            if expected != digest:
                raise IntegrityError(
                    "a manifest's digest is wrong",
                    file=self.name,
                    structure="manifest",
                    expected=expected,
                    found=digest,
                )
        return Manifest(data, digest)

    def blob(self, digest: str, size: int) -> Iterator[bytes]:
        """Yield a blob of exactly `size` bytes; what breaks off is asked for again from there.

        Raises IntegrityError at the latest when all is yielded, SourceError.
        """
        found = hashlib.new(digest.partition(":")[0])
        done = failed = 0
        while True:
            try:
                for chunk in self._blob_from(digest, done, size):
                    self._transport.require_running()
                    done += len(chunk)
                    if done > size:
                        raise self._wrong_size(digest, size, f"more than {size}")
                    found.update(chunk)
                    yield chunk
                break
            except BrokenOffError:
                failed += 1
                if not done or failed > ATTEMPTS + done // _PROGRESS:  # a server that never talked is told soon
                    raise
                self._transport.pause(min(failed - 1, ATTEMPTS))
        if done != size:
            raise self._wrong_size(digest, size, done)
        kind, _, wanted = digest.partition(":")
        if found.hexdigest() != wanted:
            raise IntegrityError(
                "a blob's digest is wrong", file=self.name, expected=digest, found=f"{kind}:{found.hexdigest()}"
            )

    def _blob_from(self, digest: str, start: int, size: int) -> Iterator[bytes]:
        """Yield a blob's bytes from `start`, whether or not the server answers ranges."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        answer = self._call("GET", f"blobs/{digest}", headers)
        self._require(answer, {200, 206} if start else {200}, f"the blob {digest}")
        skip = start
        if answer.status == 206:
            span = re.match(r"bytes (\d+)-", answer.header("Content-Range"))
            if not span or whole_number(span[1], start) != start:
                answer.close()
                raise SourceError("the registry answers with another range", file=self.name, offset=start)
            skip = 0
        length = whole_number(answer.header("Content-Length"), (1 << 63) - 1)
        if length is not None and length - skip != size - start:
            answer.close()
            raise self._wrong_size(digest, size, length - skip + start)
        try:
            while data := answer.chunk(_STEP):
                if skip:
                    data, skip = data[skip:], max(0, skip - len(data))
                if data:
                    yield data
        finally:
            answer.close()

    def _wrong_size(self, digest: str, size: int, found: object) -> IntegrityError:
        return IntegrityError(
            f"the blob {digest} has another size than its descriptor says", file=self.name, expected=size, found=found
        )

    # ------------------------------------------------------------ writing

    def has_manifest(self, wanted: str) -> bool:
        """Return whether there is a manifest of that tag or digest."""
        answer = self._call("HEAD", f"manifests/{wanted}", {"Accept": ", ".join(ACCEPTED)})
        return self._there(answer)

    def has_blob(self, digest: str) -> bool:
        """Return whether the repository has a blob."""
        return self._there(self._call("HEAD", f"blobs/{digest}", {}))

    def _there(self, answer: Answer) -> bool:
        status = answer.status
        answer.close()
        if status in {401, 403}:
            raise SourceError(f"the registry refuses access ({status})", file=self.name, hint=self._auth.hint())
        if status not in {200, 404}:
            raise SourceError(f"the registry answers {status}", file=self.name)
        return status == 200

    def put_blob(self, digest: str, source: ByteSource) -> None:
        """Store a blob, unless it is there. Raises TargetError, SourceError."""
        if self.has_blob(digest):
            return
        self._put(lambda: self._upload(digest, source), digest, f"the blob {digest}")

    def _upload(self, digest: str, source: ByteSource) -> Answer:
        """Open an upload and send all of a blob in one request ("POST then PUT")."""
        begun = self._call("POST", "blobs/uploads/", {"Content-Length": "0"})
        self._require(begun, {202}, "an upload", writing=True)
        place = joined(begun.url, begun.header("Location"))
        begun.close()
        if Origin.of(place).scheme != "https" and self._base.startswith("https:"):
            raise TargetError("is told to send without encryption, which is refused", file=self.name)
        place += ("&" if "?" in place else "?") + "digest=" + quote(digest, safe="")
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(source.size)}
        return self._authorized("PUT", place, headers, lambda: _Reader(source))

    def put_manifest(self, tag: str, data: bytes, media_type: str) -> None:
        """Store a manifest under a tag, last of all. Raises TargetError, SourceError."""
        headers = {"Content-Type": media_type, "Content-Length": str(len(data))}
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        url = self._url(f"manifests/{tag}")
        self._put(lambda: self._authorized("PUT", url, headers, lambda: data), digest, "the manifest")

    def _put(self, attempt: Callable[[], Answer], digest: str, what: str) -> None:
        """Do what stores something, again from its beginning where that may help."""
        for failed in range(ATTEMPTS):
            last = failed + 1 == ATTEMPTS
            try:
                answer = attempt()
            except BrokenOffError:
                if last:
                    raise
                self._transport.pause(failed)
                continue
            if answer.status not in RETRIED or last:
                self._require_stored(answer, digest, what)
                return
            answer.close()
            self._transport.pause(failed, answer.header("Retry-After"))

    def _require_stored(self, answer: Answer, digest: str, what: str) -> None:
        self._require(answer, {201, 202, 204}, what, writing=True)
        told = answer.header("Docker-Content-Digest")
        answer.close()
        if told and told != digest:
            raise IntegrityError(f"the registry stored {what} otherwise", file=self.name, expected=digest, found=told)

    # ------------------------------------------------------------ requests

    def _url(self, path: str) -> str:
        if not self._base:
            self._base = self._find_base()
        return f"{self._base}/v2/{self.reference.name}/{path}"

    def _find_base(self) -> str:
        """Return scheme and host: https, http where the user says so; this machine's own are asked which it is."""
        host = self.reference.api_host
        if self.reference.plain:
            return f"http://{host}"
        if not is_local(host):
            return f"https://{host}"
        try:
            answer = self._transport.attempt("GET", f"http://{host}/v2/", {}, None)
            answer.close()
        except BrokenOffError as error:
            if "refused" in str(error):
                raise
            return f"https://{host}"
        return f"https://{host}" if answer.status == 400 else f"http://{host}"

    def _call(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        return self._authorized(method, self._url(path), headers, None)

    def _authorized(self, method: str, url: str, headers: Mapping[str, str], body: Any) -> Answer:
        """Send a request; answer the registry's challenge once."""
        secret = self._auth.header
        answer = self._send(method, url, headers, secret, body)
        if answer.status == 401:
            answer.close()
            renewed = self._auth.renew(secret, answer, f"{self._base}/")
            if renewed is not None:
                answer = self._send(method, url, headers, renewed, body)
        return answer

    def _send(self, method: str, url: str, headers: Mapping[str, str], secret: str | None, body: Any) -> Answer:
        secret = secret if url.startswith(f"{self._base}/") else None
        if body is None:
            return self._transport.request(method, url, headers, secret)
        return self._transport.attempt(method, url, headers, secret, body)

    def _require(self, answer: Answer, good: set[int], what: str, *, writing: bool = False) -> None:
        """Raise SourceError, or TargetError where something was to be written, unless the status is a good one."""
        if answer.status in good:
            return
        said = self._said(answer)
        kind = TargetError if writing else SourceError
        if answer.status in {401, 403}:
            raise kind(f"the registry refuses access{said}", file=self.name, hint=self._auth.hint())
        if answer.status == 404:
            raise kind(f"the registry has not got {what}{said}", file=self.name)
        raise kind(f"the registry answers {answer.status} for {what}{said}", file=self.name)

    def _said(self, answer: Answer) -> str:
        """Return the registry's own words (distribution-spec, "Error codes"), as far as they can be shown."""
        try:
            first = json.loads(answer.read(_ERROR))["errors"][0]
            text = f"{first['code']}: {first.get('message') or ''}"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SourceError):
            answer.close()
            return ""
        return " (" + "".join(c for c in text if c.isprintable())[:200] + ")"


class _Reader:
    """A source as the file that urllib3 sends."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._at = source, 0

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        count = min(_STEP if size < 0 else size, self._source.size - self._at)
        data = self._source.read(self._at, count)
        self._at += count
        return data


__all__ = ["Manifest", "Repository"]
