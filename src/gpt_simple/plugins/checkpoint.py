"""Decides when a checkpoint is written, and which ones are kept.

Requests one every ``training.save_steps`` steps (the engine writes the last one of a run by itself). After each it
keeps the newest ``keep_last_k``, multiples of ``keep_milestone_every``, and the one with the best validation loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpt_simple import read_metrics
from gpt_simple.hooks import NoConfig, Plugin, hookimpl

if TYPE_CHECKING:
    from gpt_simple.hooks import Run
    from gpt_simple.hooks import events as ev


class Checkpoint(Plugin[NoConfig]):
    """Runs on the main process; the engine hands its requests on to the others."""

    on_error = "abort"

    def __init__(self, config: NoConfig) -> None:
        super().__init__(config)
        self._losses: dict[int, float] = {}

    @hookimpl
    def on_run_start(self, run: Run, event: ev.RunStart) -> None:
        # A checkpoint is usually written before its step is evaluated, so it does not hold that loss.
        path = run.output_dir / "metrics.jsonl"
        if event.resumed_from is not None and path.exists():
            found = {row["step"]: row.get("eval/loss") for row in read_metrics(path, "eval")}
            self._record(event.step, found.get(event.step))

    @hookimpl
    def on_step_end(self, run: Run, event: ev.StepEnd) -> None:
        every = run.config.training.save_steps
        if every and event.step % every == 0:
            run.control.save(f"every {every} steps")

    @hookimpl
    def on_eval_end(self, run: Run, event: ev.EvalEnd) -> None:
        self._record(event.step, event.metrics.get("eval/loss"))

    @hookimpl
    def on_checkpoint_saved(self, run: Run, event: ev.CheckpointSaved) -> None:
        training = run.config.training
        scored = [found.step for found in run.checkpoints.list() if found.step in self._losses]
        best = [min(scored, key=self._losses.__getitem__)] if scored else []
        run.checkpoints.prune(keep_last=training.keep_last_k, keep_every=training.keep_milestone_every, protect=best)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": {str(step): loss for step, loss in self._losses.items()}}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        self._losses = {}
        for step, loss in state["losses"].items():
            self._record(int(step), loss)

    def _record(self, step: int, loss: float | None) -> None:
        # NaN compares as false with every number, so that it would stay the lowest.
        if loss is not None and math.isfinite(loss):
            self._losses[step] = loss
