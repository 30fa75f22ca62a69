"""Which charts a report has: every metric once, over each of the three axes, with all runs in one drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from attrs import frozen

from gpt_simple.report.chart import Drawing, Format, Line, Mark
from gpt_simple.report.history import AXES, Axis, History, Points

AXIS_NAMES: Mapping[Axis, str] = {"step": "steps", "tokens": "tokens", "time": "time"}
_POINTS = 1500
_STRETCHES = 120
_ORDER = ("raw", "line", "dots", "level")


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


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _scientific(value: float) -> str:
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if value else "0"


@frozen
class _Chart:
    """One figure: which metrics, and how their numbers are written. ``noisy``: with its trend."""

    title: str
    unit: str
    train: str = ""
    evaluation: str = ""
    write: Format = _plain
    log: bool = False
    settles: bool = False
    from_zero: bool = False
    floor: bool = False
    noisy: bool = False


@frozen
class _Curve:
    """A metric of one run."""

    label: str
    points: Points
    colour: int
    style: Literal["raw", "line", "dots"]


@frozen
class _Happening:
    """A resume or skipped steps, on every axis."""

    x: Mapping[Axis, float]
    kind: Literal["resume", "skipped"]
    text: str
    colour: int


_TIMES = ((2 * 86400.0, 86400.0, "d"), (2 * 3600.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.0, 1.0, "s"))
"""From how many seconds on an axis is in which unit."""

_CHARTS = (
    _Chart("Loss", "nats per token", "train/loss", "eval/loss", settles=True, floor=True, noisy=True),
    _Chart("Bits per byte", "validation", "", "eval/bits_per_byte"),
    _Chart("Learning rate", "", "train/lr", write=_scientific, from_zero=True),
    _Chart("Gradient norm", "before clipping", "train/grad_norm", log=True, noisy=True),
    _Chart("Throughput", "tokens/s of training time", "perf/tokens_per_second", write=si, from_zero=True, noisy=True),
    _Chart("MFU", "share of the device's peak", "perf/mfu", from_zero=True, noisy=True),
    _Chart("Peak memory", "GiB", "memory/peak_gib", from_zero=True),
)


def figures(histories: Sequence[History]) -> Iterator[str]:
    """A ``figure`` element for every chart that some run has numbers for."""
    happenings = [found for colour, history in enumerate(histories) for found in _happenings(history, colour)]
    floors = {history.facts.get("floor"): colour for colour, history in enumerate(histories)}
    levels = [Line("floor", (), (floor,), colour, "level") for floor, colour in floors.items() if floor is not None]
    most = max(200, _POINTS // len(histories))
    curves_of = {chart: curves for chart in _CHARTS if (curves := list(_curves(chart, histories, most)))}
    for number, (chart, curves) in enumerate(curves_of.items()):
        drawn = ""
        for axis in AXES:
            lines = [
                Line(curve.label, curve.points.x[axis], curve.points.y, curve.colour, curve.style) for curve in curves
            ]
            # The same for all charts, so that the eye can go from one to the next.
            xs = [value for curves in curves_of.values() for curve in curves for value in curve.points.x[axis]]
            ends = min(xs), max(xs)
            x_format, x_unit = _time(ends[1]) if axis == "time" else (si, 1.0)
            inside = [found for found in happenings if ends[0] <= found.x[axis] <= ends[1]]
            drawing = Drawing(
                f"{chart.title} over {AXIS_NAMES[axis]}",
                sorted([*lines, *(levels if chart.floor else ())], key=lambda line: _ORDER.index(line.style)),
                [Mark(found.x[axis], found.kind, found.text, found.colour) for found in inside],
                x_format,
                chart.write,
                chart.log,
                chart.settles,
                chart.from_zero,
                ends,
                x_unit,
                id=f"clip-{number}-{axis}",
            )
            drawn += f'<div class="over-{axis}">{drawing.svg()}</div>'
        unit = f" <small>{chart.unit}</small>" if chart.unit else ""
        yield f"<figure><figcaption>{chart.title}{unit}</figcaption>{drawn}</figure>\n"


def _time(seconds: float) -> tuple[Format, float]:
    """How the numbers of an axis of so many seconds are written, and the seconds of its unit."""
    unit, name = next((unit, name) for least, unit, name in _TIMES if seconds >= least)
    return lambda value: f"{value / unit:.4g} {name}", unit


def _curves(chart: _Chart, histories: Sequence[History], most: int) -> Iterator[_Curve]:
    for colour, history in enumerate(histories):
        if chart.train and (points := history.points(chart.train, most)):
            trend = history.trend(chart.train, _STRETCHES) if chart.noisy else None
            yield _Curve(f"{history.label}: training", points, colour, "raw" if trend else "line")
            if trend:
                yield _Curve(f"{history.label}: training, median", trend, colour, "line")
        if chart.evaluation and (points := history.points(chart.evaluation, most)):
            yield _Curve(f"{history.label}: validation", points, colour, "dots")


def _happenings(history: History, colour: int) -> Iterator[_Happening]:
    rows = history.rows["train"]
    for launch in history.launches[1:]:
        before = [row for row in rows if row["step"] <= launch.step]
        if before:
            text = f"{history.label}: resumed from step {launch.step} on {launch.host}"
            yield _Happening({**history.place(before[-1]), "step": launch.step}, "resume", text, colour)
    for row in rows:
        if count := row.get("train/skipped_steps"):
            text = f"{history.label}: {count:.0f} skipped up to step {row['step']}"
            yield _Happening(history.place(row), "skipped", text, colour)
