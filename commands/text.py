"""Small pieces of text: sizes, durations, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def size_text(count: float) -> str:
    """Return bytes as people read them: `1.5 GiB`, `512 B`."""
    if count < 1024:
        return f"{int(count)} B"
    units = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = next((i for i in range(1, len(units)) if count < 1024 ** (i + 1)), len(units))
    count /= 1024**power
    unit = units[power - 1]
    number = f"{count:.2f}" if count < 10 else f"{count:.1f}" if count < 100 else f"{count:.0f}"
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def exact_size_text(count: int) -> str:
    """Return bytes both ways: `1.5 GiB (1610612736 bytes)`."""
    return f"{size_text(count)} ({count} bytes)" if count >= 1024 else f"{count} bytes"


def duration_text(seconds: float) -> str:
    """Return `0:05`, `12:30` or `1:02:03`."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: int = 2
) -> Iterator[str]:
    """Yield the lines of a table; `right` are the columns set flush right."""
    lines = [[_one_line(cell) for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield " " * indent + "  ".join(cells).rstrip()


def properties(pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield `name  value` lines, the values in one column; a value stays on its line, whoever chose it."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        yield f"{name + ':':<{width + 2}}{_one_line(value)}"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def time_text(seconds: float | None) -> str:
    """Return a time since 1970 as `2024-05-01 12:00:00 UTC`, `-` where it is not known."""
    if seconds is None:
        return "-"
    import time

    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "-"
