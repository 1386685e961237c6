"""What became of every row, as JSON lines that outlive whoever dies: only ever appended, each batch by one write.

A line that a crash cut off is dropped when the ledger is opened again. A run begins with a line of its own
(`"run"`, `"plan"`, `"rows"`, `"started"`); every other line is a row's Result, the last one of a row being true.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from typing import TYPE_CHECKING, Any, Self

from diskmorph._version import __version__
from diskmorph.formats.errors import FormatError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from diskmorph.convert.fleet.rows import Result

VERSION = 1


class Ledger:
    """A ledger that is open for one run; locked, so that no two runs keep it. Raises TargetError, FormatError."""

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self.path = path
        self._sync = sync
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._failed(error, "opened") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            good, self.known = _last_of_rows(self._fd, path)
            os.ftruncate(self._fd, good)
        except BlockingIOError as error:
            os.close(self._fd)
            raise TargetError(
                "another run keeps this ledger", file=str(path), hint="wait for it, or name another with --ledger"
            ) from error
        except BaseException:
            os.close(self._fd)
            raise

    def begin(self, run: str, plan: str, rows: int) -> None:
        """Write the line that begins a run."""
        line = {"run": run, "version": VERSION, "diskmorph": __version__, "plan": plan, "rows": rows}
        self._append([{**line, "started": round(time.time(), 3)}])

    def write(self, results: Iterable[Result]) -> None:
        """Append results and bring them to the disk before returning."""
        self._append([result.as_dict() for result in results])

    def end(self, run: str, counts: dict[str, int]) -> None:
        """Write the line that ends a run."""
        self._append([{"run": run, "ended": round(time.time(), 3), **counts}])

    def _append(self, lines: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if not data:
            return
        at = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, data) != len(data):
                os.ftruncate(self._fd, at)
                raise TargetError("the ledger cannot be written: no room", file=str(self.path))
            if self._sync:
                os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed(error, "written") from error

    def _failed(self, error: OSError, doing: str) -> TargetError:
        return TargetError(f"the ledger cannot be {doing}: {error.strerror}", file=str(self.path))

    def close(self) -> None:
        """Close the ledger, and give up its lock."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_ledger(path: Path) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    """Return the last line of every row, by verb, source and target. Raises TargetError, FormatError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TargetError(f"the ledger cannot be read: {error.strerror}", file=str(path)) from error
    try:
        return _last_of_rows(fd, path)[1]
    finally:
        os.close(fd)


def _last_of_rows(fd: int, path: Path) -> tuple[int, dict[tuple[str, str, str | None], dict[str, Any]]]:
    """Return the bytes of whole lines, and each row's last one."""
    known: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    good = 0
    for line, said in _lines(fd, path):
        good += len(line)
        if "row" in said:
            known[said["verb"], said["source"], said["target"]] = said
    return good, known


def _lines(fd: int, path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield whole lines. Raises FormatError for a file that is no ledger, or one that is damaged before its end."""
    at = 0
    with open(os.dup(fd), "rb") as file:  # noqa: PTH123 - it is open already
        file.seek(0)
        for line in file:
            try:
                said = json.loads(line)
                fits = isinstance(said, dict) and ("run" in said or {"row", "verb", "source", "target"} <= said.keys())
            except ValueError:
                fits = False
            if not fits and file.peek(1):
                raise FormatError(
                    "is not a fleet's ledger, or is damaged",
                    file=str(path),
                    offset=at,
                    hint="name another with --ledger; rows that are done are found by their targets",
                )
            if not fits or not line.endswith(b"\n"):
                if at == 0:
                    raise FormatError("is not a fleet's ledger", file=str(path), offset=0)
                return
            at += len(line)
            yield line, said
