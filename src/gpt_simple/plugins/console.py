"""What one sees while a run trains: a banner, progress, a summary.

On a terminal a progress bar with the time left stands under a scrolling log; anywhere else (a pipe, CI, a batch
system) every line is plain ``key=value`` text that one can grep.
"""

from __future__ import annotations

import os
import statistics
import sys
import textwrap
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import frozen
from typing_extensions import Doc

from gpt_simple.hooks import Plugin, hookimpl
from gpt_simple.hooks import events as ev

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from gpt_simple.hooks import Run

_SHOWN = {
    "train/loss": ("loss", "{:.4f}"),
    "train/lr": ("lr", "{:.3g}"),
    "train/grad_norm": ("grad_norm", "{:.3f}"),
    "train/skipped_steps": ("skipped", "{:.0f}"),
    "perf/tokens_per_second": ("tokens_per_second", "{:.0f}"),
    "perf/mfu": ("mfu", "{:.3f}"),
    "memory/peak_gib": ("peak_gib", "{:.2f}"),
}
_REDRAW_SECONDS = 0.2


@frozen
class ConsoleConfig:
    """``[plugins.console]``."""

    progress: Annotated[
        Literal["auto", "live", "lines", "off"],
        Doc("live: a progress bar; lines: plain text; off: warnings only; auto: live on a terminal, else lines"),
    ] = "auto"


class Console(Plugin[ConsoleConfig]):
    """Writes to standard output on the main process."""

    Config = ConsoleConfig

    def __init__(self, config: ConsoleConfig) -> None:
        super().__init__(config)
        self._mode = config.progress
        if self._mode == "auto":
            self._mode = "live" if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else "lines"
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._redrawn = 0.0
        self._first = 0
        self._ends: deque[float] = deque(maxlen=64)

    @hookimpl
    def on_run_start(self, run: Run, event: ev.RunStart) -> None:
        for line in _banner(run, event):
            self._say(line)
        self._first = event.step + 1
        if self._mode == "live":
            self._start_progress(event)

    @hookimpl
    def on_step_start(self, run: Run, event: ev.StepStart) -> None:
        if event.step == self._first and run.facts()["compile"] != "off":
            self._say(f"step {event.step} compiles the model: this takes a while, once")

    @hookimpl
    def on_step_end(self, run: Run, event: ev.StepEnd) -> None:
        now = time.monotonic()
        self._ends.append(now)
        if self._progress is not None and now - self._redrawn > _REDRAW_SECONDS:
            self._redrawn = now
            self._progress.update(self._task, completed=event.step, left=_duration(self._left(run)))  # type: ignore[arg-type]

    @hookimpl
    def on_metrics(self, run: Run, event: ev.MetricsReady) -> None:
        pairs = [
            f"{name}={form.format(event.metrics[key])}" for key, (name, form) in _SHOWN.items() if key in event.metrics
        ]
        self._say(f"step={event.step} tokens={event.tokens} {' '.join(pairs)} eta={_duration(self._left(run))}")

    @hookimpl
    def on_eval_end(self, run: Run, event: ev.EvalEnd) -> None:
        pairs = [f"{name.replace('/', '_')}={value:.4f}" for name, value in event.metrics.items()]
        if (floor := run.facts()["floor"]) is not None:
            pairs.append(f"floor={floor:.4f}")
        self._say(f"step={event.step} {' '.join(pairs)} seconds={event.seconds:.1f}")

    @hookimpl
    def on_checkpoint_saved(self, run: Run, event: ev.CheckpointSaved) -> None:
        self._say(
            f"step={event.step} checkpoint={event.path} mib={event.bytes / 2**20:.1f} seconds={event.seconds:.2f}"
        )

    @hookimpl
    def on_log(self, run: Run, event: ev.LogRecord) -> None:
        if event.name == "sample":
            self._say(f"step={event.step} sample:\n{textwrap.indent(_wrapped(event.message), '    ')}")
        else:
            self._say(f"{event.level}: {event.message}" if event.level != "info" else event.message, event.level)

    @hookimpl
    def on_run_end(self, run: Run, event: ev.RunEnd) -> None:
        self._stop_progress()
        for line in _summary(run, event):
            self._say(line)

    @hookimpl
    def on_close(self, run: Run, event: ev.Close) -> None:
        self._stop_progress()

    def _left(self, run: Run) -> float | None:
        """Seconds to the last step, from the median of the latest steps: evaluations and checkpoints do not show."""
        if len(self._ends) < 3:
            return None
        ends = list(self._ends)
        step = statistics.median(after - before for before, after in pairwise(ends))
        return step * (run.config.training.max_steps - run.step)

    def _say(self, text: str, level: str = "info") -> None:
        if self._mode == "off" and level == "info":
            return
        if self._progress is not None:
            # Never markup: a text may hold brackets.
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _start_progress(self, event: ev.RunStart) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = [TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()]
        self._progress = Progress(*columns, TextColumn("{task.fields[left]} left"), refresh_per_second=4)
        self._task = self._progress.add_task("train", total=event.max_steps, completed=event.step, left="?")
        self._progress.start()

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _banner(run: Run, event: ev.RunStart) -> list[str]:
    facts, training = event.facts, run.config.training
    rows = training.per_device_batch_size * training.gradient_accumulation_steps * run.world_size
    lines = [
        f"device     {facts['device']} x {run.world_size}, precision {facts['precision']} ({facts['precision_why']}),"
        f" compile {facts['compile']}",
        f"model      {run.config.model.name}: {facts['parameters']:,} parameters",
        f"data       {_data(facts['data'])}",
        f"step       {training.per_device_batch_size} rows x {training.gradient_accumulation_steps} micro-batches x"
        f" {run.world_size} processes x {facts['tokens_per_step'] // rows} tokens"
        f" = {facts['tokens_per_step']:,} tokens; {event.max_steps:,} steps",
        f"plugins    {', '.join(facts['plugins'])}",
        f"output     {run.output_dir}",
    ]
    if facts["floor"] is not None:
        lines.append(
            f"floor      {facts['floor']:.4f} nats/token: the source's own validation loss; nothing can beat it"
        )
    lines.append(f"start      {event.promise}")
    return lines


