"""The output of a run: a banner, progress, a summary.

On a terminal a live view is drawn under a scrolling log. Anywhere else (a pipe, CI, a batch system) every line is plain
``key=value`` text for grep, or JSON for programs.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import frozen
from typing_extensions import Doc

from gpt_simple.hooks import Plugin, hookimpl
from gpt_simple.plugins.console_text import (
    banner,
    checkpoint_line,
    compiling_steps,
    evaluation_line,
    log_lines,
    metrics_line,
    printable,
    summary_lines,
    tokens_between,
)
from gpt_simple.plugins.metrics import without_nan

if TYPE_CHECKING:
    from gpt_simple.hooks import Run
    from gpt_simple.hooks import events as ev
    from gpt_simple.plugins.console_live import LiveView

_INTERVALS = 15
_UNWRITABLE = "standard output cannot be written ({}): training goes on and shows no more; metrics.jsonl has all of it"


@frozen
class ConsoleConfig:
    """``[plugins.console]``."""

    progress: Annotated[
        Literal["auto", "live", "lines", "json", "off"],
        Doc("live: a view that is redrawn, on a terminal (elsewhere lines); lines: plain text; json: an object a line; "
            "off: warnings only; auto: live"),
    ] = "auto"  # fmt: skip


class Console(Plugin[ConsoleConfig]):
    """Writes to standard output on the main process."""

    Config = ConsoleConfig

    def __init__(self, config: ConsoleConfig) -> None:
        super().__init__(config)
        self._mode = config.progress
        if self._mode in ("auto", "live"):
            # Not left to rich, which FORCE_COLOR makes write escapes into files. There is no output after `>&-`.
            is_terminal = getattr(sys.stdout, "isatty", bool)() and os.environ.get("TERM") != "dumb"
            self._mode = "live" if is_terminal else "lines"
        self._view: LiveView | None = None
        self._stages: Sequence[Mapping[str, Any]] = [{"first_step": 1, "tokens": 1}]
        self._token_ms: deque[float] = deque(maxlen=_INTERVALS)

    @hookimpl
    def on_run_start(self, run: Run, event: ev.RunStart) -> None:
        self._stages = event.facts["stages"]
        self._write("start", banner(run, event), {"step": event.step, "max_steps": event.max_steps, **event.facts})
        compiling = compiling_steps(event.facts, event.step)
        if compiling and event.step < event.max_steps:
            line = f"step {event.step + 1} compiles the model: this takes a while, once"
            if others := ", ".join(f"{step:,}" for step in compiling[1:]):
                line += f" for each length of rows (again at step {others})"
            self._write("compile", [line], {"step": event.step + 1})
        if self._mode == "live":
            from gpt_simple.plugins.console_live import LiveView

            self._view = LiveView(event, lambda: run.step, lambda: self._left(run))
            self._view.live.start()

    @hookimpl
    def on_metrics(self, run: Run, event: ev.MetricsReady) -> None:
        if (milliseconds := event.metrics.get("perf/step_ms")) is not None:
            self._token_ms.append(milliseconds / tokens_between(self._stages, event.step - 1, event.step))
        if self._view is not None:
            self._view.metrics(event.metrics)
            return
        left = self._left(run)
        fields = {**event.metrics, "step": event.step, "tokens": event.tokens, "eta_seconds": left}
        self._write("train", [metrics_line(event, left)], fields)

    @hookimpl
    def on_eval_end(self, run: Run, event: ev.EvalEnd) -> None:
        if self._view is not None:
            self._view.evaluation(event.metrics)
        line = evaluation_line(event, run.facts()["floor"])
        fields = {**event.metrics, "step": event.step, "tokens": event.tokens, "seconds": event.seconds}
        self._write("eval", [line], fields)

    @hookimpl
    def on_checkpoint_saving(self, run: Run, event: ev.CheckpointSaving) -> None:
        if self._view is not None:
            self._view.saving = event.step

    @hookimpl
    def on_checkpoint_saved(self, run: Run, event: ev.CheckpointSaved) -> None:
        if self._view is not None:
            self._view.checkpoint(event.step)
        fields = {"step": event.step, "path": event.path, "bytes": event.bytes, "seconds": event.seconds}
        self._write("checkpoint", [checkpoint_line(event)], fields)

    @hookimpl
    def on_log(self, run: Run, event: ev.LogRecord) -> None:
        if self._view is not None and event.level != "info":
            self._view.warnings += 1
        fields = {"step": event.step, "name": event.name, "level": event.level, "message": event.message}
        self._write("event", [log_lines(event)], {**event.fields, **fields}, urgent=event.level != "info")

    @hookimpl
    def on_run_end(self, run: Run, event: ev.RunEnd) -> None:
        self._close_view()
        self._write("end", summary_lines(run, event), event.summary)

    @hookimpl
    def on_close(self, run: Run, event: ev.Close) -> None:
        self._close_view()

    def _left(self, run: Run) -> float | None:
        """Seconds of training to the last step, from the median of the latest intervals; None if the speed is unknown.

        ``perf/step_ms`` includes neither evaluations nor checkpoints nor a compiling step. A step takes as long as it
        has tokens.
        """
        if not self._token_ms:
            return None
        from statistics import median  # 10 ms that commands without a run need not pay

        left = tokens_between(self._stages, run.step, run.config.training.max_steps)
        return median(self._token_ms) / 1e3 * left

    def _write(self, kind: str, lines: Sequence[str], fields: Mapping[str, Any], *, urgent: bool = False) -> None:
        """Write ``lines``, or in JSON mode ``fields`` as one object of ``kind``."""
        if self._mode == "json":
            lines = [json.dumps(without_nan({**fields, "kind": kind}), default=str)]
        elif self._mode == "off" and not urgent:
            return
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = printable("\n".join(lines)).encode(encoding, "backslashreplace").decode(encoding)
        try:
            if self._view is not None:
                self._view.print(text)
            else:
                print(text, flush=True)
        except OSError as error:
            # The plugin is now switched off, so its warning would not be shown.
            with suppress(OSError):
                print(f"warning: {_UNWRITABLE.format(error.strerror)}", file=sys.stderr)
            raise

    def _close_view(self) -> None:
        if self._view is not None:
            self._view.live.stop()
            self._view = None
