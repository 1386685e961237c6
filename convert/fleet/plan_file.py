"""The plan of a fleet: a file of entries, each one conversion or, by a pattern, many.

TOML has `[defaults]` and `[[row]]` tables (or `rows = ["SOURCE -> TARGET", ...]`); CSV a head line; JSON lines an
object (or a string `SOURCE -> TARGET`) a line. Keys: `source`, `target`, `verb`, `options`, `exclude`; every other key
is an option of the verb by its name on the command line (`compress = "zstd"`, `O = "vmdk"`, `digest = true`).
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import OptionError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VERBS = ("convert", "build", "extract", "aws upload")
_MOST_BYTES = 256 << 20
_ARROW = " -> "
_OWN = frozenset({"source", "target", "verb", "options", "exclude"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as the plan says it: `source` may be a pattern, `target` a template; None where nothing is written.

    `words` are the verb's options as on its command line; `exclude` are patterns of names that are left out; `place`
    says where in the plan the entry stands.
    """

    source: str
    target: str | None
    verb: str = "convert"
    words: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    place: str = ""


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan that was read: its name, the folder that relative names start from, its entries."""

    name: str
    folder: Path
    entries: tuple[Entry, ...]


def read_plan(name: str, format: str | None = None) -> PlanFile:
    """Read a plan; `-` is standard input. `format` is toml, csv or jsonl, else the suffix says it, else the content.

    Raises SourceError (it cannot be read), OptionError naming the line or row that is wrong.
    """
    if name == "-":
        data, folder = sys.stdin.buffer.read(_MOST_BYTES + 1), Path.cwd()
    else:
        path = Path(name).absolute()
        folder = path.parent
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise SourceError(f"the plan cannot be read: {error.strerror}", file=name) from error
    if len(data) > _MOST_BYTES:
        raise OptionError("the plan is too large", file=name, expected=f"at most {_MOST_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError("the plan is not UTF-8", file=name, offset=error.start) from error
    entries = parse_plan(text, format or _format_of(name, text), name)
    return PlanFile(name, folder, entries)


def _format_of(name: str, text: str) -> str:
    suffix = Path(name).suffix.lower()
    known = {".toml": "toml", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
    if suffix in known:
        return known[suffix]
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if first.startswith(("{", '"')):
        return "jsonl"
    return "toml" if first.startswith(("[", "#")) or " = " in first else "csv"


def parse_plan(text: str, format: str, name: str = "plan") -> tuple[Entry, ...]:
    """Return the entries of a plan's text. Raises OptionError."""
    readers = {"toml": _toml, "csv": _csv, "jsonl": _jsonl}
    if format not in readers:
        raise OptionError(f"a plan is not read as {format}", hint="toml, csv or jsonl")
    entries = []
    for place, defaults, row in readers[format](text, name):
        try:
            entries.append(_entry(defaults, row, place))
        except OptionError as error:
            error.problem = f"{place}: {error.problem}"
            raise error.located(file=name) from error.__cause__
    return tuple(entries)


def _toml(text: str, name: str) -> Iterator[tuple[str, Mapping[str, Any], object]]:
    try:
        whole = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"the plan is not TOML: {error}", file=name) from error
    defaults = whole.pop("defaults", {})
    if not isinstance(defaults, dict):
        raise OptionError("[defaults] is not a table", file=name)
    for key, rows in whole.items():
        if key not in {"row", "rows"} or not isinstance(rows, list):
            raise OptionError(f"{key!r} is not known", file=name, hint="a plan has [defaults] and [[row]]")
        for number, row in enumerate(rows, 1):
            yield f"{key} {number}", defaults, row


def _csv(text: str, name: str) -> Iterator[tuple[str, Mapping[str, Any], object]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    if reader.fieldnames is None or "source" not in reader.fieldnames:
        raise OptionError("the plan's first line does not name the columns", file=name, hint="source,target,options")
    for row in reader:
        place = f"line {reader.line_num}"
        if None in row or None in row.values():
            raise OptionError(f"{place}: not as many fields as columns", file=name, found=len(row))
        yield place, {}, {key: value for key, value in row.items() if value.strip()}


def _jsonl(text: str, name: str) -> Iterator[tuple[str, Mapping[str, Any], object]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"line {number} is not JSON: {error}", file=name) from error
        yield f"line {number}", {}, row


def _entry(defaults: Mapping[str, Any], row: object, place: str) -> Entry:
    if isinstance(row, str):
        left, arrow, right = row.partition(_ARROW)
        if not arrow:
            raise OptionError(f"{row!r} is not SOURCE -> TARGET")
        row = {"source": left.strip(), "target": right.strip()}
    if not isinstance(row, dict):
        raise OptionError("is neither a table nor SOURCE -> TARGET")
    whole = {**defaults, **row}
    source: Any = whole.get("source")
    target: Any = whole.get("target")
    verb: Any = whole.get("verb", "convert")
    if not isinstance(source, str) or not source or "\0" in source:
        raise OptionError("no source is named")
    if verb not in VERBS:
        raise OptionError(f"the verb {verb!r} is not known", hint=", ".join(VERBS))
    if verb == "aws upload":
        if target:
            raise OptionError("aws upload has no target: it makes a snapshot")
        target = None
    elif not isinstance(target, str) or not target or "\0" in target:
        raise OptionError("no target is named")
    words = [*_words(defaults), *_words(row)]
    return Entry(source, target, verb, tuple(words), _names(whole.get("exclude", ())), place)


def _names(value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise OptionError("exclude is neither a pattern nor a list of patterns")
    return tuple(names)


def _words(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a row's `options`, a string, a list or a table, and of its other keys."""
    options = row.get("options", ())
    if isinstance(options, str):
        try:
            yield from shlex.split(options)
        except ValueError as error:
            raise OptionError(f"the options {options!r} cannot be split: {error}") from error
    elif isinstance(options, list | tuple) and all(isinstance(word, str) for word in options):
        yield from options
    elif isinstance(options, dict):
        yield from _said(options)
    else:
        raise OptionError("options is neither a string nor a list of words nor a table")
    yield from _said({key: value for key, value in row.items() if key not in _OWN})


_FIELDS = {
    "source_format": "-f",
    "format": "-f",
    "target_format": "-O",
    "format_options": "-o",
    "base": "-B",
    "base_format": "-F",
    "zero_unit": "-S",
    "profile": "--for",
}
"""Options by the name of their field in ConvertOptions, where that is not the word on the command line."""


def _said(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        word = _FIELDS.get(key.replace("-", "_")) or _option(key)
        if isinstance(value, dict):
            yield from (word, ",".join(f"{name}={_text(one)}" for name, one in value.items()))
        elif isinstance(value, list):
            for one in value:
                yield from (word, _text(one))
        elif value is True or value == "true":
            yield word
        elif value is not False and value != "false":
            yield from (word, _text(value))


def _option(key: str) -> str:
    if key.startswith("-"):
        return key
    return f"-{key}" if len(key) == 1 else f"--{key.replace('_', '-')}"


def _text(value: object) -> str:
    if value is True or value is False:
        return "on" if value else "off"
    if isinstance(value, str | int | float):
        return str(value)
    raise OptionError(f"{value!r} is not the value of an option")
