"""From a plan's rows to the library's options, by the parsers of the verbs themselves: what they take, a row takes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diskmorph.formats.errors import DiskmorphError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskmorph.convert.fleet.expand import Draft
    from diskmorph.convert.fleet.rows import Row

_FILES = ("backing", "base", "kernel", "modules", "initrd", "passphrase_file")
_LISTS = ("allow_parent", "part")
_REFUSED = {
    "dry_run": "`diskmorph fleet plan` tells what would happen",
    "json": "the ledger has an object a row",
    "device": "a device belongs to one machine",
    "also": "say a row for each target",
    "keep_chain": "a chain becomes several files, which do not appear at once",
    "layers": "layers are several files, which do not appear at once",
    "triple": "say rows of their own for the bare files",
    "keep_on_failure": "a row that is tried again goes on with what was made",
    "resume": "a row that is tried again goes on by itself",
}


class _Parser(argparse.ArgumentParser):
    """A parser that raises what its words are refused for."""

    def error(self, message: str) -> NoReturn:
        """Raise OptionError."""
        raise OptionError(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Raise OptionError: `--help` and the like are no options of a row."""
        raise OptionError(message or f"a row takes no word that ends the command ({status})")


def rows_of(drafts: Sequence[Draft], folder: Path) -> list[Row]:
    """Return rows, numbered from 1; what a verb refuses is the row's own error. Relative files start at `folder`."""
    from diskmorph.convert.fleet.rows import Row

    reader = _Reader(folder)
    rows = []
    for number, draft in enumerate(drafts, 1):
        error: DiskmorphError | None = draft.error
        options: Any = None
        if error is None:
            options, error = reader.read(draft.verb, draft.words)
        if error is None and draft.target is not None:
            error = _unfit(draft)
        fault = None if error is None else error.as_dict()
        rows.append(Row(number, draft.verb, draft.source, draft.target, options, draft.words, fault))
    return rows


def _unfit(draft: Draft) -> OptionError | None:
    target = draft.target or ""
    if target == "-" or draft.source == "-":
        return OptionError("a fleet has no standard input or output", file=draft.source)
    if draft.verb in {"convert", "build"} and (target.endswith("/") or os.path.isdir(target)):  # noqa: PTH112
        return OptionError(
            "the target is a folder, whose files do not appear at once", file=target, hint="say a row for each disk"
        )
    if target.startswith(("nbd://", "nbd+unix://", "http://", "https://")):
        return OptionError("an export has no moment at which it appears", file=target, hint="name a file or an object")
    return None


class _Reader:
    """Reads the words of rows; the same words are read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parsers: dict[str, argparse.ArgumentParser] = {}
        self._read: dict[tuple[str, tuple[str, ...]], tuple[Any, DiskmorphError | None]] = {}

    def read(self, verb: str, words: tuple[str, ...]) -> tuple[Any, DiskmorphError | None]:
        """Return the options that words mean, or why they are refused."""
        key = (verb, words)
        if key not in self._read:
            try:
                self._read[key] = (self._options(verb, words), None)
            except DiskmorphError as error:
                error.problem = f"{verb}: {error.problem}"
                self._read[key] = (None, error)
            except OSError as error:
                self._read[key] = (None, OptionError(f"{verb}: {error.strerror}", file=str(error.filename)))
        return self._read[key]

    def _options(self, verb: str, words: tuple[str, ...]) -> Any:
        if verb not in self._parsers:
            self._parsers[verb] = _parser_of(verb)
        ends = ["source"] if verb == "aws upload" else ["source", "target.raw"]
        args = self._parsers[verb].parse_intermixed_args([*words, *ends])
        if list(getattr(args, "paths", ends))[-2:] != ends[-2:] or len(getattr(args, "paths", ends)) != len(ends):
            raise OptionError("the options name a file", hint="options alone; the row has its source and target")
        for name, instead in _REFUSED.items():
            if getattr(args, name, None):
                raise OptionError(f"--{name.replace('_', '-')} is not taken in a fleet", hint=instead)
        self._make_absolute(args)
        return _MEANINGS[verb](args)

    def _make_absolute(self, args: argparse.Namespace) -> None:
        for name in _FILES:
            value = getattr(args, name, None)
            if value and "://" not in value:
                setattr(args, name, os.path.normpath(self._folder / value))
        for name in _LISTS:
            values = getattr(args, name, None)
            if values:
                setattr(args, name, [os.path.normpath(self._folder / value) for value in values])


def _parser_of(verb: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=verb, add_help=False, allow_abbrev=False)
    if verb == "aws upload":
        from diskmorph.commands import aws_words

        aws_words.add_source(parser)
        aws_words.add_upload(parser)
        aws_words.add_volume(parser)
        aws_words.add_job(parser)
        return parser
    import importlib

    importlib.import_module(f"diskmorph.commands.{verb}").add_arguments(parser)
    return parser


def _convert(args: argparse.Namespace) -> Any:
    from diskmorph.commands.convert import options_of

    if args.flatten and args.keep_chain:
        raise OptionError("--flatten and --keep-chain exclude each other")
    return options_of(args)


def _build(args: argparse.Namespace) -> Any:
    from diskmorph.commands.build import options_of

    return options_of(args)


def _extract(args: argparse.Namespace) -> Any:
    from diskmorph.commands.extract import options_of

    return options_of(args)


def _upload(args: argparse.Namespace) -> Any:
    from diskmorph.commands import aws_words
    from diskmorph.convert.aws.job import parse_tags
    from diskmorph.convert.aws.upload import require_options
    from diskmorph.convert.fleet.rows import SnapshotOptions

    source = aws_words.source_options(args)
    upload = aws_words.upload_options(args)
    require_options(upload)
    return SnapshotOptions(
        upload=upload,
        parents=source.parents,
        format=source.format,
        snapshot=source.snapshot,
        disk=source.disk,
        build=None if source.build is None else source.build(),
        tags=parse_tags(args.tag),
    )


_MEANINGS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "convert": _convert,
    "build": _build,
    "extract": _extract,
    "aws upload": _upload,
}
