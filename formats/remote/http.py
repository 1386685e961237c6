"""http:// and https:// by range requests: only what is asked for is fetched; the content may not change meanwhile."""

from __future__ import annotations

import re
from typing import Any

from diskmorph.formats.errors import IntegrityError, SourceError
from diskmorph.formats.numbers import whole_number
from diskmorph.formats.pools import Pools, reason
from diskmorph.formats.remote.blocks import BlockSource

_ATTEMPTS = 6
_TIMEOUT = 30.0
_PROGRESS = 4096  # bytes that an answer brings at the least, if it breaks off, not to count as a failure


class HttpSource(BlockSource):
    """A file on a web server that answers range requests.

    Size and ETag (or Last-Modified) are those of the first answer and are checked on every other. Lost connections,
    timeouts and answers 429 and 5xx are tried again with growing pauses. Raises SourceError, IntegrityError.
    """

    def __init__(self, url: str) -> None:
        import urllib3  # noqa: PLC0415 - heavy, and only for URLs

        retries = urllib3.Retry(
            total=_ATTEMPTS,
            connect=2,  # a server that refuses to talk is told soon
            other=1,  # so is a proxy
            backoff_factor=0.2,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=("GET", "HEAD"),
            raise_on_status=False,
            respect_retry_after_header=True,
        )
        timeout = urllib3.Timeout(connect=_TIMEOUT, read=_TIMEOUT)
        self._http = Pools(maxsize=8, retries=retries, timeout=timeout)
        # ValueError: urllib3 takes any digits of Retry-After for a number, and int() does not take thousands.
        self._broken: tuple[type[Exception], ...] = (urllib3.exceptions.HTTPError, ValueError)
        self._url = url
        self.name = url
        answer, _ = self._get(0, 1)
        if _is_of_nothing(answer):
            total = "0"
        elif answer.status != 206:
            raise self._unfit(answer)
        else:
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        size = whole_number(total, (1 << 63) - 1)
        if size is None:
            raise SourceError("the server does not say how large the file is", file=url, found=total[:40])
        self._mark = self._mark_of(answer)
        super().__init__(url, size)

    def _unfit(self, answer: Any) -> SourceError:
        if answer.status == 200:
            return SourceError(
                "the server does not answer range requests",
                file=self._url,
                hint="download the file and convert it then",
            )
        return SourceError(f"the server answers {answer.status} {answer.reason or ''}".rstrip(), file=self._url)

    @staticmethod
    def _mark_of(answer: Any) -> tuple[str | None, str | None]:
        return answer.headers.get("ETag"), answer.headers.get("Last-Modified")

    def _get(self, offset: int, length: int) -> tuple[Any, bytes]:
        """Return the answer and its body."""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        try:
            answer = self._http.request("GET", self._url, headers=headers, preload_content=False)
            if answer.status != 206:
                answer.close()
                return answer, b""
            body = answer.read(length + 1, decode_content=False)
            answer.release_conn()
        except self._broken as error:
            raise SourceError(f"cannot be fetched: {reason(error)}", file=self._url, offset=offset) from error
        return answer, bytes(body)

    def fetch(self, offset: int, length: int) -> bytes:
        """See BlockSource; an answer that breaks off is asked for again from where it broke."""
        data = b""
        failures = 0
        while failures < _ATTEMPTS:
            at = offset + len(data)
            found = self._get_again(at, length - len(data))
            if found is None:
                failures += 1
                continue
            self._require_same(found[0], at)
            data += found[1]
            if len(data) >= length:
                return data[:length]
            failures += len(found[1]) < _PROGRESS
        raise SourceError(
            "the server breaks off its answers",
            file=self._url,
            offset=offset + len(data),
            expected=f"{length} bytes",
            found=len(data),
        )

    def _get_again(self, offset: int, length: int) -> tuple[Any, bytes] | None:
        """Return an answer, None where the connection was lost while it came."""
        try:
            return self._get(offset, length)
        except SourceError as error:
            import urllib3  # noqa: PLC0415

            if isinstance(error.__cause__, urllib3.exceptions.ProtocolError):
                return None
            raise

    def _require_same(self, answer: Any, offset: int) -> None:
        if answer.status != 206:
            raise self._unfit(answer)
        span = answer.headers.get("Content-Range", "")
        if span.rpartition("/")[2] != str(self.size) or self._mark_of(answer) != self._mark:
            raise IntegrityError("changed on the server while it was read", file=self._url, offset=offset)
        if not re.match(rf"bytes\s+0*{offset}\s*-", span, re.IGNORECASE):
            raise SourceError(
                "the server answers with another range than it was asked for",
                file=self._url,
                offset=offset,
                found=span[:60],
                hint="download the file and convert it then",
            )

    @property
    def version(self) -> str | None:
        """See ByteSource."""
        return self._mark[0] or self._mark[1]

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        if self.size:
            self._require_same(self._get(0, 1)[0], 0)

    def close(self) -> None:
        """See ByteSource."""
        super().close()
        self._http.clear()


def _is_of_nothing(answer: Any) -> bool:
    """Return whether the file is empty: it has no first byte, as servers say by 200 or 416 (RFC 9110, 15.5.17)."""
    if answer.status == 200:
        return bool(answer.headers.get("Content-Length") == "0")
    span = str(answer.headers.get("Content-Range", ""))
    return bool(answer.status == 416 and span.replace(" ", "") == "bytes*/0")
