"""s3://BUCKET/KEY through boto3 (the extra diskmorph[aws]), by range requests bound to one version of the object."""

from __future__ import annotations

from typing import Any

from diskmorph.formats.errors import IntegrityError, OptionError, SourceError, UnsupportedError
from diskmorph.formats.remote.blocks import BlockSource

_ATTEMPTS = 6


def split(url: str) -> tuple[str, str]:
    """Return (bucket, key) of s3://BUCKET/KEY. Raises OptionError."""
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket or not key:
        raise OptionError(f"{url} is not s3://BUCKET/KEY")
    return bucket, key


def client() -> Any:
    """Return an S3 client with the user's own credentials and region. Raises UnsupportedError without boto3."""
    try:
        import boto3  # noqa: PLC0415 - an extra, and heavy
        from botocore.config import Config  # noqa: PLC0415
    except ImportError as error:
        raise UnsupportedError(
            "s3:// needs boto3", feature="s3", hint="install it with pip install 'diskmorph[aws]'"
        ) from error
    return boto3.client(
        "s3", config=Config(max_pool_connections=16, retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"})
    )


class S3Source(BlockSource):
    """An object in S3. Every request names the ETag of the first, so a changed object is an error, not a mixture."""

    def __init__(self, url: str) -> None:
        self._bucket, self._key = split(url)
        self.name = url
        self._s3 = client()
        head = self._call("head_object")
        self._etag = head["ETag"]
        super().__init__(url, int(head["ContentLength"]))

    def _call(self, action: str, **words: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        try:
            return getattr(self._s3, action)(Bucket=self._bucket, Key=self._key, **words)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in {"PreconditionFailed", "412"}:
                raise IntegrityError("changed in S3 while it was read", file=self.name) from error
            raise SourceError(f"s3:{action} is refused: {error}", file=self.name) from error
        except BotoCoreError as error:
            raise SourceError(f"s3:{action} fails: {error}", file=self.name) from error

    def fetch(self, offset: int, length: int) -> bytes:
        """See BlockSource; an answer that breaks off, which boto3 does not ask for again, is asked for again."""
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - is an extra

        span = f"bytes={offset}-{offset + length - 1}"
        problem: BotoCoreError | None = None
        found = 0
        for _ in range(_ATTEMPTS):
            try:
                data: bytes = self._call("get_object", Range=span, IfMatch=self._etag)["Body"].read()
            except BotoCoreError as error:
                problem = error
                continue
            found = len(data)
            if found == length:
                return data
        raise SourceError(
            "S3 breaks off its answers", file=self.name, offset=offset, expected=f"{length} bytes", found=found
        ) from problem

    @property
    def version(self) -> str | None:
        """See ByteSource."""
        return str(self._etag)

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self._call("head_object", IfMatch=self._etag)
