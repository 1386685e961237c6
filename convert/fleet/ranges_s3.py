"""Ranges of a raw object in S3: each range some parts of one multipart upload, which is completed when all are there.

A worker that dies leaves parts that nobody sees; they are sent again under the same numbers. An upload that is never
completed (the client died, and the run is not said again) is for the bucket's rule AbortIncompleteMultipartUpload.
"""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import TargetError
from diskmorph.formats.output import Target

if TYPE_CHECKING:
    from collections.abc import Sequence


def step_of(size: int, part: int) -> int:
    """Return the bytes of a range of about `part` bytes that is whole parts of an object of `size` bytes."""
    from diskmorph.formats.remote.s3_target import part_size  # noqa: PLC0415 - what is used is loaded

    least = part_size(size)
    return max(1, part // least) * least


def begin(url: str, *, force: bool) -> str:
    """Begin an upload that carries the mark of the job that writes, and return its name. Raises TargetError."""
    from diskmorph.formats.remote import s3_target  # noqa: PLC0415 - loads when used
    from diskmorph.formats.remote.s3 import client  # noqa: PLC0415 - an extra

    return s3_target.begin(client(), url, replace=force)


class PartsTarget(Target):
    """The parts of an upload of `size` bytes that begin at the byte `start`. `sent`: what completing asks for."""

    def __init__(self, url: str, upload: str, size: int, start: int) -> None:
        from diskmorph.formats.remote.s3 import client  # noqa: PLC0415 - an extra
        from diskmorph.formats.remote.s3_target import Parts, StreamedMember, part_size  # noqa: PLC0415 - loads when used

        part = part_size(size)
        self._parts = Parts(client(), url, upload, part, start // part + 1)
        self._member = StreamedMember(self._parts)
        self.members = (self._member,)
        self.sent: list[dict[str, Any]] = []

    def commit(self, sizes: Sequence[int]) -> None:
        """Send what is left and wait for it; the object does not appear by that."""
        self._member.advance(sizes[0])
        self.sent = self._parts.finish()

    def close(self) -> None:
        """See Target."""
        self._parts.close()


def finish(url: str, upload: str, proofs: Sequence[list[dict[str, Any]]], *, force: bool) -> None:
    """Let the object appear. Raises TargetError."""
    from diskmorph.formats.remote import s3_target  # noqa: PLC0415 - loads when used
    from diskmorph.formats.remote.s3 import client  # noqa: PLC0415 - an extra

    s3_target.complete(client(), url, upload, list(chain.from_iterable(proofs)), replace=force)


def abandon(url: str, upload: str) -> None:
    """Remove the parts of a row that failed."""
    from diskmorph.formats.remote.s3 import client  # noqa: PLC0415 - an extra
    from diskmorph.formats.remote.s3_target import call  # noqa: PLC0415 - loads when used

    with contextlib.suppress(TargetError):
        call(client(), url, "abort_multipart_upload", UploadId=upload)
