"""LVM2's metadata text: sections of `name = value`, values being numbers, strings and lists (libdm/libdm-config.c)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from diskmorph.formats.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

Value = str | int | list[str | int]
Section = dict[str, "Value | Section"]

_DEEPEST = 8  # sections within sections; lvm2 writes four
_TOKEN = re.compile(
    r"""(?:\s+|\#[^\n]*)*(?:
    (?P<mark>[={}\[\],])
    |"(?P<string>[^"\\]*(?:\\.[^"\\]*)*)"
    |(?P<number>-?[0-9]{1,19})(?![^\s#=\[\]{}",])
    |(?P<name>[^\s#=\[\]{}",]+)
    )?""",
    re.VERBOSE | re.DOTALL,
)
_Token = tuple[str, str, int]  # kind, text, offset


def parse(text: str) -> Section:
    """Return what a text says: sections as dicts, in its order. Raises FormatError, with the offset within the text."""
    tokens = _tokens(text)
    found, _ = _section(tokens, 0)
    return found


def _damaged(problem: str, token: _Token) -> FormatError:
    return FormatError(
        f"the metadata text is damaged: {problem}",
        structure="metadata text",
        field=f"character {token[2]}",
        found=token[1][:40] or token[0],
    )


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        kind = match.lastgroup if match is not None else None
        if match is None or kind is None:
            at = match.end() if match is not None else at
            if at < len(text):
                raise _damaged("an unknown word", ("", text[at : at + 40], at))
            break
        found = match[kind]
        if kind == "string":
            found = re.sub(r"\\(.)", r"\1", found, flags=re.DOTALL)
        yield match[kind] if kind == "mark" else kind, found, match.start(kind)
        at = match.end()
    while True:
        yield "end", "", len(text)


def _section(tokens: Iterator[_Token], depth: int) -> tuple[Section, _Token]:
    """Return a section's content up to its end, and the token that ended it."""
    found: Section = {}
    while True:
        token = next(tokens)
        if token[0] == ("end" if depth == 0 else "}"):
            return found, token
        if token[0] not in {"name", "number", "string"}:
            raise _damaged("no name", token)
        name = token[1]
        if name in found:
            raise _damaged("a name stands twice", token)
        mark = next(tokens)
        if mark[0] == "{":
            if depth >= _DEEPEST:
                raise _damaged("too many sections within each other", mark)
            found[name], _ = _section(tokens, depth + 1)
        elif mark[0] == "=":
            found[name] = _value(tokens)
        else:
            raise _damaged("neither a value nor a section", mark)


def _value(tokens: Iterator[_Token]) -> Value:
    token = next(tokens)
    if token[0] != "[":
        return _scalar(token)
    found: list[str | int] = []
    token = next(tokens)
    while token[0] != "]":
        found.append(_scalar(token))
        token = next(tokens)
        if token[0] == ",":
            token = next(tokens)
        elif token[0] != "]":
            raise _damaged("a list that does not end", token)
    return found


def _scalar(token: _Token) -> str | int:
    if token[0] == "number":
        return int(token[1])
    if token[0] in {"string", "name"}:  # a name stands for what is no whole number: 1.5
        return token[1]
    raise _damaged("no value", token)


class Reader:
    """Takes values out of a section, each of the type that it must have. `where` names the section in messages."""

    def __init__(self, section: Section, where: str) -> None:
        self.section = section
        self.where = where

    def error(self, field: str, expected: str, found: object = None) -> FormatError:
        """Return an error about one of its values."""
        return FormatError(
            f"the metadata of {self.where} are damaged",
            structure="metadata text",
            field=field,
            expected=expected,
            found=str(found)[:60],
        )

    def number(self, name: str, least: int = 0) -> int:
        """Return a whole number, at least `least`. Raises FormatError."""
        found = self.section.get(name)
        if not isinstance(found, int) or found < least:
            raise self.error(name, f"a number from {least}", found)
        return found

    def string(self, name: str) -> str:
        """Return a string. Raises FormatError."""
        found = self.section.get(name)
        if not isinstance(found, str):
            raise self.error(name, "a string", found)
        return found

    def words(self, name: str) -> list[str]:
        """Return a list of strings; empty where there is none. Raises FormatError."""
        found = self.section.get(name, [])
        if not isinstance(found, list):
            found = [found]  # type: ignore[list-item]  # judged below
        if not all(isinstance(word, str) for word in found):
            raise self.error(name, "a list of strings", found)
        return [str(word) for word in found]

    def sections(self, name: str) -> Iterator[tuple[str, Reader]]:
        """Yield the sections in a section, with their names. Raises FormatError."""
        found = self.section.get(name, {})
        if not isinstance(found, dict):
            raise self.error(name, "a section", found)
        for inner, content in found.items():
            if not isinstance(content, dict):
                raise self.error(f"{name}.{inner}", "a section", content)
            yield inner, Reader(content, inner)

    def inner(self, name: str) -> Reader:
        """Return a section in it. Raises FormatError."""
        found = self.section.get(name)
        if not isinstance(found, dict):
            raise self.error(name, "a section", found)
        return Reader(found, f"{self.where}, {name}")
