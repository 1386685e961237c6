#!/usr/bin/env python3
"""Draw docs/fleet.svg: how a run's time and cost grow with workers, what was measured (fleet.json) over the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 720, 400, 62, 24, 28, 56
WORKERS = [2**power for power in range(11)]
ROWS = 10_000
"""Of the run that is foretold; of the same rows as the measured one's."""


def model(workers: float, rows: float, row: float, overhead: float, serial: float) -> float:
    """Return a run's seconds: `row` seconds a row, in turns, but not faster than the scheduler deals with rows."""
    return max(math.ceil(rows / workers) * (row + overhead), rows * serial)


class Axes:
    """Two logarithmic axes."""

    def __init__(self, right: float, low: float, high: float) -> None:
        self.right, self.low, self.high = right, low, high

    def x(self, workers: float) -> float:
        return LEFT + math.log(workers) / math.log(self.right) * (WIDTH - LEFT - RIGHT)

    def y(self, seconds: float) -> float:
        share = math.log(seconds / self.low) / math.log(self.high / self.low)
        return HEIGHT - BELOW - share * (HEIGHT - TOP - BELOW)

    def line(self, points: list[tuple[float, float]], kind: str) -> str:
        text = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="{kind}" points="{text}"/>'

    def frame(self) -> list[str]:
        parts = []
        for workers in WORKERS:
            x = self.x(workers)
            parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BELOW}"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BELOW + 16}" text-anchor="middle">{workers}</text>')
        power = math.ceil(math.log10(self.low))
        while 10**power <= self.high:
            y = self.y(10**power)
            parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10**power:g} s</text>')
            power += 1
        parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - BELOW + 34}" text-anchor="middle">workers</text>')
        return parts


STYLE = """
svg { background: #fff; } text { font: 12px system-ui, sans-serif; fill: #222; } line { stroke: #ddd; }
polyline { fill: none; stroke-width: 2; } .few { stroke: #2a7d4f; } .many { stroke: #3b6ea8; }
.bound { stroke: #c0392b; stroke-dasharray: 5 4; } circle { fill: #2a7d4f; }
"""


def draw(found: dict[str, Any]) -> str:
    runs, cost = found["growth"], found["overhead"]
    rows, row = runs[0]["rows"], runs[0]["span"] / runs[0]["rows"]
    overhead, serial = cost["overhead"], cost["serial"]
    axes = Axes(WORKERS[-1], 1, ROWS * row * 1.6)
    few = [(n, model(n, rows, row - overhead, overhead, serial)) for n in WORKERS if n <= rows]
    many = [(n, model(n, ROWS, row - overhead, overhead, serial)) for n in WORKERS]
    parts = [
        *axes.frame(),
        axes.line(few, "few"),
        axes.line(many, "many"),
        axes.line([(1, ROWS * serial), (WORKERS[-1], ROWS * serial)], "bound"),
        *(f'<circle cx="{axes.x(run["workers"]):.1f}" cy="{axes.y(run["span"]):.1f}" r="4"/>' for run in runs),
        label(axes.x(8) + 10, axes.y(few[3][1]) + 4, f"{rows} rows: measured (dots), model (line)"),
        label(axes.x(4) + 8, axes.y(many[2][1]) - 8, f"{ROWS:,} such rows: model"),
        label(
            axes.x(12), axes.y(ROWS * serial) + 16, f"their bound: {serial * 1e3:.1f} ms of scheduler and client a row"
        ),
    ]
    what = f"Time of a run by workers: {rows} rows of {row:.2f} s measured on 1 to {runs[-1]['workers']} workers"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{what}">'
    title = f'<text x="{LEFT}" y="18">Rows of {row:.2f} s: how long a run takes</text>'
    return "\n".join([head, f"<style>{STYLE}</style>", title, *parts, "</svg>"]) + "\n"


def label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{text}</text>'


def main() -> None:
    found = json.loads((HERE / "fleet.json").read_text())
    (HERE.parent / "docs/fleet.svg").write_text(draw(found))


if __name__ == "__main__":
    main()
