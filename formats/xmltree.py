"""XML of hostile files, read into a small tree: no DTD, and bounds on size, depth, elements and attributes.

Built on expat, which resolves nothing outside the document once document types are refused. Every node keeps its line,
so that messages can name the place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.parsers import expat

from diskmorph.formats.errors import FormatError, PolicyError
from diskmorph.formats.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

ELEMENTS = 100_000
ATTRIBUTES = 256
_NAME = 1024  # characters of one qualified name or namespace


class Node:
    """One element: its namespace and local name, attributes, children, the text directly in it, its line.

    Attributes are keyed by local name, or by "{namespace}local" where they have one.
    """

    __slots__ = ("attributes", "children", "line", "name", "space", "text")

    def __init__(self, space: str, name: str, attributes: dict[str, str], line: int) -> None:
        self.space = space
        self.name = name
        self.attributes = attributes
        self.children: list[Node] = []
        self.text = ""
        self.line = line

    def find(self, name: str) -> Node | None:
        """Return the first child of that local name, whatever its namespace."""
        return next((child for child in self.children if child.name == name), None)

    def all(self, name: str) -> list[Node]:
        """Return the children of that local name."""
        return [child for child in self.children if child.name == name]

    def value(self, name: str) -> str | None:
        """Return the stripped text of the first child of that name; None where there is none or it is empty."""
        child = self.find(name)
        return (child.text.strip() or None) if child is not None else None

    def get(self, name: str, *spaces: str) -> str | None:
        """Return an attribute in the first of `spaces` that has it, else the one without a namespace."""
        for space in spaces:
            found = self.attributes.get(f"{{{space}}}{name}")
            if found is not None:
                return found
        return self.attributes.get(name)

    def walk(self) -> Iterator[Node]:
        """Yield this node and all below it, in the document's order."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))


def parse_xml(
    data: bytes, *, file: str, format: str, limits: Limits | None = None, encoding: str | None = None
) -> Node:
    """Return the root of a document; `encoding` overrides what the document says of its own.

    Raises FormatError where it is not well-formed or passes a bound (`limits.descriptor` bytes, `limits.xml_depth`
    levels, 100,000 elements, 256 attributes of one), PolicyError for a document type declaration.
    """
    limits = limits or Limits()
    if len(data) > limits.descriptor:
        raise FormatError(
            "an XML document is too large",
            file=file,
            format=format,
            structure="XML",
            expected=f"at most {limits.descriptor} bytes",
            found=len(data),
        )
    builder = _Builder(file, format, limits.xml_depth, encoding)
    try:
        builder.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise FormatError(
            f"is not well-formed XML: {expat.errors.messages.get(error.code, 'error')} in line {error.lineno}",
            file=file,
            format=format,
            structure="XML",
            offset=builder.parser.ErrorByteIndex,
        ) from error
    except (LookupError, ValueError) as error:  # an encoding that Python does not know or that is not of single bytes
        raise FormatError(f"is in an unknown encoding: {error}", file=file, format=format, structure="XML") from error
    if builder.root is None:
        raise FormatError("is not well-formed XML: no element", file=file, format=format, structure="XML")
    return builder.root


class _Builder:
    def __init__(self, file: str, format: str, depth: int, encoding: str | None) -> None:
        self._place = {"file": file, "format": format, "structure": "XML"}
        self._depth = depth
        self._count = 0
        self._stack: list[Node] = []
        self._texts: list[list[str]] = []
        self.root: Node | None = None
        parser = self.parser = expat.ParserCreate(encoding, " ")
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._doctype
        parser.EntityDeclHandler = self._doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text

    def _doctype(self, *_: Any) -> None:
        raise PolicyError(
            "has a document type declaration, which is not read",
            **self._place,
            offset=self.parser.CurrentByteIndex,
            hint="remove the <!DOCTYPE> from it",
        )

    def _too_much(self, what: str, most: int) -> FormatError:
        return FormatError(
            f"has too many {what}", **self._place, offset=self.parser.CurrentByteIndex, expected=f"at most {most}"
        )

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > ELEMENTS:
            raise self._too_much("elements", ELEMENTS)
        if len(self._stack) >= self._depth:
            raise self._too_much("levels of elements", self._depth)
        if len(attributes) > ATTRIBUTES:
            raise self._too_much("attributes of one element", ATTRIBUTES)
        if len(name) > _NAME:
            raise self._too_much("characters in a name", _NAME)
        space, _, local = name.rpartition(" ")
        node = Node(space, local, {_braced(key): value for key, value in attributes.items()}, self._line())
        if self._stack:
            self._stack[-1].children.append(node)
        else:
            self.root = node
        self._stack.append(node)
        self._texts.append([])

    def _line(self) -> int:
        return self.parser.CurrentLineNumber

    def _end(self, _: str) -> None:
        self._stack.pop().text = "".join(self._texts.pop())

    def _text(self, text: str) -> None:
        if self._texts:
            self._texts[-1].append(text)


def _braced(name: str) -> str:
    space, _, local = name.rpartition(" ")
    return f"{{{space}}}{local}" if space else local


_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\t": "&#9;", "\n": "&#10;", "\r": "&#13;"}
_TABLE = str.maketrans(_ESCAPES)


def escape(text: str) -> str:
    """Return `text` for use inside an element or a double-quoted attribute."""
    return text.translate(_TABLE)


def is_xml_text(text: str) -> bool:
    """Return whether XML 1.0 can hold every character (XML 1.0, 2.2 Characters)."""
    return all(c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c >= "\U00010000" for c in text)
