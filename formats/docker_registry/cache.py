"""Blobs kept from run to run: `$XDG_CACHE_HOME/diskmorph/blobs/ALGORITHM/HEX`, each named by its digest.

A file appears only when it is whole and its digest right; it is read again under its name only after its digest was
verified again. `DISKMORPH_CACHE` bounds the folder (10G by default), `DISKMORPH_CACHE=off` does without. What does not
fit, or cannot be written there, goes to a file without a name in `$TMPDIR`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.formats.allocator import parse_size
from diskmorph.formats.errors import SourceError, TargetError
from diskmorph.formats.limits import GIB
from diskmorph.formats.source import ByteSource
from diskmorph.formats.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator

_VARIABLE = "DISKMORPH_CACHE"
_DEFAULT = 10 * GIB
_PART = ".part-"
_FORGOTTEN = 86400.0  # seconds after which a part belongs to no running transfer
_STEP = 1 << 20


class CachedBlob(ByteSource):
    """A file of the cache; while it is open no other process removes it to make room."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        self.size = os.fstat(self._fd).st_size

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        try:
            return os.preadv(self._fd, [buffer], offset)
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}", file=self.name, offset=offset) from error

    def descriptor(self) -> AbstractContextManager[tuple[int, int] | None]:
        """See ByteSource."""
        return nullcontext((self._fd, 0))

    def close(self) -> None:
        """See ByteSource."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class BlobCache:
    """Blobs by digest, at most `most` bytes of them in `folder`; no folder: nothing is kept."""

    def __init__(self, folder: Path | None, most: int = _DEFAULT) -> None:
        self._folder = folder
        self._most = most

    @classmethod
    def of_user(cls) -> BlobCache:
        """Return the user's cache, as the environment says. Raises OptionError for a size that is none."""
        said = os.environ.get(_VARIABLE, "").strip()
        if said.lower() in {"off", "no", "none", "0"}:
            return cls(None)
        most = parse_size(said, _VARIABLE) if said else _DEFAULT
        home = os.environ.get("XDG_CACHE_HOME") or ""
        base = Path(home) if home.startswith("/") else Path.home() / ".cache"
        return cls(base / "diskmorph" / "blobs", most)

    def find(self, digest: str) -> ByteSource | None:
        """Return a blob that is there and sound; remove it if its digest is wrong."""
        if self._folder is None:
            return None
        path = self._path(self._folder, digest)
        try:
            blob = CachedBlob(path)
        except OSError:
            return None
        if _digest_of(blob, digest) != digest:
            blob.close()
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return blob

    def store(self, digest: str, size: int, chunks: Iterator[bytes], name: str) -> ByteSource:
        """Take in a blob of `size` bytes; `chunks` raises at the latest at its end if it is not the right one.

        Raises TargetError where there is no room.
        """
        part = self._new_part(digest, size)
        if part is None:
            return _spooled(size, chunks, name)
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _require_room(fd, size, part)
                _write(fd, chunks)
            finally:
                os.close(fd)
            path = part.parent / digest.partition(":")[2]
            part.rename(path)
            blob = CachedBlob(path)
        except OSError as error:
            raise TargetError(f"cannot be written: {error.strerror}", file=str(part.parent), hint=_HINT) from error
        finally:
            part.unlink(missing_ok=True)
        self._make_room()
        return blob

    def _new_part(self, digest: str, size: int) -> Path | None:
        if self._folder is None or size > self._most:
            return None
        path = self._path(self._folder, digest)
        try:
            self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return None
        if not os.access(path.parent, os.W_OK | os.X_OK):
            return None
        return path.parent / f"{_PART}{secrets.token_hex(8)}"

    @staticmethod
    def _path(folder: Path, digest: str) -> Path:
        kind, _, value = digest.partition(":")
        return folder / kind / value

    def _make_room(self) -> None:
        """Remove what was not used for longest until the folder is within its bound; never what is in use."""
        assert self._folder is not None  # noqa: S101 - something was stored there
        found = []
        for path in self._folder.glob("*/*"):
            with suppress(OSError):
                state = path.lstat()
                if path.name.startswith(_PART):
                    if time.time() - state.st_mtime > _FORGOTTEN:
                        path.unlink()
                    continue
                found.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._most:
                return
            if _removed(path):
                total -= size


_HINT = "give it room, another place by XDG_CACHE_HOME, or do without by DISKMORPH_CACHE=off"


def _removed(path: Path) -> bool:
    """Remove a blob that nobody reads; return whether it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _digest_of(blob: ByteSource, digest: str) -> str:
    kind = digest.partition(":")[0]
    found = hashlib.new(kind)
    for at in range(0, blob.size, _STEP):
        found.update(blob.read(at, min(_STEP, blob.size - at)))
    return f"{kind}:{found.hexdigest()}"


def _require_room(fd: int, size: int, part: Path) -> None:
    room = os.fstatvfs(fd)
    if size > room.f_bavail * room.f_frsize:
        raise TargetError(
            "has no room for a blob",
            file=str(part.parent),
            expected=f"{size} bytes",
            found=room.f_bavail * room.f_frsize,
            hint=_HINT,
        )


def _write(fd: int, chunks: Iterator[bytes]) -> None:
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            view = view[os.write(fd, view) :]


def _spooled(size: int, chunks: Iterator[bytes], name: str) -> ByteSource:
    spool = Spool(name)
    try:
        spool.require_room(size)
        for chunk in chunks:
            spool.append(chunk)
    except BaseException:
        spool.close()
        raise
    return spool
