"""A run as its files tell it, in the form in which a report shows it."""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from gpt_simple.config.redact import redacted
from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import read_metrics
from gpt_simple.run_dir.status import Status, read_status

Axis = Literal["step", "tokens", "time"]
Row = Mapping[str, Any]

AXES: tuple[Axis, ...] = ("step", "tokens", "time")


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
        return any(math.isfinite(value) for value in self.y)


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

    @_bases.default
    def _seconds_before_each_launch(self) -> list[float]:
        """Rows of steps that were made again are gone, so the time that was lost with them does not count."""
        ends = [0.0] * len(self.launches)
        for row in self.rows["train"]:
            index = self._launch_at(row["time"])
            ends[index] = max(ends[index], row["time"] - self.launches[index].time)
        return [sum(ends[:index]) for index in range(len(ends))]

    def elapsed(self, time: float) -> float:
        """Seconds that the run had been running at ``time``, without the pauses between its processes."""
        index = self._launch_at(time)
        return self._bases[index] + time - self.launches[index].time

    def values(self, metric: str) -> list[float]:
        """A metric of training or evaluation where it is finite, in the order of its steps."""
        return [value for value in map(_value(metric), self._rows_with(metric)) if math.isfinite(value)]

    def points(self, metric: str, most: int) -> Points:
        """A metric of training or evaluation, thinned to about ``most`` points that keep every peak."""
        found = self._rows_with(metric)
        values = list(map(_value(metric), found))
        kept = thin(values, most)
        return self._points([found[index] for index in kept], [values[index] for index in kept])

    def trend(self, metric: str, stretches: int) -> Points:
        """The median of a metric in each of so many stretches of the run; nothing if they would be short."""
        found = self._rows_with(metric)
        if len(found) < 4 * stretches:
            return self._points([], [])
        parts = [found[start:end] for start, end in _stretches(len(found), stretches)]
        finite = [list(filter(math.isfinite, map(_value(metric), part))) for part in parts]
        medians = [statistics.median(values) if values else math.nan for values in finite]
        return self._points([part[len(part) // 2] for part in parts], medians)

    def place(self, row: Row) -> Mapping[Axis, float]:
        """Where a row is on every axis."""
        return {"step": row["step"], "tokens": row["tokens"], "time": self.elapsed(row["time"])}

    def events(self, *names: str) -> list[Row]:
        """Events by name, in the order of their steps."""
        return [row for row in self.rows["event"] if row.get("name") in names]

    def warnings(self) -> list[Row]:
        """What the run warned of."""
        return [row for row in self.rows["event"] if row.get("level") in ("warning", "error")]

    def _rows_with(self, metric: str) -> list[Row]:
        return [row for row in self.rows["eval" if metric.startswith("eval/") else "train"] if metric in row]

    def _points(self, rows: Sequence[Row], values: Sequence[float]) -> Points:
        places = [self.place(row) for row in rows]
        return Points({axis: [place[axis] for place in places] for axis in AXES}, values)

    def _launch_at(self, time: float) -> int:
        return max(0, bisect_right([launch.time for launch in self.launches], time) - 1)


def read_history(root: Path, label: str) -> History:
    """The run in a directory; CheckpointError if there is none, or none that wrote metrics."""
    run_dir = RunDir(root)
    try:
        record = json.loads(run_dir.run_json.read_text(encoding="utf-8"))
        facts = record["facts"]
        launches = [Launch(entry["step"], entry["time"], entry["host"]) for entry in record["lineage"]]
        rows: dict[str, list[Row]] = {"train": [], "eval": [], "event": []}
        for row in read_metrics(run_dir.metrics_jsonl):
            rows.get(row["kind"], []).append(row)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename} is missing: expected a training.output_dir of a run with the plugin metrics"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read ({error.strerror}): expected a training.output_dir of a run"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run_dir.run_json} is damaged ({type(error).__name__}: {error})") from error
    return History(
        label=label,
        status=read_status(run_dir),
        config={key.replace("plugins.tables.", "plugins.", 1): v for key, v in redacted(facts["config"]).items()},
        origins=facts["origins"],
        facts=facts["run"],
        summary=_summary(run_dir),
        launches=launches,
        rows=rows,
    )


def thin(values: Sequence[float], most: int) -> list[int]:
    """Indices of about ``most`` values: in each stretch the lowest and the highest, so that no spike is lost.

    Of values that are not finite the first of a stretch stays, where the curve breaks.
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


def _value(metric: str) -> Callable[[Row], float]:
    """What a row has for a metric. In the file null stands for what is not finite."""
    return lambda row: math.nan if row[metric] is None else row[metric]


def _summary(run_dir: RunDir) -> Mapping[str, Any]:
    try:
        summary: Mapping[str, Any] = json.loads(run_dir.summary_json.read_text(encoding="utf-8"))
        return summary
    except (OSError, ValueError):
        return {}  # the run is going on, or has crashed
