"""Writes ``metrics.jsonl``: one JSON object a line.

Kinds are ``train`` (a logging boundary), ``eval`` (an evaluation) and ``event`` (a log message, a checkpoint, the start
or end of a launch). After a resume from an older checkpoint steps appear again: readers keep the last row per kind and
step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from io import FileIO
from typing import TYPE_CHECKING, Any

from gpt_simple import PluginError
from gpt_simple.hooks import NoConfig, Plugin, hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from gpt_simple.hooks import Run
    from gpt_simple.hooks import events as ev

_JSON = json.JSONEncoder(ensure_ascii=False, default=str)

_NO_FIELDS: Mapping[str, Any] = {}

_LIMIT = 1 << 24
"""Bytes of rows that are kept while they cannot be written: some days of an ordinary run."""


class Metrics(Plugin[NoConfig]):
    """One unbuffered write a row: a kill loses no row, and at most tears the last line.

    Rows that cannot be written, because the disk is full, are kept and tried again with the next row and after each
    step.
    """

    def __init__(self, config: NoConfig) -> None:
        super().__init__(config)
        self._file: FileIO | None = None
        self._waiting = bytearray()
        self._failing = False

    @hookimpl
    def on_run_start(self, run: Run, event: ev.RunStart) -> None:
        self._file = _open(run.output_dir / "metrics.jsonl")
        size = self._file.seek(0, os.SEEK_END)
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._waiting[:0] = b"\n"  # a kill tore the last line
        self._write(run, "event", {"name": "run_start", "message": event.promise})

    @hookimpl
    def on_step_end(self, run: Run, event: ev.StepEnd) -> None:
        if self._waiting:
            self._flush(run)

    @hookimpl
    def on_metrics(self, run: Run, event: ev.MetricsReady) -> None:
        self._write(run, "train", event.metrics)

    @hookimpl
    def on_eval_end(self, run: Run, event: ev.EvalEnd) -> None:
        self._write(run, "eval", event.metrics)

    @hookimpl
    def on_log(self, run: Run, event: ev.LogRecord) -> None:
        line = {"name": event.name, "level": event.level, "message": event.message}
        self._write(run, "event", line, fields=event.fields)

    @hookimpl
    def on_checkpoint_saved(self, run: Run, event: ev.CheckpointSaved) -> None:
        # Training has gone on meanwhile if it was saved in the background: the row is of the checkpoint's own step.
        row = {"name": "checkpoint", "path": str(event.path), "seconds": event.seconds, "told_at": run.step}
        self._write(run, "event", row, step=event.step)

    @hookimpl
    def on_run_end(self, run: Run, event: ev.RunEnd) -> None:
        self._write(run, "event", {"name": f"run_{event.status}", "message": event.reason})

    @hookimpl
    def on_close(self, run: Run, event: ev.Close) -> None:
        # The lock is released: another run may own the directory by now, so nothing is written.
        if (file := self._file) is not None:
            self._file = None
            file.close()
            if self._waiting:
                raise PluginError(f"{file.name}: the last rows could not be written")

    def _write(
        self,
        run: Run,
        kind: str,
        values: Mapping[str, Any],
        *,
        step: int | None = None,
        fields: Mapping[str, Any] = _NO_FIELDS,
    ) -> None:
        """Write a row. One of ``fields`` that has the name of a column becomes ``NAME@log``."""
        columns = {
            "kind": kind,
            "step": run.step if step is None else step,
            "tokens": run.tokens,
            "time": round(time.time(), 3),
            **values,
        }
        taken = {*columns, "nonfinite"}
        row = without_nan(columns | {f"{key}@log" if key in taken else key: fields[key] for key in fields})
        # A lone surrogate, from the undecodable bytes of a file name, becomes the escape that JSON has for it.
        self._waiting += _JSON.encode(row).encode(errors="backslashreplace") + b"\n"
        if self._file is not None:  # what is logged before the run starts is written when it does
            self._flush(run)

    def _flush(self, run: Run) -> None:
        assert self._file is not None
        try:
            self._reopen_if_gone(run.output_dir / "metrics.jsonl")
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting) or 0]
        except OSError as error:
            del self._waiting[_LIMIT:]
            if not self._failing:
                self._failing = True  # first: the warning is a row as well
                run.log.warning(f"{self._file.name}: {error.strerror}; the rows are kept and written later")
        else:
            self._failing = False

    def _reopen_if_gone(self, path: Path) -> None:
        """If the file was deleted or moved, continue in a new one with its content, which lives until it is closed."""
        if path.exists() or not path.parent.exists():
            return
        old, self._file = self._file, _open(path)
        assert old is not None
        with old:
            old.seek(0)
            self._waiting[:0] = old.readall() or b""


def _open(path: Path) -> FileIO:
    """The file to append to. A symbolic link is an error: it may lead out of the run directory."""
    no_follow = getattr(os, "O_NOFOLLOW", 0)
    return FileIO(path, "a+", opener=lambda name, flags: os.open(name, flags | no_follow, 0o666))


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for JSON: a float that is not finite becomes None and is written in words under ``nonfinite``.

    The name of one inside a list or a dictionary has all keys and indices: ``scores.3``.
    """
    nonfinite: dict[str, str] = {}
    finite = {name: _finite(value, name, nonfinite) for name, value in values.items()}
    return {**finite, "nonfinite": nonfinite} if nonfinite else finite


def _finite(value: Any, name: str, nonfinite: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[name] = str(value)
        return None
    if isinstance(value, dict):
        return {key: _finite(inner, f"{name}.{key}", nonfinite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner, f"{name}.{index}", nonfinite) for index, inner in enumerate(value)]
    return value
