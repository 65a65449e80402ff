"""Curves as inline SVG for the run's report: the lines stretch with the page, the numbers are HTML text and never shrink.

It knows points, ticks and pixels, not what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MOST_POINTS = 1500  # of a line; more would be finer than the screen
DOTS_BELOW = 40  # points that are few enough to be told apart


@dataclass(frozen=True)
class Line:
    """One series. `points` are (step, value), `style` a CSS class: raw, smooth, eval or plain."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "plain"


def number(value: float) -> str:
    """A value as short as a reader needs it."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that cover [low, high] (1, 2, 2.5 or 5 times a power of ten apart)."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) if abs(step) > 1e-9 else index * step for index in range(first, last + 1)]


def chart(title: str, lines: Sequence[Line], unit: str = "", wide: bool = False, from_zero: bool = False) -> str:
    """A <figure>, or "" without a point. Lines are drawn in order, the last on top."""
    lines = [Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.style) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    left, right = min(steps), max(steps)
    left, right = (left - 1, right + 1) if left == right else (left, right)
    marks = ticks(0.0 if from_zero else min(values), max(values))
    low, high = marks[0], marks[-1]

    def x(step: float) -> float:
        return round(1000 * (step - left) / (right - left), 2)

    def y(value: float) -> float:
        return round(1000 - 1000 * (value - low) / (high - low), 2)

    parts = [f'<path class="grid" d="M0 {y(mark)}H1000"/>' for mark in marks]
    shown = []
    for line in lines:
        stride = max(1, math.ceil(len(line.points) / MOST_POINTS))
        points = [*line.points[::stride], *([line.points[-1]] if (len(line.points) - 1) % stride else [])]
        shown.append([line.name, [[step, float(f"{value:.6g}")] for step, value in points]])
        path = "L".join(f"{x(step)} {y(value)}" for step, value in points)
        parts.append(f'<path class="line {line.style}" d="M{path}"/>')
        if len(points) < DOTS_BELOW and line.style != "smooth":
            dots = "".join(f"M{x(step)} {y(value)}h0" for step, value in points)  # a round cap stays round however the SVG is stretched
            parts.append(f'<path class="dots {line.style}" d="{dots}"/>')
    stops = [mark for mark in ticks(left, right) if left <= mark <= right and mark == int(mark)]
    last = lines[-1].points[-1][1] if len(lines) == 1 else None
    legend = "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in lines) if len(lines) > 1 else ""
    now = f'<span class="now">{number(last)} {escape(unit)}</span>' if last is not None else ""
    ys = "".join(f'<span style="top:{y(mark) / 10:.2f}%">{number(mark)}</span>' for mark in marks)
    xs = "".join(f'<span style="left:{x(stop) / 10:.2f}%">{int(stop):,}</span>' for stop in stops)
    data = {"left": left, "right": right, "lines": shown}
    return (
        f'<figure class="card{" wide" if wide else ""}"><figcaption><h3>{escape(title)}</h3>{now}{legend}</figcaption>'
        f'<div class="plot"><div class="ys" aria-hidden="true">{ys}</div><div class="area">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<i class="cross"></i></div><div class="xs" aria-hidden="true">{xs}</div></div>'
        f'<p class="readout">by optimizer step</p><script type="application/json">{script(data)}</script></figure>'
    )


def script(data: object) -> str:
    """JSON that may stand inside a <script> element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
