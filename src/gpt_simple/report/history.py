"""A run as its files describe it: status, configuration and rows, over the axes of a report."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from gpt_simple._documents import COUNT, TIME, fits, read
from gpt_simple.config.redact import redacted
from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir, no_run
from gpt_simple.run_dir.lineage import LAUNCH, read_metrics
from gpt_simple.run_dir.status import Status, read_status

Axis = Literal["step", "tokens", "time"]
Row = Mapping[str, Any]

AXES: tuple[Axis, ...] = ("step", "tokens", "time")

_NUMBER = range(-(10**30), 10**30)
"""What can be drawn."""
_SHAPE = {
    "facts": {
        "config": dict,
        "origins": {...: str},
        "run": {"floor?": (None, _NUMBER), "parameters?": (None, COUNT)},
    },
    "lineage": [LAUNCH],
}
_ROW = {"step": COUNT, "tokens": COUNT, "time": TIME, "message?": str, "nonfinite?": dict}
_SUMMARY = {"seconds?": (None, TIME), "plugin_seconds?": {...: _NUMBER}}


@frozen
class Launch:
    """One process of the run: when it started, and after which step."""

    step: int
    time: float
    host: str


@frozen
class Points:
    """A metric over the run: one entry for each row that has it, and its place on every axis. NaN is a gap."""

    x: Mapping[Axis, Sequence[float]]
    y: Sequence[float]

    def __bool__(self) -> bool:
        return any(map(math.isfinite, self.y))


@frozen
class History:
    """Everything about one run. ``config`` maps dotted keys to values without secrets."""

    label: str
    status: Status
    config: Mapping[str, Any]
    origins: Mapping[str, str]
    facts: Mapping[str, Any]
    summary: Mapping[str, Any]
    launches: Sequence[Launch]
    rows: Mapping[str, Sequence[Row]]
    _bases: Sequence[float] = field(init=False)
    """Seconds of the run before each launch."""

    @_bases.default
    def _make_bases(self) -> list[float]:
        # Rows of repeated steps are gone, so the time that was lost with them does not count.
        ends = [0.0] * len(self.launches)
        for row in self.rows["train"]:
            index = self._launch_at(row["time"])
            ends[index] = max(ends[index], row["time"] - self.launches[index].time)
        return [sum(ends[:index]) for index in range(len(ends))]

    def elapsed(self, time: float) -> float:
        """Seconds that the run had been running at ``time``, without the pauses between its processes."""
        index = self._launch_at(time)
        return self._bases[index] + time - self.launches[index].time

    def place(self, row: Row) -> Mapping[Axis, float]:
        """The position of a row on every axis."""
        return {"step": row["step"], "tokens": row["tokens"], "time": self.elapsed(row["time"])}

    def values(self, metric: str) -> list[float]:
        """A metric of training or evaluation where it is finite, in the order of its steps."""
        return [value for _, value in self._series(metric) if math.isfinite(value)]

    def points(self, metric: str, most: int) -> Points:
        """A metric of training or evaluation, thinned to about ``most`` points that keep every peak."""
        series = self._series(metric)
        return self._points([series[index] for index in thin([value for _, value in series], most)])

    def trend(self, metric: str, stretches: int) -> Points:
        """The median of a metric in each of so many stretches of the run; no points if they would be short."""
        series = self._series(metric)
        if len(series) < 4 * stretches:
            return self._points([])
        medians = []
        for start, end in _stretches(len(series), stretches):
            finite = [value for _, value in series[start:end] if math.isfinite(value)]
            medians.append((series[(start + end) // 2][0], statistics.median(finite) if finite else math.nan))
        return self._points(medians)

    def _series(self, metric: str) -> list[tuple[Row, float]]:
        """The rows that have a metric, and its values. In the file null stands for a value that is not finite."""
        rows = self.rows["eval" if metric.startswith("eval/") else "train"]
        return [(row, math.nan if row[metric] is None else row[metric]) for row in rows if metric in row]

    def _points(self, series: Sequence[tuple[Row, float]]) -> Points:
        places = [self.place(row) for row, _ in series]
        return Points({axis: [place[axis] for place in places] for axis in AXES}, [value for _, value in series])

    def _launch_at(self, time: float) -> int:
        return max(0, bisect_right([launch.time for launch in self.launches], time) - 1)


def read_history(root: Path, label: str) -> History:
    """The run in a directory; CheckpointError if there is none, or none that wrote metrics."""
    run_dir = RunDir(root)
    if not run_dir.is_used():
        raise no_run(root)
    rows: dict[str, list[Row]] = {"train": [], "eval": [], "event": []}
    try:
        record = read(run_dir.run_json, _SHAPE)
        for row in read_metrics(run_dir.metrics_jsonl):
            if fits(row, _ROW):
                metrics = {key: value for key, value in row.items() if "/" in key and not fits(value, _NUMBER)}
                rows.get(row["kind"], []).append(row | dict.fromkeys(metrics))
        facts = record["facts"]
        return History(
            label=label,
            status=read_status(run_dir),
            config={key.replace("plugins.tables.", "plugins.", 1): v for key, v in redacted(facts["config"]).items()},
            origins=facts["origins"],
            facts=facts["run"],
            summary=_summary(run_dir),
            launches=[Launch(entry["step"], entry["time"], entry["host"]) for entry in record["lineage"]],
            rows=rows,
        )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename} is missing: expected a training.output_dir of a run with the plugin metrics"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read ({error.strerror}): expected a training.output_dir of a run"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{run_dir.run_json} is damaged ({error})") from error


def thin(values: Sequence[float], most: int) -> list[int]:
    """Indices of about ``most`` values: in each stretch the lowest and the highest, so that no spike is lost.

    The first value of a stretch that is not finite stays too, because the curve breaks there.
    """
    if len(values) <= most:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for start, end in _stretches(len(values), max(1, most // 2)):
        finite = [index for index in range(start, end) if math.isfinite(values[index])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < end - start:
            kept.add(next(index for index in range(start, end) if not math.isfinite(values[index])))
    return sorted(kept)


def _stretches(length: int, count: int) -> Iterator[tuple[int, int]]:
    return ((length * index // count, length * (index + 1) // count) for index in range(count))


def _summary(run_dir: RunDir) -> Mapping[str, Any]:
    try:
        summary: Mapping[str, Any] = read(run_dir.summary_json, _SUMMARY)
        return summary
    except (OSError, ValueError):
        return {}  # the run has not ended, or has crashed
