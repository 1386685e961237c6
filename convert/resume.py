"""`--resume`: a conversion that was interrupted goes on where it stopped, and comes to the same bytes.

Beside the target NAME lie, while it is written, `.NAME.resume` (the journal, JSON lines) and `.MEMBER.resume.part` for
each of its files. The journal's first line says from what and how it is made: the source's identity, the options, and
the seed of every UUID. Each line after it tells of one window of the disk: its range and the runs that the writer was
asked to place. At a checkpoint the files are synced first, then the lines of all windows that are written are appended
and synced: what the journal tells of is on stable storage, in the order of the disk, without gaps.

Resuming asks a fresh allocator to place the same runs again, which moves no data, cuts off what was written beyond, and
goes on. The journal is removed when the target has its name; one whose unfinished files are gone begins anew.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph._version import __version__
from diskmorph.convert.options import Moved
from diskmorph.formats.allocator import RUN, Identity
from diskmorph.formats.errors import OptionError, PolicyError, TargetError
from diskmorph.formats.syncing import sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from diskmorph.convert.opening import Opened
    from diskmorph.convert.options import ConvertOptions
    from diskmorph.formats.source import ByteSource

_VERSION = 1
_HEAD = 1 << 20
_SECONDS = 3.0
_BYTES = 512 << 20
"""A checkpoint is made when so much time has passed, or so much of the disk was dealt with."""
_COUNTS = ("cloned", "copied", "encoded", "passed", "skipped")


@dataclass(frozen=True, slots=True)
class Record:
    """One window that is done: its range, what it moved, the RUN rows that were placed; `end` of its line."""

    start: int
    stop: int
    moved: tuple[int, ...]
    runs: NDArray[np.void]
    end: int


def require_resumable(source: object, target: str, options: ConvertOptions) -> None:
    """Raise OptionError for what cannot be resumed."""
    if source == "-" or target == "-":
        raise OptionError("--resume needs files: what went through a pipe is gone")
    if "encrypt.format" in options.format_options:
        raise OptionError("--resume would have to keep the key of an encrypted target in its journal")
    if options.device:
        raise OptionError("--resume writes beside the target's name; a device has none beside it")


def facts_of(source: Opened, base: Opened | None, format: str, size: int, options: ConvertOptions) -> dict[str, Any]:
    """Return what must be the same for a conversion to be gone on with."""
    words: dict[str, Any] = {
        "diskmorph": __version__,
        "format": format,
        "virtual size": size,
        "-o": dict(sorted(options.format_options.items())),
        "compress": options.compress,
        "-S": options.zero_unit,
        "snapshot": options.snapshot,
        "disk": options.disk,
        "--for": options.profile,
        "--reproducible": options.reproducible,
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH") if options.reproducible else None,
        "--rate": options.rate is not None,
        "source": _identities(source),
        "base": None if base is None else _identities(base),
    }
    return words


def _identities(opened: Opened) -> list[dict[str, Any]]:
    found = [_identity(source) for source in opened.disk.files]
    try:
        status = Path(opened.name).stat()
    except OSError:
        return found  # a URL, or a disk that is no file
    return [{"file": opened.name, "size": status.st_size, "mtime": status.st_mtime_ns}, *found]


def _identity(source: ByteSource) -> dict[str, Any]:
    head = hashlib.sha256(source.read_upto(0, _HEAD)).hexdigest()
    return {"file": source.name, "size": source.size, "version": source.version, "head": head}


class Journal:
    """The journal of one conversion to `target`, locked while it is open.

    Raises PolicyError (it is another user's), TargetError (it tells of another conversion, or cannot be kept).
    """

    suffix = "resume"

    def __init__(self, target: Path, facts: Mapping[str, Any]) -> None:
        self.path = target.with_name(f".{target.name[:200]}.{self.suffix}")
        self._lock = threading.Lock()
        self._saving = threading.Lock()
        self._waiting: deque[tuple[int, int, NDArray[np.void]]] = deque()
        self._results: dict[int, Moved] = {}
        self._first = 0  # the number of the oldest window that waits
        self._seen = self._bytes = 0
        self._when = time.monotonic()
        self._files: Sequence[int] = ()
        self._finished = False
        self.moved = Moved()
        self.resumed = 0
        self._fd = self._open()
        try:
            self.begun, self._good, self.records_kept = self._load(json.loads(json.dumps(facts)))
        except BaseException:
            os.close(self._fd)
            raise

    # --- the file

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            while True:
                fd = os.open(self.path, flags, 0o600)
                try:
                    if self._locked(fd):
                        return fd
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)
        except BlockingIOError as error:
            raise TargetError("is being written by another process", file=str(self.path)) from error
        except OSError as error:
            raise self._failed(error) from error

    def _locked(self, fd: int) -> bool:
        """Lock the journal; False where a run that ended just now removed it. Raises OSError, PolicyError."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PolicyError("is not a file of yours: what it tells is not trusted", file=str(self.path))
        return status.st_nlink > 0

    def _failed(self, error: OSError, doing: str = "kept") -> TargetError:
        return TargetError(f"cannot be {doing}: {os.strerror(error.errno or 0)}", file=str(self.path))

    def _load(self, facts: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
        """Return the first line, the bytes of whole lines, how many windows they tell of; begin anew if it is cut."""
        with open(self._fd, "rb", closefd=False) as file:
            begun = _first(file.readline())
            if begun is None:
                return self._begin(facts), os.lseek(self._fd, 0, os.SEEK_CUR), 0
            self._require_same(begun["facts"], facts)
            good, count = file.tell(), 0
            for line in file:
                if _record(line, 0) is None:
                    break
                good, count = good + len(line), count + 1
        return begun, good, count

    def _begin(self, facts: dict[str, Any]) -> dict[str, Any]:
        begun = {"version": _VERSION, "seed": secrets.token_hex(32), "time": time.time(), "facts": facts}
        try:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._write((json.dumps(begun) + "\n").encode())
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error
        return begun

    def _require_same(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        differing = [name for name in now if then.get(name) != now[name]]
        if differing:
            raise TargetError(
                f"tells of a conversion that was made otherwise, and cannot be gone on with: {', '.join(differing)}",
                file=str(self.path),
                hint="say what was said then, or remove it to begin anew",
            )

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed(error, "written") from error

    # --- what is known from before

    @property
    def fresh(self) -> bool:
        """Return whether nothing was done before that could be gone on with."""
        return not self.records_kept

    def forget(self) -> None:
        """Begin anew: what was done before is gone."""
        self.records_kept = 0

    def identity(self) -> Identity:
        """Return where UUIDs and times come from: the same at every try."""
        return Identity(bytes.fromhex(self.begun["seed"]), now=float(self.begun["time"]))

    def records(self) -> Iterator[Record]:
        """Yield what was done before, in the order of the disk."""
        at = os.lseek(self._fd, 0, os.SEEK_SET)
        with open(self._fd, "rb", closefd=False) as file:
            at += len(file.readline())
            for line in file:
                at += len(line)
                if at > self._good:
                    return
                record = _record(line, at)
                assert record is not None  # noqa: S101 - `_load` saw it
                yield record

    def take(self, record: Record) -> None:
        """Count a window that need not be done again."""
        for name, value in zip(_COUNTS, record.moved, strict=True):
            setattr(self.moved, name, getattr(self.moved, name) + value)
        self.resumed = record.stop

    def go_on(self, after: Record | None, files: Sequence[int]) -> None:
        """Forget what was told after `after` (None: everything); `files` are the descriptors that are synced."""
        end = after.end if after is not None else len(json.dumps(self.begun)) + 1
        try:
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
        except OSError as error:
            raise self._failed(error, "cut") from error
        self._files = files

    # --- what is done now

    def settled(self, start: int, stop: int, runs: NDArray[np.void]) -> int:
        """Note a window that has its places; called in the order of the disk. Return its number."""
        with self._lock:
            self._waiting.append((start, stop, runs))
            self._seen += 1
            return self._seen - 1

    def written(self, number: int, moved: Moved) -> None:
        """Note that a window's bytes were written; make a checkpoint when it is time. Raises TargetError."""
        with self._lock:
            self._results[number] = moved
            self._bytes += moved.total()
            due = self._bytes >= _BYTES or time.monotonic() - self._when >= _SECONDS
            if due:
                self._bytes, self._when = 0, time.monotonic()
        if due:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Make what is written so far durable, and tell so; others go on meanwhile. Raises TargetError."""
        with self._saving:
            lines = self._complete()
            if not lines:
                return
            try:
                for fd in self._files:
                    os.fdatasync(fd)
            except OSError as error:
                raise self._failed(error, "synced") from error
            self._write(b"".join(lines))
            self.records_kept += len(lines)

    def _complete(self) -> list[bytes]:
        """Take the oldest windows, up to the first that is not written."""
        lines = []
        with self._lock:
            while self._first in self._results:
                start, stop, runs = self._waiting.popleft()
                lines.append(_line(start, stop, runs, self._results.pop(self._first)))
                self._first += 1
        return lines

    # --- the end

    def kept(self) -> bool:
        """Return whether the target's parts shall stay: something is done, and not all."""
        return self.records_kept > 0 and not self._finished

    def published(self) -> None:
        """Remove the journal: the target is complete and has its name. Raises TargetError."""
        self._finished = True
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(error, "removed, though the target is complete") from error

    def close(self) -> None:
        """Let another process go on; a journal that tells of nothing is removed."""
        if self._fd < 0:
            return
        if not self.kept() and not self._finished:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1


def _line(start: int, stop: int, runs: NDArray[np.void], moved: Moved) -> bytes:
    row = {
        "start": start,
        "stop": stop,
        "moved": [getattr(moved, name) for name in _COUNTS],
        "runs": base64.b64encode(zlib.compress(np.ascontiguousarray(runs).tobytes(), 1)).decode(),
    }
    return (json.dumps(row) + "\n").encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, None if it was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _first(line: bytes) -> dict[str, Any] | None:
    """Return what a journal's first line says, None if it is damaged or another version's."""
    row = _parsed(line)
    if row is None or row.get("version") != _VERSION or not isinstance(row.get("facts"), dict):
        return None
    try:
        bytes.fromhex(row["seed"]), float(row["time"])
    except (KeyError, TypeError, ValueError):
        return None
    return row


def _record(line: bytes, end: int) -> Record | None:
    """Return the window that a line tells of, which ends at `end` in the journal; None if it is damaged."""
    row = _parsed(line)
    if row is None:
        return None
    try:
        runs = np.frombuffer(zlib.decompress(base64.b64decode(row["runs"])), RUN).copy()
        moved = tuple(map(int, row["moved"]))
        record = Record(int(row["start"]), int(row["stop"]), moved, runs, end)
    except (KeyError, TypeError, ValueError, zlib.error):  # binascii.Error is a ValueError
        return None
    return record if len(moved) == len(_COUNTS) else None
