"""Small SVG plots for the report page: text in, text out, coloured by the page's own style sheet."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 26
_SMALLEST, _LARGEST = 1e-30, 1e30  # beyond these a plot of floats says nothing


def line_chart(series: Mapping[str, Points], marks: Sequence[float] = ()) -> str:
    """Lines over steps as one <svg>: {label: [(x, y), ...]}; at most six are told apart by colour.

    Points that are not finite break the line. `marks` are x values to draw a thin vertical line at. An empty string
    where there is nothing to draw.
    """
    kept = {label: _finite(points) for label, points in series.items()}
    kept = {label: points for label, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5, whole=True), ticks(min(ys), max(ys), 4)
    left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def x_at(x: float) -> float:
        return _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y_at(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y_at(y) + 3.5:.1f}" text-anchor="end">{short(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{x_at(x):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{short(x)}</text>')
    for x in marks:
        if left <= x <= right:
            parts.append(
                f'<line class="mark" x1="{x_at(x):.1f}" x2="{x_at(x):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
            )
    for place, (label, points) in enumerate(kept.items()):
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
        name = f"<title>{escape(label)}</title>"
        if len(points) == 1:
            x, y = points[0]
            parts.append(
                f'<circle class="dot s{place % 6}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3">{name}</circle>'
            )
        else:
            parts.append(f'<polyline class="line s{place % 6}" points="{path}">{name}</polyline>')
    return _svg(_WIDTH, _HEIGHT, parts, ", ".join(kept))


def legend(labels: Sequence[str]) -> str:
    """The colours of `line_chart`'s series, in the same order."""
    keys = "".join(f'<span><i class="key s{i % 6}"></i>{escape(label)}</span>' for i, label in enumerate(labels))
    return f'<div class="legend">{keys}</div>'


def interval_bar(rate: float, low: float, high: float) -> str:
    """A share in [0, 1] with its interval, on a scale whose middle is one half: dot and whisker as one <svg>."""
    if not all(math.isfinite(value) for value in (rate, low, high)):
        return ""
    width, height, margin = 180, 20, 6
    at = [margin + value * (width - 2 * margin) for value in (low, high, rate, 0.5)]
    verdict = "better" if low > 0.5 else "worse" if high < 0.5 else "level"
    parts = [
        f'<line class="grid" x1="{margin}" x2="{width - margin}" y1="10" y2="10"/>',
        f'<line class="half" x1="{at[3]:.1f}" x2="{at[3]:.1f}" y1="2" y2="18"/>',
        f'<line class="whisker {verdict}" x1="{at[0]:.1f}" x2="{at[1]:.1f}" y1="10" y2="10"/>',
        f'<circle class="dot {verdict}" cx="{at[2]:.1f}" cy="10" r="4.5"/>',
    ]
    return _svg(width, height, parts, f"{100 * rate:.0f} %, interval {100 * low:.0f} % to {100 * high:.0f} %")


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers that span [low, high]; only inside it, and whole, where `whole`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), _SMALLEST):
        spread = abs(low) * 0.1 or 1.0
        low, high = (low, low) if whole else (low - spread, high + spread)
        if whole:
            return [low]
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's label: 1200 is "1.2k", 0.00005 is "5e-05"."""
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 1e6:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and abs(x) < _LARGEST and abs(y) < _LARGEST]


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    inside = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{inside}</svg>'
    )
