"""The charts of a report: every metric once, over each of the three axes, with all runs in one drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from attrs import frozen

from gpt_simple.report.chart import Line, Mark, Range, draw, horizontal_range, vertical_range
from gpt_simple.report.history import AXES, Axis, History

AXIS_NAMES: Mapping[Axis, str] = {"step": "steps", "tokens": "tokens", "time": "time"}
_POINTS = 1500
_STRETCHES = 120


def si(value: float) -> str:
    """A number with a letter for its size: ``1.5M``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _scientific(value: float) -> str:
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if value else "0"


@frozen
class _Chart:
    """One figure: which metrics, and how their numbers are drawn. ``noisy``: with the trend of the training metric."""

    title: str
    unit: str
    metrics: Sequence[str]
    vertical: Callable[[Sequence[Line]], Range] = vertical_range
    floor: bool = False
    noisy: bool = False


_from_zero = partial(vertical_range, from_zero=True)
_si_from_zero = partial(_from_zero, write=si)
_settling = partial(vertical_range, settles=True)

_CHARTS = (
    _Chart("Loss", "nats per token", ("train/loss", "eval/loss"), _settling, floor=True, noisy=True),
    _Chart("Bits per byte", "validation", ("eval/bits_per_byte",)),
    _Chart("Learning rate", "", ("train/lr",), partial(_from_zero, write=_scientific)),
    _Chart("Gradient norm", "before clipping", ("train/grad_norm",), partial(vertical_range, log=True), noisy=True),
    _Chart("Throughput", "tokens/s of training time", ("perf/tokens_per_second",), _si_from_zero, noisy=True),
    _Chart("MFU", "share of the device's peak", ("perf/mfu",), _from_zero, noisy=True),
    _Chart("Peak memory", "GiB", ("memory/peak_gib",), _from_zero),
)

_TIMES = ((2 * 86400.0, 86400.0, "d"), (2 * 3600.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.0, 1.0, "s"))
"""From how many seconds on an axis is in which unit."""


def figures(histories: Sequence[History]) -> Iterator[str]:
    """A ``figure`` element for every chart that some run has numbers for."""
    marks = [mark for colour, history in enumerate(histories) for mark in _marks(history, colour)]
    floors = {history.facts.get("floor"): colour for colour, history in enumerate(histories)}
    levels = [Line("floor", {}, (floor,), colour, "level") for floor, colour in floors.items() if floor is not None]
    most = max(200, _POINTS // len(histories))
    curves_of = {chart: curves for chart in _CHARTS if (curves := list(_curves(chart, histories, most)))}
    # The same for all charts, so that the eye can go from one to the next.
    ranges = {axis: _across(axis, [line for curves in curves_of.values() for line in curves]) for axis in AXES}
    for number, (chart, curves) in enumerate(curves_of.items()):
        lines = [*curves, *(levels if chart.floor else ())]
        y = chart.vertical(lines)
        drawn = ""
        for axis, x in ranges.items():
            inside = [mark for mark in marks if x.low <= mark.x[axis] <= x.high]
            title, id = f"{chart.title} over {AXIS_NAMES[axis]}", f"clip-{number}-{axis}"
            drawn += f'<div class="over-{axis}">{draw(title, axis, x, y, lines, inside, id=id)}</div>'
        unit = f" <small>{chart.unit}</small>" if chart.unit else ""
        yield f"<figure><figcaption>{chart.title}{unit}</figcaption>{drawn}</figure>\n"


def _across(axis: Axis, curves: Sequence[Line]) -> Range:
    xs = [value for line in curves for value in line.x[axis]]
    low, high = min(xs, default=0.0), max(xs, default=0.0)
    if axis != "time":
        return horizontal_range(low, high, si)
    unit, name = next((unit, name) for least, unit, name in _TIMES if high >= least)
    return horizontal_range(low, high, lambda value: f"{value / unit:.4g} {name}", unit)


def _curves(chart: _Chart, histories: Sequence[History], most: int) -> Iterator[Line]:
    for colour, history in enumerate(histories):
        for metric in chart.metrics:
            if not (points := history.points(metric, most)):
                continue
            if metric.startswith("eval/"):
                yield Line(f"{history.label}: validation", points.x, points.y, colour, "dots")
                continue
            trend = history.trend(metric, _STRETCHES) if chart.noisy else None
            yield Line(f"{history.label}: training", points.x, points.y, colour, "raw" if trend else "line")
            if trend:
                yield Line(f"{history.label}: training, median", trend.x, trend.y, colour, "line")


def _marks(history: History, colour: int) -> Iterator[Mark]:
    rows = history.rows["train"]
    for launch in history.launches[1:]:
        before = [row for row in rows if row["step"] <= launch.step]
        if before:
            text = f"{history.label}: resumed from step {launch.step} on {launch.host}"
            yield Mark({**history.place(before[-1]), "step": launch.step}, "resume", text, colour)
    for row in rows:
        if count := row.get("train/skipped_steps"):
            text = f"{history.label}: {count:.0f} skipped up to step {row['step']}"
            yield Mark(history.place(row), "skipped", text, colour)
