"""s3://BUCKET/KEY as a target: multipart uploads that become objects when all is written, or nothing.

What is written from front to back is sent as it comes, a few parts at a time. Other formats are kept in a file without
a name (in TMPDIR) until they are complete. An upload that is not completed is aborted; after a SIGKILL its parts stay,
invisible, until a lifecycle rule of the bucket (AbortIncompleteMultipartUpload) removes them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from diskmorph.formats import marks
from diskmorph.formats.errors import IntegrityError, TargetError
from diskmorph.formats.output import FileMember, Member, Target
from diskmorph.formats.remote.s3 import client, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.source import Buffer

MARK = "diskmorph-mark"
"""Metadata of an object: the mark of the job that wrote it."""
_LEAST_PART = 8 << 20
_MOST_PARTS = 9000
"""S3 takes 10,000 parts of at least 5 MiB, the last excepted."""
_UNDER_WAY = 4
_IN_MEMORY = 16 << 20
"""Parts larger than this (of objects above 140 GB) are kept in TMPDIR while they are under way."""
_PIECE = 1 << 20
_ZEROES = bytes(_PIECE)


def _exists(url: str) -> TargetError:
    return TargetError("exists already", file=url, hint="replace it with --force")


def _metadata() -> dict[str, str]:
    """Return the mark of the job that writes, if there is one (formats/marks.py); S3 keeps 2 KB of it."""
    mark = marks.current()
    return {} if mark is None or not mark.isascii() or len(mark) > 1900 else {MARK: mark}


def require_free(s3: Any, url: str) -> None:
    """Raise TargetError if there is an object of that name, as far as can be seen; completing an upload asks again."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - an extra, and heavy

    bucket, key = split(url)
    try:
        s3.head_object(Bucket=bucket, Key=key)
    except ClientError:
        return  # not there, or not ours to see
    except BotoCoreError as error:
        raise TargetError(f"s3:head_object fails: {error}", file=url) from error
    raise _exists(url)


