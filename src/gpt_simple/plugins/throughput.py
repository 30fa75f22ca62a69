"""Tokens per second, model FLOPs utilisation, and memory.

``perf/tokens_per_second`` counts training time only: no evaluation, no checkpoints, no first (compiling) step.
``perf/mfu`` is reported only where the device's peak is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpt_simple.hooks import Metric, NoConfig, Plugin, hookimpl

if TYPE_CHECKING:
    from gpt_simple.hooks import Run
    from gpt_simple.hooks import events as ev

_GIB = 1024**3


class Throughput(Plugin[NoConfig]):
    """Runs on every process, because metrics are reduced over all of them."""

    ranks = "all"
    on_error = "abort"

    def __init__(self, config: NoConfig) -> None:
        super().__init__(config)
        self._rates: list[float] = []
        self._mfu: list[float] = []

    @hookimpl
    def collect_metrics(self, run: Run, event: ev.CollectMetrics) -> dict[str, Metric]:
        metrics = {
            "perf/wall_tokens_per_second": Metric(event.tokens / event.wall_seconds, reduce="last"),
            "perf/data_wait": Metric(event.data_seconds / event.wall_seconds, reduce="max"),
            "memory/peak_gib": Metric(run.peak_memory() / _GIB, reduce="max"),
        }
        if event.timed_steps and event.train_seconds > 0:
            rate = event.timed_tokens / event.train_seconds
            self._rates.append(rate)
            metrics["perf/tokens_per_second"] = Metric(rate, reduce="last")
            metrics["perf/step_ms"] = Metric(1e3 * event.train_seconds / event.timed_steps, reduce="max")
            peak = run.facts()["peak_flops"]
            if peak and event.timed_flops:
                mfu = event.timed_flops / event.train_seconds / (peak * run.world_size)
                self._mfu.append(mfu)
                metrics["perf/mfu"] = Metric(mfu, reduce="last")
        return metrics

    def describe(self) -> dict[str, Any]:
        from statistics import median  # as in console.py

        medians = {"median tokens/s": self._rates, "median MFU": self._mfu}
        return {name: median(values) for name, values in medians.items() if values}
