"""Line and bar charts as inline SVG: no script, no font, no file beside the page, colours by CSS variables.

Everything is drawn in one small coordinate system (`WIDTH` × `HEIGHT`) that the browser scales, so the same chart reads
on a phone and in two columns on a desk. The page's style sheet gives `--series-1` … and the text colours, which is
how charts follow a dark theme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 26
_BAR, _NAMES, _VALUES = 20, 104, 44
"""Height of a bar; room for the names to its left and the value to its right."""

Point = tuple[float, float | None]
"""Step and value; None leaves a gap."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    color: int
    """Number of a colour, from 1; 0 is the quiet colour of baselines."""
    style: str = "line"
    """line, faint (the raw values behind a smoothed line), dashed, or dots (a line with a dot a point)."""
    legend: bool = True
    """Whether the legend names it."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    note: str = "",
    log: bool = False,
    x_name: str = "step",
    log_x: bool = False,
) -> str:
    """A figure with title, legend and axes; empty text where no series has a value.

    note: a few words under the title. log: logarithmic values, where all of them are positive; log_x: the same across.
    x_name: what x counts, in the words beside a dot.
    """
    drawn = [one for one in series if any(value is not None for _, value in one.points)]
    if not drawn:
        return ""
    values = [value for one in drawn for _, value in one.points if value is not None]
    log = log and min(values) > 0
    steps = [step for one in drawn for step, _ in one.points]
    x_axis = _Axis.over(min(steps), max(steps), _LEFT, WIDTH - _RIGHT, log=log_x and min(steps) > 0)
    y_axis = _Axis.over(min(values), max(values), HEIGHT - _BOTTOM, _TOP, log=log, margin=0.06)
    parts = [_grid(x_axis, y_axis)]
    parts += [_draw(one, x_axis, y_axis, x_name) for one in drawn]
    legend = "".join(
        f'<span class="key {one.style}" style="--key:{_color(one.color)}">{escape(one.name)}</span>'
        for one in drawn
        if one.legend
    )
    return _figure(title, unit, note, f'<div class="legend">{legend}</div>', HEIGHT, parts)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, unit: str = "", note: str = "") -> str:
    """Horizontal bars from 0, each with its name and value; empty text where none is above 0."""
    longest = max((value for _, value in bars), default=0.0)
    if longest <= 0:
        return ""
    parts = []
    for number, (name, value) in enumerate(bars):
        y = _TOP + number * _BAR
        width = max(0.0, value) / longest * (WIDTH - _RIGHT - _NAMES - _VALUES)
        parts.append(f'<text x="{_NAMES - 8}" y="{y + 13:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="bar" x="{_NAMES}" y="{y + 3:.1f}" width="{width:.1f}" height="{_BAR - 8}"/>')
        parts.append(f'<text x="{_NAMES + width + 6:.1f}" y="{y + 13:.1f}">{value:.3g}</text>')
    return _figure(title, unit, note, "", _TOP + len(bars) * _BAR + 4, parts)


def _figure(title: str, unit: str, note: str, legend: str, height: float, parts: Sequence[str]) -> str:
    heading = f"{escape(title)}" + (f' <span class="unit">{escape(unit)}</span>' if unit else "")
    description = f"<p>{escape(note)}</p>" if note else ""
    caption = f"<figcaption><h3>{heading}</h3>{description}{legend}</figcaption>"
    drawing = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure class="chart">{caption}{drawing}</figure>'


def smoothed(points: Sequence[Point], *, window: float = 0.03, bins: int = 160) -> list[Point]:
    """Means over a sliding window, a share of the whole range wide, at so many places."""
    known = [(step, value) for step, value in points if value is not None]
    if len(known) < 8:
        return list(known)
    low, high = known[0][0], known[-1][0]
    half = max((high - low) * window / 2, 2.0)
    result: list[Point] = []
    start = stop = 0
    total = 0.0
    for place in range(bins + 1):
        center = low + (high - low) * place / bins
        while stop < len(known) and known[stop][0] <= center + half:
            total += known[stop][1]
            stop += 1
        while start < stop and known[start][0] < center - half:
            total -= known[start][1]
            start += 1
        if stop > start:
            result.append((center, total / (stop - start)))
    return result


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    stop: float
    log: bool

    @staticmethod
    def over(low: float, high: float, start: float, stop: float, *, log: bool = False, margin: float = 0.0) -> "_Axis":
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(1.0, abs(high)):
            pad = 0.5 if log else abs(high) * 0.1 or 1.0
            low, high = low - pad, high + pad
        space = (high - low) * margin
        return _Axis(low - space, high + space, start, stop, log)

    def place(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        if not self.log:
            return _round_steps(self.low, self.high, count)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        factors = (1.0, 2.0, 5.0) if self.high - self.low < 2 else (1.0,)
        ticks = [10.0**power * factor for power in powers for factor in factors]
        ticks = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
        return ticks[:: max(1, math.ceil(len(ticks) / count))]


def _round_steps(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside a range."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    parts = []
    for tick in y_axis.ticks(5):
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    for tick in x_axis.ticks(5):
        x = x_axis.place(tick)
        anchor = "end" if x > WIDTH - _RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{tick_label(tick)}</text>')
    base = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)


def _draw(one: Series, x_axis: _Axis, y_axis: _Axis, x_name: str) -> str:
    path, pen = [], "M"
    dots = []
    for step, value in one.points:
        if value is None or (y_axis.log and value <= 0):
            pen = "M"
            continue
        x, y = x_axis.place(step), y_axis.place(value)
        path.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
        if one.style == "dots":
            words = f"{escape(x_name)} {step:g}: {value:.4g}"
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{words}</title></circle>')
    title = f"<title>{escape(one.name)}</title>"
    line = f'<path class="{one.style}" d="{"".join(path)}">{title}</path>'
    return f'<g style="--key:{_color(one.color)}">{line}{"".join(dots)}</g>'


def _color(number: int) -> str:
    return f"var(--series-{number})"


def tick_label(value: float) -> str:
    """A tick's number: `1.5k`, `2M`, `0.02`, `3e-4`."""
    if value == 0:
        return "0"
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"