def part_size(most: int) -> int:
    """Return the bytes of each part but the last one, of an object of at most `most` bytes."""
    return max(_LEAST_PART, -(-most // _MOST_PARTS >> 20) << 20)


def call(s3: Any, url: str, action: str, **words: Any) -> Any:
    """Ask something of an object. Raises TargetError."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - an extra, and heavy

    bucket, key = split(url)
    try:
        return getattr(s3, action)(Bucket=bucket, Key=key, **words)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code", "") in {"PreconditionFailed", "412"}:
            raise _exists(url) from error
        raise TargetError(f"s3:{action} is refused: {error}", file=url) from error
    except BotoCoreError as error:
        raise TargetError(f"s3:{action} fails: {error}", file=url) from error


def begin(s3: Any, url: str, *, replace: bool) -> str:
    """Begin an upload that carries the mark of the job that writes, and return its name. Raises TargetError."""
    if not replace:
        require_free(s3, url)
    return str(call(s3, url, "create_multipart_upload", Metadata=_metadata())["UploadId"])


def complete(s3: Any, url: str, upload: str, parts: list[dict[str, Any]], *, replace: bool) -> None:
    """Make the object appear; unless it may replace one, only where there is none (If-None-Match)."""
    words = {} if replace else {"IfNoneMatch": "*"}
    call(s3, url, "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts}, **words)


class Parts:
    """A stretch of an upload that is under way, from part `first` on: `append` in order, `finish`, then `close`.

    `part`: the size of each. Raises TargetError.
    """

    def __init__(self, s3: Any, url: str, upload: str, part: int, first: int = 1) -> None:
        self.name = url
        self.size = 0
        self._s3, self._id = s3, upload
        self._part, self._first = part, first
        self._parts: list[Future[dict[str, Any]]] = []
        self._held: BinaryIO | None = None
        self._filled = 0
        self._room = threading.Semaphore(_UNDER_WAY)
        self._pool = ThreadPoolExecutor(_UNDER_WAY, thread_name_prefix="part")

    def append(self, data: Buffer) -> None:
        """Write at the end; waits while too many parts are under way."""
        view = memoryview(data).cast("B")
        while view:
            if self._held is None:
                self._held = cast("BinaryIO", tempfile.SpooledTemporaryFile(_IN_MEMORY, prefix="diskmorph-"))  # noqa: SIM115 - closed when sent
            count = min(len(view), self._part - self._filled)
            try:
                self._held.write(view[:count])
            except OSError as error:
                raise TargetError(
                    f"a temporary file cannot be written: {os.strerror(error.errno or 0)}",
                    file=tempfile.gettempdir(),
                    hint="name a larger place with TMPDIR",
                ) from error
            self._filled, self.size, view = self._filled + count, self.size + count, view[count:]
            if self._filled == self._part:
                self._send()

    def _send(self) -> None:
        for part in self._parts:
            if part.done():
                part.result()  # a part that failed ends the upload
        self._room.acquire()
        body, self._held, self._filled = self._held, None, 0
        self._parts.append(self._pool.submit(self._put, self._first + len(self._parts), body))

    def _put(self, number: int, body: BinaryIO | None) -> dict[str, Any]:
        try:
            if body is not None:
                body.seek(0)
            words = {"UploadId": self._id, "PartNumber": number, "Body": b"" if body is None else body}
            answer = call(self._s3, self.name, "upload_part", **words)
            return {"PartNumber": number, "ETag": answer["ETag"]}
        finally:
            self._room.release()
            if body is not None:
                body.close()

    def finish(self) -> list[dict[str, Any]]:
        """Wait until every part has arrived and return what completing asks for; nothing is visible yet."""
        if self._filled or not self._parts:
            self._send()
        return [part.result() for part in self._parts]

    def close(self) -> None:
        """Give up what was not sent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._held is not None:
            self._held.close()


class Upload(Parts):
    """One multipart upload: `append` in order, `finish`, `complete`; then `abort`, which leaves what was completed.

    `most`: an upper bound of its bytes. Raises TargetError.
    """

    def __init__(self, s3: Any, url: str, most: int, *, replace: bool) -> None:
        super().__init__(s3, url, begin(s3, url, replace=replace), part_size(most))
        self._replace = replace
        self._open = True

    def complete(self) -> None:
        """Make the object appear, as the function of this name does."""
        parts = [part.result() for part in self._parts]
        complete(self._s3, self.name, self._id, parts, replace=self._replace)
        self._open = False

    def abort(self) -> None:
        """Leave nothing behind of what was not completed."""
        self.close()
        if self._open:
            with contextlib.suppress(TargetError):
                call(self._s3, self.name, "abort_multipart_upload", UploadId=self._id)
            self._open = False


class StreamedMember(Member):
    """An object that is sent while it is written, from front to back; gaps are zeroes."""

    fresh = True

    def __init__(self, upload: Parts) -> None:
        self.name = upload.name
        self._upload = upload

    def write(self, offset: int, data: Buffer) -> None:
        """See Member; `offset` may not lie before what was written."""
        if offset < self._upload.size:
            raise IntegrityError(
                "a stream cannot be written backwards", file=self.name, offset=offset, expected=self._upload.size
            )
        self.advance(offset)
        self._upload.append(data)

    def advance(self, offset: int) -> None:
        """Send zeroes up to `offset`."""
        while self._upload.size < offset:
            self._upload.append(_ZEROES[: offset - self._upload.size])


class KeptMember(FileMember):
    """An object that is kept in a file without a name until it is complete."""

    def __init__(self, url: str) -> None:
        super().__init__(-1, Path(url))  # never opened by that name
        self.name = url

    def _create(self) -> int:
        try:
            with tempfile.TemporaryFile(prefix="diskmorph-") as file:
                return os.dup(file.fileno())
        except OSError as error:
            raise TargetError(
                f"no temporary file can be made: {os.strerror(error.errno or 0)}", file=tempfile.gettempdir()
            ) from error

    def send(self, upload: Upload, size: int) -> None:
        """Append the first `size` bytes to an upload."""
        self.resize(size)
        at = 0
        while at < size:
            data = os.pread(self._fd, min(_PIECE, size - at), at)
            upload.append(data)
            at += len(data)


class S3Target(Target):
    """Objects in one bucket: `url` and, beside it, the other `names`; the first appears last.

    `streamed`: all are written from front to back. `most`: bytes that each will have at the most. `force`: existing
    objects may be replaced. Raises TargetError, OptionError, UnsupportedError (boto3 is missing).
    """

    def __init__(self, url: str, names: Sequence[str], most: int, *, streamed: bool, force: bool = False) -> None:
        s3 = client()
        folder = url.rpartition("/")[0]
        urls = [url, *(f"{folder}/{name}" for name in names[1:])]
        self._uploads: list[Upload] = []
        self._streamed: list[StreamedMember] = []
        self._kept: list[KeptMember] = []
        try:
            for one in urls:
                self._uploads.append(Upload(s3, one, most, replace=force))
            if streamed:
                self._streamed = [StreamedMember(upload) for upload in self._uploads]
            else:
                for one in urls:
                    self._kept.append(KeptMember(one))
        except BaseException:
            self.close()
            raise
        self.members = self._streamed or self._kept

    def commit(self, sizes: Sequence[int]) -> None:
        """See Target."""
        for member, size in zip(self._streamed, sizes, strict=False):
            member.advance(size)
        for kept, upload, size in zip(self._kept, self._uploads, sizes, strict=False):
            kept.send(upload, size)
        for upload in self._uploads:
            upload.finish()
        for upload in reversed(self._uploads):
            upload.complete()

    def close(self) -> None:
        """See Target."""
        for upload in self._uploads:
            upload.abort()
        for member in self._kept:
            member.close()


def send_file(s3: Any, path: str | os.PathLike[str], url: str, *, force: bool) -> int:
    """Make an object of a local file, whole or not at all; return its size. Raises TargetError."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        size = os.fstat(file.fileno()).st_size
        upload = Upload(s3, url, size, replace=force)
        try:
            while data := file.read(_PIECE):
                upload.append(data)
            upload.finish()
            upload.complete()
        finally:
            upload.abort()
    return size
