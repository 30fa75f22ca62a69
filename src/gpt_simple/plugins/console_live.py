"""The live view on a terminal: where the run is and how it does, under a scrolling log.

A thread of rich redraws it once a second. The hooks only store numbers, so that a step of some milliseconds does not
notice.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console as Terminal
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpt_simple.plugins.console_text import duration

if TYPE_CHECKING:
    from gpt_simple.hooks import events as ev

_BARS = "▁▂▃▄▅▆▇█"
_LOSSES = 32


class _Screen(Terminal):
    """A terminal whose cursor is never hidden: a process that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class LiveView:
    """Stands at the bottom of the terminal until ``stop``.

    ``step`` tells how many steps are made, ``left`` the seconds to the end, if known: both are asked when it is drawn.
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
        self._begun = event.step
        self._compiles = event.facts["compile"] != "off"
        self._step = step
        self._max_steps = event.max_steps
        self._floor: float | None = event.facts["floor"]
        self._left = left
        self._best = event.best_val_loss
        self._started = time.monotonic()
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._train: Mapping[str, float] = {}
        self._eval: Mapping[str, float] = {}
        self._checkpoint: tuple[int, float] | None = None
        # Not sys.stdout itself: rich replaces that, and a print of anybody else then scrolls above the view.
        self._terminal = terminal or _Screen(file=sys.stdout, highlight=False)
        self._live = Live(self, console=self._terminal, refresh_per_second=1)

    def start(self) -> None:
        """Appear."""
        self._live.start()

    def stop(self) -> None:
        """Disappear and leave the log."""
        self._live.transient = True
        self._live.stop()

    def print(self, text: str) -> None:
        """A line of the log. Never markup: a text may hold brackets."""
        self._terminal.print(text, markup=False, highlight=False, soft_wrap=True)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """A logging boundary."""
        self._train = metrics
        self._losses.append(metrics["train/loss"])

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """The end of an evaluation."""
        self._eval = metrics
        if (loss := metrics.get("eval/loss")) is not None:
            self._best = loss if self._best is None else min(self._best, loss)

    def checkpoint(self, step: int) -> None:
        """A checkpoint is durable."""
        self._checkpoint = step, time.monotonic()
        self.saving = None

    def __rich_console__(self, console: Terminal, options: ConsoleOptions) -> RenderResult:
        yield self._progress(options.max_width)
        for facts in (self._learning(), self._speed(), self._state()):
            if facts:
                yield _row(facts, options.max_width)

    def _progress(self, width: int) -> Table | Text:
        step = self._step()
        done = f"step {step:,}/{self._max_steps:,}"
        elapsed = duration(time.monotonic() - self._started)
        if self._compiles and step == self._begun:
            what = "compiling"
        elif self.saving == step:
            what = "saving a checkpoint"
        else:
            what = f"{duration(self._left())} left, {elapsed} so far"
        if cell_len(f"{done}  {what}") > width:
            return Text(done, "bold", no_wrap=True, overflow="crop")
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_row(Text(done, "bold"), ProgressBar(total=self._max_steps, completed=step), Text(what))
        return grid

    def _learning(self) -> list[tuple[str, str]]:
        facts = []
        if self._losses:
            facts.append(("loss", f"{self._losses[-1]:.4f} {sparkline(self._losses)}"))
        if (loss := self._eval.get("eval/loss")) is not None:
            facts.append(("validation", f"{loss:.4f}"))
        if self._best is not None:
            facts.append(("best", f"{self._best:.4f}"))
        if (bits := self._eval.get("eval/bits_per_byte")) is not None:
            facts.append(("bits/byte", f"{bits:.4f}"))
        if self._floor is not None:
            facts.append(("floor", f"{self._floor:.4f}"))
        return facts

    def _speed(self) -> list[tuple[str, str]]:
        formats = (
            ("tokens/s", "perf/tokens_per_second", "{:,.0f}"),
            ("MFU", "perf/mfu", "{:.1%}"),
            ("lr", "train/lr", "{:.3g}"),
            ("grad norm", "train/grad_norm", "{:.3f}"),
            ("memory", "memory/peak_gib", "{:.2f} GiB"),
        )
        return [(name, form.format(self._train[key])) for name, key, form in formats if key in self._train]

    def _state(self) -> list[tuple[str, str]]:
        facts = []
        if self._checkpoint is not None:
            step, when = self._checkpoint
            facts.append(("checkpoint", f"step {step:,}, {duration(time.monotonic() - when)} ago"))
        if self.warnings:
            facts.append(("warnings", str(self.warnings)))
        return facts


def sparkline(values: Sequence[float]) -> str:
    """One bar for each value, between the lowest and the highest of them; a gap for what is not finite."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if abs(value) < float("inf") else " " for value in values)


def _row(facts: Sequence[tuple[str, str]], width: int) -> Text:
    """As many facts as fit on one line: a view that wraps would not be erased as a whole."""
    row = Text(no_wrap=True, overflow="crop", end="\n")
    for name, value in facts:
        if row and cell_len(row.plain) + cell_len(f"   {name} {value}") > width:
            break
        row.append("   " if row else "")
        row.append(f"{name} ", "dim").append(value)
    return row
