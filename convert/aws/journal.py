"""What a job has done so far, kept so that the same command said again goes on: JSON lines, only ever appended.

A line that was cut off by a crash, and what follows it, is forgotten: it costs the blocks that it tells of. The file
is locked while a job runs. Maps of finished snapshots (index and SHA-256 of each block) are kept beside, for uploads
that build on them.
"""

from __future__ import annotations

import array
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from diskmorph.convert.aws.blocks import HASH
from diskmorph.formats.errors import TargetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1
_KEPT_MAPS = 64
_SYNC_SECONDS = 5.0
_KEPT_SECONDS = 14 * 86400.0


def state_folder() -> Path:
    """Return the folder of journals, $XDG_STATE_HOME/diskmorph/aws; it need not exist."""
    home = os.environ.get("XDG_STATE_HOME") or ""
    base = Path(home) if home.startswith("/") else Path.home() / ".local" / "state"
    return base / "diskmorph" / "aws"


def new_job() -> str:
    """Return a name for a job: its day, and chance."""
    return f"{time.strftime('%Y%m%d', time.gmtime())}-{secrets.token_hex(8)}"


class Journal:
    """The journal of one command. `job` is its name; `facts` what was noted beside blocks, later notes over earlier.

    `name` is what the job is called, and what its names begin with when it must begin anew; None: the day and chance.
    """

    def __init__(self, key: Any, name: str | None = None) -> None:
        self._name = name
        text = json.dumps(key, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self._lock = threading.Lock()
        self._indexes = array.array("I")
        self._digests = bytearray()
        self.facts: dict[str, Any] = {}
        self._synced = time.monotonic()
        self._fd, self.path = self._open()
        self._load()
        if "job" not in self.facts:
            self.note(version=VERSION, job=name or new_job(), key=key, started=time.time())

    def _open(self) -> tuple[int, Path]:
        folder = state_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _forget_old(folder)
            for name in (f"{self.key}.jsonl", f"{self.key}-{secrets.token_hex(4)}.jsonl"):
                fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return fd, folder / name
                os.close(fd)  # the same command runs already: this one starts afresh
        except OSError as error:
            raise TargetError(
                f"the journal cannot be kept: {error.strerror}", file=str(folder), hint="set XDG_STATE_HOME"
            ) from error
        raise TargetError("the journal is locked", file=str(folder))

    def _load(self) -> None:
        good = 0
        os.lseek(self._fd, 0, os.SEEK_SET)
        with open(self._fd, "rb", closefd=False) as file:
            for line in file:
                if not line.endswith(b"\n") or not self._take(line):
                    break
                good += len(line)
        os.ftruncate(self._fd, good)

    def _take(self, line: bytes) -> bool:
        try:
            row = json.loads(line)
            if "block" in row:
                digest = base64.b64decode(row["sha256"], validate=True)
                if len(digest) != 32:
                    return False
                self._indexes.append(row["block"])
                self._digests += digest
            else:
                self.facts.update(row)
        except (ValueError, KeyError, TypeError, OverflowError):
            return False
        return True

    @property
    def job(self) -> str:
        """The job's name."""
        return str(self.facts["job"])

    def note(self, **facts: Any) -> None:
        """Append facts, and bring them to the disk."""
        self.facts.update(facts)
        self._append(json.dumps(facts))
        with contextlib.suppress(OSError):
            os.fdatasync(self._fd)

    def block(self, index: int, digest: bytes) -> None:
        """Append a block that is in the snapshot. Thread-safe."""
        self._append(f'{{"block": {index}, "sha256": "{base64.b64encode(digest).decode()}"}}')
        at = time.monotonic()
        if at - self._synced > _SYNC_SECONDS:
            self._synced = at
            with contextlib.suppress(OSError):
                os.fdatasync(self._fd)

    def _append(self, line: str) -> None:
        data = line.encode() + b"\n"
        with self._lock:
            try:
                if os.write(self._fd, data) != len(data):
                    raise TargetError("the journal cannot be written: no room", file=str(self.path))
            except OSError as error:
                raise TargetError(f"the journal cannot be written: {error.strerror}", file=str(self.path)) from error

    def blocks(self) -> NDArray[np.void]:
        """Return HASH rows of the blocks that earlier runs brought into the snapshot, by ascending index."""
        return _sorted(np.frombuffer(self._indexes, np.uint32), np.frombuffer(self._digests, np.uint8).reshape(-1, 32))

    def all_blocks(self) -> NDArray[np.void]:
        """Return HASH rows of all blocks, this run's too."""
        self._indexes, self._digests = array.array("I"), bytearray()
        self._load()
        return self.blocks()

    def restart(self) -> None:
        """Forget everything and begin a new job."""
        self._indexes, self._digests = array.array("I"), bytearray()
        key = self.facts.get("key")
        self.facts = {}
        os.ftruncate(self._fd, 0)
        job = f"{self._name}-{secrets.token_hex(4)}" if self._name else new_job()
        self.note(version=VERSION, job=job, key=key, started=time.time())

    def close(self, *, remove: bool = False) -> None:
        """Close the journal; `remove`: the job is over, one way or the other."""
        if self._fd < 0:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _forget_old(folder: Path) -> None:
    """Remove journals that nothing was added to for long: their snapshots wait no longer."""
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()


def _sorted(indexes: NDArray[np.uint32], digests: NDArray[np.uint8]) -> NDArray[np.void]:
    """Return HASH rows by ascending index, the last one where an index came twice."""
    last, order = np.unique(indexes[::-1], return_index=True)
    rows = np.zeros(len(last), HASH)
    rows["index"] = last
    rows["sha256"] = digests[::-1][order]
    return rows


# --- maps of finished snapshots


def save_map(region: str, snapshot: str, rows: NDArray[np.void]) -> None:
    """Keep the map of a snapshot: all its blocks, those of its parents too."""
    folder = state_folder() / "maps"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        building = folder / f".{region}.{snapshot}.{secrets.token_hex(4)}"
        with building.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
        building.rename(folder / f"{region}.{snapshot}.npy")
        for old in sorted(folder.glob("*.npy"), key=lambda path: path.stat().st_mtime)[:-_KEPT_MAPS]:
            old.unlink(missing_ok=True)


def load_map(region: str, snapshot: str) -> NDArray[np.void] | None:
    """Return the map of a snapshot, None where none is kept."""
    try:
        rows: NDArray[np.void] = np.load(state_folder() / "maps" / f"{region}.{snapshot}.npy", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return rows if rows.dtype == HASH and rows.ndim == 1 else None


def merged(below: NDArray[np.void], own: NDArray[np.void]) -> NDArray[np.void]:
    """Return the map of a snapshot from its parent's and its own blocks."""
    return _sorted(np.concatenate([below["index"], own["index"]]), np.concatenate([below["sha256"], own["sha256"]]))
