"""The live view on a terminal: the progress of the run and its latest numbers, under a scrolling log.

A thread of rich redraws it once a second. The hooks only store numbers, so a step of some milliseconds does not slow
down.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console as Terminal
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpt_simple.plugins.console_text import compiling_steps, duration, filled

if TYPE_CHECKING:
    from gpt_simple.hooks import events as ev

_BARS = "▁▂▃▄▅▆▇█"
_LOSSES = 32

_ROWS = (
    (
        "[dim]loss[/] {train/loss:.4f} {sparkline}",
        "[dim]validation[/] {eval/loss:.4f}",
        "[dim]best[/] {best:.4f}",
        "[dim]bits/byte[/] {eval/bits_per_byte:.4f}",
        "[dim]floor[/] {floor:.4f}",
    ),
    (
        "[dim]tokens/s[/] {perf/tokens_per_second:,.0f}",
        "[dim]MFU[/] {perf/mfu:.1%}",
        "[dim]lr[/] {train/lr:.3g}",
        "[dim]grad norm[/] {train/grad_norm:.3f}",
        "[dim]memory[/] {memory/peak_gib:.2f} GiB",
    ),
    (
        "[dim]checkpoint[/] step {checkpoint:,}, {checkpoint_age} ago",
        "[dim]warnings[/] {warnings}",
    ),
)
"""The rows under the progress bar; an item is left out while one of its numbers is unknown."""


class _Screen(Terminal):
    """A terminal whose cursor is never hidden: a process that is killed could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class LiveView:
    """Stays at the bottom of the terminal between ``live.start()`` and ``live.stop()``.

    ``step`` returns the number of finished steps, ``left`` the seconds to the end or None: both are called when the
    view is drawn.
    """

    def __init__(
        self,
        event: ev.RunStart,
        step: Callable[[], int],
        left: Callable[[], float | None],
        *,
        terminal: Terminal | None = None,
    ) -> None:
        self.saving: int | None = None
        """The step whose checkpoint is being written."""

        self.warnings = 0
        self._compiling = compiling_steps(event.facts, event.step)
        self._step = step
        self._max_steps = event.max_steps
        self._left = left
        self._started = time.monotonic()
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._saved = 0.0
        known = {"best": event.best_val_loss, "floor": event.facts["floor"]}
        self._numbers: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
        # Not sys.stdout itself: rich replaces that, so that whatever else is printed scrolls above the view.
        terminal = terminal or _Screen(file=sys.stdout, highlight=False)
        self.live = Live(self, console=terminal, refresh_per_second=1, transient=True)

    def print(self, text: str) -> None:
        """Add a line to the log. It is no markup: a text may hold brackets."""
        self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a logging boundary."""
        self._losses.append(metrics["train/loss"])
        self._numbers |= {**metrics, "sparkline": sparkline(self._losses)}

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Show the metrics of an evaluation."""
        self._numbers |= metrics
        if (loss := metrics.get("eval/loss")) is not None and isfinite(loss):
            self._numbers["best"] = min(loss, self._numbers.get("best", loss))

    def checkpoint(self, step: int) -> None:
        """Show that the checkpoint of ``step`` is durable."""
        self._numbers["checkpoint"], self._saved = step, time.monotonic()
        self.saving = None

    def __rich_console__(self, console: Terminal, options: ConsoleOptions) -> RenderResult:
        yield self._progress(options.max_width)
        numbers = {**self._numbers, "checkpoint_age": duration(time.monotonic() - self._saved)}
        if options.ascii_only:
            numbers["sparkline"] = ""
        if self.warnings:
            numbers["warnings"] = self.warnings
        for templates in _ROWS:
            if items := filled(templates, numbers):
                yield _row(items, options.max_width)

    def _progress(self, width: int) -> Table | Text:
        step = self._step()
        done = f"step {step:,}/{self._max_steps:,}"
        if step + 1 in self._compiling:
            what = "compiling"
        elif self.saving == step:
            what = "saving a checkpoint"
        else:
            what = f"{duration(self._left())} left, {duration(time.monotonic() - self._started)} so far"
        if cell_len(f"{done}  {what}") > width:
            return Text(done, "bold", no_wrap=True, overflow="crop")
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_row(Text(done, "bold"), ProgressBar(total=self._max_steps, completed=step), Text(what))
        return grid


def sparkline(values: Sequence[float]) -> str:
    """One bar for each value, between the lowest and the highest of them; a gap for what is not finite."""
    finite = [value for value in values if isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if isfinite(value) else " " for value in values)


def _row(items: Sequence[str], width: int) -> Text:
    """As many items as fit on one line: a view that wraps would not be erased as a whole."""
    row = Text(no_wrap=True, overflow="crop")
    for item in map(Text.from_markup, items):
        if row and row.cell_len + 3 + item.cell_len > width:
            break
        row.append("   " if row else "").append_text(item)
    return row
