"""A drawing of a disk's allocation as a file: SVG as text, PNG by Pillow, both from the same shapes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.sax.saxutils import escape

from diskmorph.commands.allocation import CLASSES, Tally
from diskmorph.commands.output import printable
from diskmorph.commands.text import size_text
from diskmorph.formats.errors import OptionError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ACROSS = 64
_CELL, _GAP = 11, 1
_LEFT, _TOP, _RIGHT, _BOTTOM = 84, 56, 24, 34
_INK, _FAINT, _PAPER = "#1f2933", "#7b8794", "#ffffff"
_COLOURS = ("#1b7f5c", "#2f6db5", "#c2571a", "#b9c6d2", "#eef1f4")
"""One colour a class, as in `CLASSES`; told apart by people who do not see red and green as different, too."""


class Rect(NamedTuple):
    """A filled rectangle, in pixels."""

    x: int
    y: int
    width: int
    height: int
    colour: str


class Label(NamedTuple):
    """A line of text: `x`, `y` are its left (or with `right`, its right) end and its middle, in pixels."""

    x: int
    y: int
    text: str
    size: int
    colour: str
    right: bool = False


def require_suffix(name: str) -> None:
    """Raise OptionError unless the name says PNG or SVG."""
    if Path(name).suffix.lower() not in {".png", ".svg"}:
        raise OptionError(f"--plot {name}: the name must end in .png or .svg")


def write_plot(found: Tally, title: str, name: str, *, force: bool) -> None:
    """Write the drawing to the file `name`. Raises OptionError (suffix), TargetError (it exists, it cannot be made)."""
    require_suffix(name)
    width, height, shapes = _layout(found, printable(Path(title).name))
    draw = _png if name.lower().endswith(".png") else _svg
    _put(Path(name), draw(width, height, shapes), force=force)


def _put(path: Path, data: bytes, *, force: bool) -> None:
    from diskmorph.formats.output import FileTarget

    with FileTarget(path.parent, [path.name], force=force, sync=False) as target:
        target.members[0].write(0, data)
        target.commit([len(data)])


def _layout(found: Tally, title: str) -> tuple[int, int, list[Rect | Label]]:
    """Return width, height and the shapes: cells row by row, the offset before each fourth row, a legend below."""
    columns = min(_ACROSS, max(found.cells, 1))
    rows = -(-found.cells // columns)
    pitch = _CELL + _GAP
    present = [kind for kind in range(len(CLASSES)) if found.totals[kind]]
    width = _LEFT + _ACROSS * pitch + _RIGHT
    below = _TOP + rows * pitch + 18
    height = below + 20 * len(present) + _BOTTOM
    shapes: list[Rect | Label] = [Rect(0, 0, width, height, _PAPER)]
    step = -(-found.size // found.cells) if found.cells else 0
    shapes.append(Label(_LEFT, 20, title, 16, _INK))
    summary = f"{size_text(found.size)}, {found.extents} extents; a square is {size_text(step)}"
    shapes.append(Label(_LEFT, 40, summary, 12, _FAINT))
    for row in range(0, rows, 4):
        y = _TOP + row * pitch + _CELL // 2
        shapes.append(Label(_LEFT - 8, y, size_text(row * columns * step), 11, _FAINT, right=True))
    shapes.extend(_cells(found, columns, pitch))
    for line, kind in enumerate(present):
        y = below + 20 * line
        share = found.totals[kind] / found.size
        shapes.append(Rect(_LEFT, y, 12, 12, _COLOURS[kind]))
        shapes.append(Label(_LEFT + 20, y + 6, CLASSES[kind], 12, _INK))
        text = f"{size_text(found.totals[kind])}   {share:.2%}"
        shapes.append(Label(_LEFT + 330, y + 6, text, 12, _INK, right=True))
    return width, height, shapes


def _cells(found: Tally, columns: int, pitch: int) -> Iterator[Rect]:
    """Yield a square for each cell, mixed of its classes' parts from bottom (first class) to top."""
    for cell, parts in enumerate(found.share.T.tolist()):
        x = _LEFT + cell % columns * pitch
        y = _TOP + cell // columns * pitch
        bottom = y + _CELL
        for kind, height in _parts(parts):
            bottom -= height
            yield Rect(x, bottom, _CELL, height, _COLOURS[kind])


def _parts(parts: list[float]) -> list[tuple[int, int]]:
    """Share a cell's pixels out: every class that is there gets at least one."""
    heights = {kind: max(round(part * _CELL), 1) for kind, part in enumerate(parts) if part > 0}
    largest = max(heights, key=lambda kind: heights[kind])
    heights[largest] += _CELL - sum(heights.values())
    return list(heights.items())


def _svg(width: int, height: int, shapes: list[Rect | Label]) -> bytes:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    font = 'font-family="DejaVu Sans, Verdana, sans-serif"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>']
    for shape in shapes:
        if isinstance(shape, Rect):
            lines.append(
                f'<rect x="{shape.x}" y="{shape.y}" width="{shape.width}" height="{shape.height}" '
                f'fill="{shape.colour}"/>'
            )
        else:
            anchor = ' text-anchor="end"' if shape.right else ""
            lines.append(
                f'<text x="{shape.x}" y="{shape.y}" dominant-baseline="central" font-size="{shape.size}" '
                f'fill="{shape.colour}"{anchor}>{escape(shape.text)}</text>'
            )
    return ("\n".join([*lines, "</svg>"]) + "\n").encode("utf-8", "replace")


def _png(width: int, height: int, shapes: list[Rect | Label]) -> bytes:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise TargetError("PNG needs Pillow", hint="install it with `pip install pillow`, or write .svg") from error
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        if isinstance(shape, Rect):
            corner = (shape.x + shape.width - 1, shape.y + shape.height - 1)
            draw.rectangle([(shape.x, shape.y), corner], fill=shape.colour)
        else:
            font = ImageFont.load_default(shape.size)
            draw.text((shape.x, shape.y), shape.text, shape.colour, font, anchor="rm" if shape.right else "lm")
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()
