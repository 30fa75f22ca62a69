"""Writes metrics to CSV files, one row for each logging boundary and each evaluation."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from attrs import frozen
from typing_extensions import Doc

from gpt_simple import Plugin, Run, hookimpl
from gpt_simple.hooks import EvalEnd, MetricsReady, RunStart


@frozen
class CsvLogConfig:
    directory: Annotated[str, Doc("where the files are written, inside the run's directory")] = "."
    columns: Annotated[tuple[str, ...], Doc("metrics to write; empty: all of the first row")] = ()


class CsvLog(Plugin[CsvLogConfig]):
    Config = CsvLogConfig

    @hookimpl
    def on_run_start(self, run: Run, event: RunStart) -> None:
        folder = run.output_dir / self.config.directory
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "eval"):
            _forget_rows_after(folder / f"{name}.csv", event.step)

    @hookimpl
    def on_metrics(self, run: Run, event: MetricsReady) -> None:
        self._write(run, "train", event.step, event.tokens, event.metrics)

    @hookimpl
    def on_eval_end(self, run: Run, event: EvalEnd) -> None:
        self._write(run, "eval", event.step, event.tokens, event.metrics)

    def _write(self, run: Run, name: str, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        path = run.output_dir / self.config.directory / f"{name}.csv"
        # The header of an existing file stays: a new metric gets no column.
        columns = _header(path) or ["step", "tokens", *(self.config.columns or metrics)]
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(columns)
            values = {"step": step, "tokens": tokens, **metrics}
            writer.writerow([values.get(column, "") for column in columns])


def _header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _forget_rows_after(path: Path, step: int) -> None:
    """Remove the rows of steps that a resumed run will repeat. For a new run remove all rows."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if row and int(row[0]) <= step]
    if not kept:
        path.unlink()
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])