def _data(data: Mapping[str, Any]) -> str:
    sizes = [
        f"{data[split]['targets']:,} {word} tokens" for split, word in (("train", "training"), ("val", "validation"))
    ]
    buckets = f", {len(data['buckets'])} buckets" if len(data["buckets"]) > 1 else ""
    return f"{', '.join(sizes)}{buckets}, tokenizer {data['tokenizer']} ({data['vocab_size']:,} entries)"


def _summary(run: Run, event: ev.RunEnd) -> list[str]:
    summary = event.summary
    floor = f" (floor {summary['floor']:.4f})" if summary["floor"] is not None else ""
    rows: list[tuple[str, Any]] = [
        ("steps", f"{summary['steps']:,}"),
        ("tokens", f"{summary['total_tokens']:,} ({summary['total_target_tokens']:,} in the loss)"),
        ("training loss", _number(summary["final_loss"])),
        ("validation loss", _number(summary["final_val_loss"]) + floor),
        ("best validation loss", _number(summary["best_val_loss"])),
        ("bits per byte", _number(summary["bits_per_byte"])),
        ("median tokens/s", f"{summary['tokens_per_second']:,.0f}" if summary["tokens_per_second"] else "-"),
        ("peak memory", f"{summary['peak_memory_gib']:.2f} GiB"),
        ("time", _duration(summary["seconds"])),
        ("checkpoint", summary["checkpoint"] or "-"),
    ]
    lines = ["", f"{event.status}: {event.reason}"]
    lines += [f"  {name:<21} {value}" for name, value in rows]
    for facts in summary["plugins"].values():
        if "sample" in facts:
            lines += ["  the model writes", textwrap.indent(_wrapped(facts["sample"]), "    ")]
    lines += ["", f"next: {summary['next']}"]
    if summary["checkpoint"]:
        lines.append(f'      gpt-simple sample {run.output_dir} --prompt "Once" lets the model write')
    return lines


def _wrapped(text: str) -> str:
    """Lines of readable width; control characters, which a young model writes, must not reach the terminal."""
    lines = (textwrap.fill(line, 100) for line in text.splitlines())
    return "\n".join("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in line) for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
