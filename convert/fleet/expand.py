"""From a plan's entries to rows: patterns become files and objects, templates become names.

Local patterns are those of the shell (`*`, `?`, `[...]`, `**` for folders); in S3 they match keys, and a source that
ends in `/` means every object below it. In a target, `{stem}`, `{name}`, `{suffix}`, `{dir}` (the folders that the
pattern matched, with their `/`), `{n}` (the row's number in its entry) stand for what was found; `{{` is a brace.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.formats.docker_registry.reference import is_reference
from diskmorph.formats.errors import DiskmorphError, OptionError, SourceError
from diskmorph.formats.remote import is_url

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from diskmorph.convert.fleet.plan_file import Entry, PlanFile

_MAGIC = re.compile(r"[*?[]")
_FIELD = re.compile(r"\{\{|\}\}|\{([a-z]*)\}|[{}]")
_PREFIXES = ("oci:", "oci-archive:", "docker-archive:")


@dataclass(frozen=True, slots=True)
class Draft:
    """A row before its options are understood; `error`: why it cannot be done, known without looking at anything."""

    verb: str
    source: str
    target: str | None
    words: tuple[str, ...]
    place: str = ""
    error: DiskmorphError | None = None


def expand(plan: PlanFile) -> list[Draft]:
    """Return the rows of a plan, in its order; what cannot be expanded is a row with an `error`.

    Raises UnsupportedError where S3 is named and boto3 is missing.
    """
    rows: list[Draft] = []
    for entry in plan.entries:
        rows.extend(_expanded(entry, plan.folder))
    return _without_doubles(rows)


def _expanded(entry: Entry, folder: Path) -> Iterator[Draft]:
    def draft(source: str, target: str | None, error: DiskmorphError | None = None) -> Draft:
        return Draft(entry.verb, source, target, entry.words, entry.place, error)

    source = absolute(entry.source, folder)
    try:
        found = sorted(_found(source)) if is_pattern(entry.source) else [(source, "")]
    except DiskmorphError as error:
        yield draft(source, entry.target, error)
        return
    found = [one for one in found if not _excluded(one[0], entry.exclude)]
    if not found:
        yield draft(source, entry.target, SourceError("nothing matches", file=entry.source))
    for number, (name, below) in enumerate(found, 1):
        try:
            target = None if entry.target is None else absolute(filled(entry.target, name, below, number), folder)
            yield draft(name, target)
        except OptionError as error:
            yield draft(name, entry.target, error)


def is_pattern(source: str) -> bool:
    """Return whether a source stands for several: a shell pattern, or a prefix in S3."""
    if source.startswith("s3://"):
        return source.endswith("/") or _MAGIC.search(source) is not None
    if is_url(source) or is_reference(source) or source.startswith(_PREFIXES):
        return False
    return _MAGIC.search(source) is not None and not os.path.lexists(source)


def absolute(name: str, folder: Path) -> str:
    """Return a name that means the same in every process: relative paths start at `folder`; URLs stay."""
    if is_url(name) or is_reference(name):
        return name
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    path = name[len(prefix) :]
    whole = os.path.normpath(folder / path)
    return prefix + whole + ("/" if path.endswith("/") and whole != "/" else "")


def _excluded(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(posixpath.basename(name), pattern) for pattern in patterns)


def _found(source: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each match and the folders between the pattern's fixed part and it."""
    if source.startswith("s3://"):
        yield from _objects(source)
        return
    fixed = _fixed(source)
    for name in glob.iglob(source, recursive=True):  # noqa: PTH207 - the pattern is whole, with its root
        yield name, _between(fixed, name)


def _fixed(pattern: str) -> str:
    """Return the leading folders of a pattern that hold no wildcard, with the last `/`."""
    match = _MAGIC.search(pattern)
    return pattern if match is None else pattern[: pattern.rfind("/", 0, match.start()) + 1]


def _between(fixed: str, name: str) -> str:
    inner = name[len(fixed) :]
    return inner[: inner.rfind("/") + 1]


def _objects(source: str) -> Iterator[tuple[str, str]]:
    from diskmorph.formats.remote.s3 import client  # noqa: PLC0415 - an extra, and heavy

    bucket, _, pattern = source.removeprefix("s3://").partition("/")
    if not bucket or _MAGIC.search(bucket):
        raise OptionError(f"{source} does not name a bucket")
    match = _MAGIC.search(pattern)
    prefix = pattern if match is None else pattern[: match.start()]
    fits = re.compile(_expression(pattern)) if match is not None else None
    fixed = f"s3://{bucket}/{_fixed(pattern)}"
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    try:
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                key = item["Key"]
                if not key.endswith("/") and (fits is None or fits.fullmatch(key)):
                    name = f"s3://{bucket}/{key}"
                    yield name, _between(fixed, name)
    except (ClientError, BotoCoreError) as error:
        raise SourceError(f"s3:list_objects_v2 is refused: {error}", file=source) from error


def _expression(pattern: str) -> str:
    """Return the regular expression of a pattern whose `*` stays within a folder and whose `**` does not."""
    parts = re.split(r"(\*\*/?|\*|\?|\[[^]]+\])", pattern)
    said = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        said.get(part) or ("[" + part[1:-1].replace("!", "^", 1) + "]" if part.startswith("[") else re.escape(part))
        for part in parts
    )


def filled(template: str, source: str, below: str = "", number: int = 1) -> str:
    """Return a target's template with what is known of its source. Raises OptionError for an unknown field."""
    name = posixpath.basename(source.rstrip("/"))
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    name = name.partition("?")[0] if source.startswith(("http://", "https://")) else name
    stem, suffix = posixpath.splitext(name)
    values = {"name": name, "stem": stem, "suffix": suffix, "dir": below, "n": str(number)}

    def value(match: re.Match[str]) -> str:
        word = match[0]
        if word in {"{{", "}}"}:
            return word[0]
        if match[1] not in values:
            raise OptionError(
                f"the target {template!r} has {word}, which is not known",
                hint="{stem}, {name}, {suffix}, {dir}, {n}; {{ is a brace",
            )
        return values[match[1]]

    return _FIELD.sub(value, template)


def _without_doubles(rows: list[Draft]) -> list[Draft]:
    """Give all but the first row of one target an error."""
    seen: dict[str, Draft] = {}
    checked = []
    for row in rows:
        first = row
        if row.target is not None and row.error is None:
            first = seen.setdefault(row.target.rstrip("/"), row)
        if first is not row:
            error = OptionError(f"another row has the target {row.target}: that of {first.source}", file=row.source)
            row = Draft(row.verb, row.source, row.target, row.words, row.place, error)  # noqa: PLW2901
        checked.append(row)
    return checked
