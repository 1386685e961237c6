"""A page that sums a run up: one file that loads nothing, with a table, a histogram of times, failures by kind."""

from __future__ import annotations

import html
import importlib.resources
import math
import string
from collections import Counter
from typing import TYPE_CHECKING

from diskmorph.convert.fleet.rows import DONE, FAILED
from diskmorph.formats.output import FileTarget

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diskmorph.convert.fleet.rows import Result
    from diskmorph.convert.fleet.summary import Summary

_BINS = 24
_WIDTH, _HEIGHT, _LEFT, _BELOW = 720, 200, 44, 34
_COLUMNS = (
    ("Row", "n"),
    ("Status", ""),
    ("Source", ""),
    ("Target", ""),
    ("Disk", "n"),
    ("Stored", "n"),
    ("Seconds", "n"),
    ("SHA-256", ""),
    ("What was lost, what is wrong", ""),
)


def write_report(summary: Summary, plan: str, path: Path) -> None:
    """Write the page of a run to `path`, in the place of an older one. Raises TargetError."""
    data = page(summary, plan).encode()
    with FileTarget(path.parent, [path.name], force=True, sync=False) as target:
        target.members[0].write(0, data)
        target.commit([len(data)])


def page(summary: Summary, plan: str) -> str:
    """Return the page of a run; names come from plans and images, so every one of them is escaped."""
    template = importlib.resources.files("diskmorph.convert.fleet").joinpath("report.html").read_text("utf-8")
    counts = summary.counts()
    worked = sum(result.seconds for result in summary.results if result.status == DONE)
    shown = [
        *(
            (word, "" if word == "total" else word, str(counts[word]))
            for word in ("total", "done", "failed", "skipped")
        ),
        ("converted", "", _size(summary.bytes())),
        ("seconds of work", "", f"{worked:.1f}"),
    ]
    return string.Template(template).substitute(
        title=_text(f"{counts['total']} rows, {counts['failed']} failed"),
        plan=_text(plan),
        run=_text(summary.run),
        workers=f"{summary.workers} worker{'' if summary.workers == 1 else 's'}",
        elapsed=f"{summary.seconds:.1f} s",
        counts="".join(f'<li class="{kind}"><b>{_text(value)}</b>{word}</li>' for word, kind, value in shown),
        histogram=histogram([result.seconds for result in summary.results if result.status == DONE]),
        failures=_failures(summary.results),
        head="".join(f'<th class="{kind}" scope="col"><button>{name}</button></th>' for name, kind in _COLUMNS),
        rows="\n".join(_row(result) for result in summary.results),
    )


def _text(value: object) -> str:
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def _size(count: float | None) -> str:
    if count is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _row(result: Result) -> str:
    wrong = [] if result.error is None else [str(result.error.get("message", ""))]
    numbers = (
        (result.virtual_size, _size(result.virtual_size)),
        (result.stored_size, _size(result.stored_size)),
        (result.seconds, f"{result.seconds:.2f}"),
    )
    cells = [
        f'<td class="n" data-v="{result.number}">{result.number}</td>',
        f'<td class="{result.status}">{result.status}</td>',
        f'<td class="name">{_text(result.source)}</td>',
        f'<td class="name">{_text(result.target or result.snapshot_id or "")}</td>',
        *(f'<td class="n" data-v="{-1 if value is None else value}">{text}</td>' for value, text in numbers),
        f'<td><code title="{_text(result.digest or "")}">{_text((result.digest or "")[:16])}</code></td>',
        f'<td class="said">{_text("; ".join([*wrong, *result.lost]))}</td>',
    ]
    return f'<tr data-status="{result.status}">{"".join(cells)}</tr>'


def _failures(results: Sequence[Result]) -> str:
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    for result in results:
        if result.status == FAILED and result.error is not None:
            kind = str(result.error.get("kind", "internal"))
            kinds[kind] += 1
            example.setdefault(kind, str(result.error.get("message", "")))
    if not kinds:
        return '<p id="failures">None.</p>'
    rows = "".join(
        f'<tr><td class="failed">{_text(kind)}</td><td class="n">{count}</td>'
        f'<td class="said">{_text(example[kind])}</td></tr>'
        for kind, count in kinds.most_common()
    )
    head = '<tr><th>Kind</th><th class="n">Rows</th><th>The first of them</th></tr>'
    return f'<table id="failures"><thead>{head}</thead><tbody>{rows}</tbody></table>'


# --- the histogram


def histogram(seconds: Sequence[float]) -> str:
    """Return a drawing (SVG) of how many rows took how long; times on a logarithmic axis where they span far."""
    if not seconds:
        return '<p id="histogram">No row was converted.</p>'
    edges = bins(seconds)
    counts = [0] * (len(edges) - 1)
    for value in seconds:
        counts[_bin_of(value, edges)] += 1
    most = max(counts)
    wide = (_WIDTH - _LEFT) / len(counts)
    base = _HEIGHT - _BELOW
    parts = [f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH}" y2="{base}"/>', *_scale(most, base)]
    for number, count in enumerate(counts):
        tall = count / most * (base - 16)
        x = _LEFT + number * wide
        span = f"{edges[number]:.3g} to {edges[number + 1]:.3g} s"
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{base - tall:.1f}" width="{wide - 2:.1f}" height="{tall:.1f}">'
            f"<title>{span}: {count} rows</title></rect>"
        )
        if number % max(1, len(counts) // 8) == 0:
            parts.append(f'<text x="{x:.1f}" y="{base + 14}">{edges[number]:.3g}</text>')
    middle = sorted(seconds)[len(seconds) // 2]
    parts.append(
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">seconds; the median is {middle:.3g}, the most {max(seconds):.3g}</text>'
    )
    label = f"Histogram of {len(seconds)} times, median {middle:.3g} seconds"
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}"'
    return f'<svg id="histogram" role="img" aria-label="{label}" {box}>{"".join(parts)}</svg>'


def _scale(most: int, base: int) -> list[str]:
    return [
        f'<text x="{_LEFT - 6}" y="20" text-anchor="end">{most}</text>',
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">0</text>',
    ]


def bins(seconds: Sequence[float]) -> list[float]:
    """Return the edges of bins over all times, rising; equal in width, or in ratio from 20 times on."""
    low, high = max(min(seconds), 1e-4), max([*seconds, 2e-4])
    if high <= low:
        high = low * 2
    if high / low >= 20:
        step = math.log(high / low) / _BINS
        return [low * math.exp(step * number) for number in range(_BINS + 1)]
    return [low + (high - low) / _BINS * number for number in range(_BINS + 1)]


def _bin_of(value: float, edges: Sequence[float]) -> int:
    return max(0, min(len(edges) - 2, sum(edge <= value for edge in edges) - 1))
