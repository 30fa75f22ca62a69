"""Line charts as inline SVG. Colours are CSS variables, so that one drawing serves light, dark and paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Literal, get_args

from attrs import frozen

from gpt_simple.report.history import Axis

Style = Literal["raw", "line", "dots", "level"]
"""In the order in which they are drawn: ``raw`` is every row of a curve that is also drawn smoothed, as ``line``."""
Format = Callable[[float], str]

plain: Format = "{:.4g}".format

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 40
_COLOURS = 8


@frozen
class Line:
    """One curve, with a gap at NaN. ``colour`` is the number of its run; ``level`` is horizontal, at the only ``y``."""

    label: str
    x: Mapping[Axis, Sequence[float]]
    y: Sequence[float]
    colour: int
    style: Style = "line"


@frozen
class Mark:
    """An event at ``x``: a vertical line (``resume``) or a tick on the axis (``skipped``)."""

    x: Mapping[Axis, float]
    kind: Literal["resume", "skipped"]
    text: str
    colour: int


@frozen
class Range:
    """Numbers from ``low`` to ``high`` on ``start .. end`` of the drawing. Ticks are round numbers of ``unit``."""

    low: float
    high: float
    start: float
    end: float
    write: Format = plain
    log: bool = False
    unit: float = 1.0

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-30))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside: 1, 2 or 5 times a power of ten, or powers alone if there are many of them."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            inside = [f * 10.0**p for p in powers for f in (1, 2, 5) if self.low <= f * 10.0**p <= self.high]
            if len(inside) > 7:
                return [10.0**p for p in powers if self.low <= 10.0**p <= self.high]
            if len(inside) > 1:
                return inside
        low, high = self.low / self.unit, self.high / self.unit
        rough = (high - low) / 6
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [index * step * self.unit for index in range(first, last + 1)]


def draw(
    title: str, axis: Axis, x: Range, y: Range, lines: Sequence[Line], marks: Sequence[Mark] = (), *, id: str
) -> str:
    """The chart as an ``svg`` element that scales with its place. ``id`` is unique in the page."""
    in_order = sorted(lines, key=lambda line: get_args(Style).index(line.style))
    # Points at the ends of the axis are wider than it.
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<clipPath id="{id}"><rect x="{_LEFT - 4}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT + 8}" '
        f'height="{HEIGHT - _TOP - _BOTTOM}"/></clipPath>',
        *_grid(x, y),
        *(_mark(mark, x(mark.x[axis])) for mark in marks),
        f'<g clip-path="url(#{id})">',
        *(_line(line, line.x.get(axis, ()), x, y) for line in in_order),
        "</g></svg>",
    ]
    return "\n".join(parts)


def horizontal_range(low: float, high: float, write: Format, unit: float = 1.0) -> Range:
    """The numbers from ``low`` to ``high`` on the width of the drawing."""
    return Range(low, high if high > low else low + 1, _LEFT, WIDTH - _RIGHT, write, unit=unit)


def vertical_range(
    lines: Sequence[Line],
    *,
    write: Format = plain,
    log: bool = False,
    settles: bool = False,
    from_zero: bool = False,
) -> Range:
    """The numbers of the lines, with a margin, on the height of the drawing.

    ``settles``: the first twentieth of a curve may run off the top, so that the rest can be read.
    """
    every = [y for line in lines for y in line.y if math.isfinite(y)]
    settled = [y for line in lines for y in _settled(line) if math.isfinite(y)]
    ys = settled if settles and settled else every
    if log and min(ys) > 0:
        return Range(min(ys) / 1.15, max(ys) * 1.15, HEIGHT - _BOTTOM, _TOP, write, log=True)
    margin = (max(ys) - min(ys)) * 0.05 or abs(max(ys)) * 0.05 or 1.0
    low = min(ys) - margin
    low = 0.0 if from_zero else max(low, 0.0) if min(ys) >= 0 else low
    return Range(low, max(ys) + margin, HEIGHT - _BOTTOM, _TOP, write)


def _settled(line: Line) -> Sequence[float]:
    return line.y[len(line.y) // 20 :] if line.style in ("raw", "line") else line.y


def _grid(x: Range, y: Range) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = ['<g class="grid">']
    for value in y.ticks():
        parts.append(f'<path d="M{_LEFT} {y(value):.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{escape(y.write(value))}</text>')
    for value in x.ticks():
        parts.append(f'<path d="M{x(value):.1f} {bottom}v5"/>')
        # The outermost labels must not leave the drawing.
        anchor = "end" if x(value) > right - 20 else "middle"
        place = f'x="{x(value):.1f}" y="{bottom + 20}"'
        parts.append(f'<text {place} text-anchor="{anchor}">{escape(x.write(value))}</text>')
    return [*parts, f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/></g>']


def _mark(mark: Mark, x: float) -> str:
    reach = f"V{_TOP}" if mark.kind == "resume" else "v-9"
    return (
        f'<path class="{mark.kind} c{mark.colour % _COLOURS}" d="M{x:.1f} {HEIGHT - _BOTTOM}{reach}">'
        f"<title>{escape(mark.text)}</title></path>"
    )


def _line(line: Line, places: Sequence[float], x: Range, y: Range) -> str:
    title, colour = f"<title>{escape(line.label)}</title>", f"c{line.colour % _COLOURS}"
    if line.style == "level":
        return f'<path class="level {colour}" d="M{_LEFT} {y(line.y[0]):.1f}H{WIDTH - _RIGHT}">{title}</path>'
    points = groupby(zip(places, line.y, strict=True), key=lambda point: math.isfinite(point[1]))
    pieces = [[f"{x(a):.1f} {y(b):.1f}" for a, b in piece] for finite, piece in points if finite]
    drawn = "".join(f"M{'L'.join(piece)}" for piece in pieces if len(piece) > 1)
    alone = "".join(f"M{place}h0" for piece in pieces if line.style == "dots" or len(piece) == 1 for place in piece)
    parts = [f'<path class="{line.style} {colour}" d="{drawn}">{title}</path>'] if drawn else []
    if alone and line.style == "dots":  # so that a point is seen on a curve of its own colour
        parts.append(f'<path class="halo" d="{alone}"/>')
    if alone:
        parts.append(f'<path class="points {colour}" d="{alone}">{title}</path>')
    return "".join(parts)
