"""An object in S3, written piece by piece: a multipart upload with a few parts under way, or one PUT if it is small."""

from __future__ import annotations

import io
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

from diskmorph.convert.aws.undo import JOB, OBJECT, UPLOAD

if TYPE_CHECKING:
    from diskmorph.convert.aws.job import Job

_LEAST_PART = 8 << 20
_MOST_PARTS = 9000
"""S3 takes 10,000."""
_UNDER_WAY = 4


class ObjectWriter(io.RawIOBase):
    """A binary stream that becomes an object when the `with` block ends well. `size`: its bytes, or an upper bound."""

    def __init__(self, job: Job, bucket: str, key: str, size: int) -> None:
        self.name = f"s3://{bucket}/{key}"
        self._job, self._bucket, self._key = job, bucket, key
        # A stream of encoded data may be a little longer than the disk.
        self._part = max(_LEAST_PART, -(-(size + size // 64) // _MOST_PARTS))
        self._held = bytearray()
        self._upload: str | None = None
        self._parts: list[Future[dict[str, Any]]] = []
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_UNDER_WAY, thread_name_prefix="part")
        self._room = threading.Semaphore(_UNDER_WAY)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """See io.RawIOBase; takes everything. Raises AwsError."""
        view = memoryview(data).cast("B")
        self._held += view
        while len(self._held) >= self._part:
            self._put(bytes(self._held[: self._part]))
            del self._held[: self._part]
        return len(view)

    def _call(self, action: str, **words: Any) -> Any:
        return self._job.session.call(action, stop=self._stop, Bucket=self._bucket, Key=self._key, **words)

    def _metadata(self) -> dict[str, str]:
        return {JOB.replace(":", "-"): self._job.id}

    def _put(self, data: bytes) -> None:
        if self._upload is None:
            answer = self._call("s3:CreateMultipartUpload", Metadata=self._metadata())
            self._upload = str(answer["UploadId"])
            self._job.undo.made(UPLOAD, f"{self._bucket}/{self._key}", self._job.session.region, self._upload)
        for part in self._parts:
            if part.done():
                part.result()
        while not self._room.acquire(timeout=0.2):
            continue
        number = len(self._parts) + 1
        self._parts.append(self._pool.submit(self._send, number, data))

    def _send(self, number: int, data: bytes) -> dict[str, Any]:
        try:
            answer = self._call("s3:UploadPart", UploadId=self._upload, PartNumber=number, Body=data)
            return {"PartNumber": number, "ETag": answer["ETag"]}
        finally:
            self._room.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._stop.set()
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _finish(self) -> None:
        region, name = self._job.session.region, f"{self._bucket}/{self._key}"
        if self._upload is None:
            self._job.undo.made(OBJECT, name, region)
            self._call("s3:PutObject", Body=bytes(self._held), Metadata=self._metadata())
            return
        if self._held:
            self._put(bytes(self._held))
        parts = [part.result() for part in self._parts]
        self._job.undo.made(OBJECT, name, region)
        self._call("s3:CompleteMultipartUpload", UploadId=self._upload, MultipartUpload={"Parts": parts})
        self._job.undo.gone(UPLOAD, name)
