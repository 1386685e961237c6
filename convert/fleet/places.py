"""Targets as a fleet sees them: whether one is there, and whether it is the work of this very row."""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diskmorph.formats import marks
from diskmorph.formats.errors import TargetError

ABSENT, OURS, OTHER = "absent", "ours", "other"
_TAGGED = ("oci-archive:", "docker-archive:", "oci:")


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether a target is there and ours; `run` made it, and `report` is what is known of it."""

    state: str
    run: str | None = None
    report: dict[str, Any] | None = None


def mark(token: str, run: str, report: dict[str, Any] | None = None) -> str:
    """Return the mark of a target: which work, of which run, and what is to be told of it again."""
    said: dict[str, Any] = {"token": token, "run": run}
    if report is not None:
        said["report"] = report
    return json.dumps(said)


def standing(target: str, token: str) -> Standing:
    """Return how a target stands. Raises TargetError where that cannot be found out."""
    if target.startswith("s3://"):
        return _judged(_object_mark(target), token)
    path = path_of(target)
    if not os.path.lexists(path):
        return Standing(ABSENT)
    found = marks.mark_of(path)
    if found is None and path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return Standing(ABSENT)
    return _judged(found or "", token)


def path_of(target: str) -> Path:
    """Return the file or folder that a local target names, without `oci:` and the like and without a tag."""
    for prefix in _TAGGED:
        if target.startswith(prefix):
            return Path(target.removeprefix(prefix).partition(":")[0])
    return Path(target)


def keep_report(target: str, token: str, run: str, report: dict[str, Any]) -> None:
    """Let a local target carry what was told of it, as far as there is room: another run can tell it again."""
    if target.startswith("s3://"):
        return
    try:
        marks.change(path_of(target), mark(token, run, report))
    except (OSError, ValueError):
        return


def remove_remains(target: str, token: str) -> bool:
    """Remove files beside an absent target that an earlier try of this row named: its other members.

    The describing file is named last, so nothing refers to them. Return whether there were any. It reads the whole
    folder, so it is for rows that found something in their way.
    """
    path = path_of(target)
    if target.startswith("s3://") or os.path.lexists(path):
        return False
    removed = False
    for other in path.parent.glob(f"{glob.escape(path.stem[:100])}*"):
        if other.is_file() and _judged(marks.mark_of(other) or "", token).state == OURS:
            other.unlink(missing_ok=True)
            removed = True
    return removed


def _judged(found: str | None, token: str) -> Standing:
    if found is None:
        return Standing(ABSENT)
    try:
        said = json.loads(found)
        if said["token"] == token:
            report = said.get("report")
            return Standing(OURS, str(said["run"]), report if isinstance(report, dict) else None)
    except (ValueError, KeyError, TypeError):
        pass
    return Standing(OTHER)


def _object_mark(url: str) -> str | None:
    """Return an object's mark, empty if it has none; None if there is no such object."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - an extra, and heavy

    from diskmorph.formats.remote.s3 import client, split  # noqa: PLC0415
    from diskmorph.formats.remote.s3_target import MARK  # noqa: PLC0415

    bucket, key = split(url)
    try:
        head = client().head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if str(error.response.get("Error", {}).get("Code", "")) in {"404", "NoSuchKey", "NotFound"}:
            return None
        raise TargetError(f"s3:head_object is refused: {error}", file=url) from error
    except BotoCoreError as error:
        raise TargetError(f"s3:head_object fails: {error}", file=url) from error
    return str(head.get("Metadata", {}).get(MARK, ""))
