"""Line charts as SVG, readable in light and dark mode and by color-blind readers, without a library in the page."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 28, 24  # margins
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito
MOST = 600  # points of a curve


class Curve(NamedTuple):
    """Values over steps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]  # NaN where there is none


class Chart(NamedTuple):
    """A chart of one to four curves."""

    title: str
    curves: Sequence[Curve]
    lines: Sequence[tuple[str, float]] = ()  # dashed lines with a label: where a collapse ends up
    healthy: tuple[float, float] | None = None  # a shaded band
    log: bool = False


def svg(chart: Chart) -> str:
    """Returns the chart as an <svg> element whose label states the last values; "" if there are no values."""
    curves = [_finite(curve, chart.log) for curve in chart.curves]
    curves = [curve for curve in curves if curve.values]
    if not curves:
        return ""
    scaled = [math.log10(line) if chart.log else line for _, line in chart.lines]
    values = [value for curve in curves for value in curve.values] + scaled
    steps = [step for curve in curves for step in curve.steps]
    low, high = _range(values)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="16">{html.escape(chart.title)}</text>']
    if chart.healthy:
        edges = [math.log10(edge) if chart.log else edge for edge in reversed(chart.healthy)]
        top, bottom = (y(min(max(edge, low), high)) for edge in edges)
        size = f'width="{WIDTH - LEFT - RIGHT}" height="{max(bottom - top, 0):.1f}"'
        parts.append(f'<rect class="healthy" x="{LEFT}" y="{top:.1f}" {size}/>')
    for value in _ticks(low, high):
        parts += [_line("grid", y(value)), _text(LEFT - 6, y(value) + 4, _label(value, chart.log), "end")]
    parts += [_text(x(first), HEIGHT - 6, f"{first:,.0f}"), _text(x(last), HEIGHT - 6, f"{last:,.0f}", "end")]
    for (label, _), value in zip(chart.lines, scaled, strict=True):
        parts += [_line("collapse", y(value)), _text(WIDTH - RIGHT, y(value) - 4, label, "end")]
    for number, (curve, color) in enumerate(zip(curves, COLORS, strict=False)):
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(curve.steps, curve.values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(curve.values) == 1:
            parts.append(f'<circle cx="{x(curve.steps[0]):.1f}" cy="{y(curve.values[0]):.1f}" r="2.5" fill="{color}"/>')
        parts.append(_text(WIDTH - RIGHT - 70 * (len(curves) - 1 - number), 16, curve.name, "end", f"fill:{color}"))
    label = html.escape(f"{chart.title}: {', '.join(_described(curve, chart.log) for curve in curves)}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _line(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{html.escape(text)}</text>'


def _label(value: float, log: bool) -> str:
    return f"{10**value:.2g}" if log else f"{value:g}"


def _finite(curve: Curve, log: bool) -> Curve:
    """Leaves out what cannot be drawn, and thins a long curve."""
    pairs = [
        (step, math.log10(value) if log else value)
        for step, value in zip(curve.steps, curve.values, strict=True)
        if math.isfinite(value) and (value > 0 or not log)
    ]
    every = -(-len(pairs) // MOST)
    kept = pairs[::every] if every else []
    return Curve(curve.name, [step for step, _ in kept], [value for _, value in kept])


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or max(abs(high), 1) * 0.1
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Returns three to six round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _described(curve: Curve, log: bool) -> str:
    value = 10 ** curve.values[-1] if log else curve.values[-1]
    return f"{curve.name or 'last'} {value:.4g}"
