"""Completes a run when its evaluations no longer improve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge
from attrs import frozen
from typing_extensions import Doc

from gpt_simple import Config as RunConfig
from gpt_simple import Finding, Plugin, Run, hookimpl
from gpt_simple.hooks import EvalEnd, Preflight, RunStart

_KEY = "early_stopping.evaluations"
_MOST_RECORDED = 100


@frozen
class EarlyStoppingConfig:
    metric: Annotated[str, Doc("the metric of an evaluation that must improve")] = "eval/loss"
    mode: Annotated[Literal["min", "max"], Doc("whether a lower or a higher value is better")] = "min"
    patience: Annotated[int, Ge(1), Doc("evaluations in a row without an improvement that complete the run")] = 5
    min_delta: Annotated[float, Ge(0), Doc("an improvement is a change of more than this")] = 0.0


class EarlyStopping(Plugin[EarlyStoppingConfig]):
    """Runs on the main process, whose request holds for all."""

    Config = EarlyStoppingConfig
    on_error = "abort"

    def __init__(self, config: EarlyStoppingConfig) -> None:
        super().__init__(config)
        self._state: dict[str, Any] = {"best": None, "at": None, "waited": 0}

    @hookimpl
    def check_config(self, config: RunConfig, preflight: Preflight) -> Sequence[Finding]:
        every, steps = config.training.eval_steps, config.training.max_steps
        if not every:
            message, hint = "nothing is evaluated, so that early stopping has no effect", "set training.eval_steps"
            return [Finding("warning", "no-evaluations", message, "training.eval_steps", hint)]
        if (self.config.patience + 1) * every > steps:
            message = (
                f"{steps} steps have {steps // every} evaluations: too few for a patience of {self.config.patience}"
            )
            return [Finding("warning", "never-due", message, hint="lower patience or training.eval_steps")]
        return []

    @hookimpl
    def on_run_start(self, run: Run, event: RunStart) -> None:
        # A checkpoint is written before its step is evaluated, so its state may lack that evaluation.
        found = run.recorded(_KEY, {}).get(str(event.step))
        if event.resumed_from is None or found is None or found == self._state:
            return
        self._state = found
        self._finish_if_due(run)

    @hookimpl
    def on_eval_end(self, run: Run, event: EvalEnd) -> None:
        state, name = self._state, self.config.metric
        if name not in event.metrics:
            run.control.halt(f"early_stopping: no metric {name!r} among {', '.join(event.metrics)}")
            return
        if self._is_better(value := event.metrics[name]):
            self._state = {"best": value, "at": event.step, "waited": 0}
        else:
            self._state = {**state, "waited": state["waited"] + 1}
        earlier = {step: old for step, old in run.recorded(_KEY, {}).items() if int(step) < event.step}
        newest = [*earlier.items(), (str(event.step), self._state)][-_MOST_RECORDED:]
        run.record(_KEY, dict(newest))
        self._finish_if_due(run)

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        self._state = dict(state)

    def describe(self) -> dict[str, Any]:
        return {self.config.metric: self._state["best"], "step": self._state["at"]}

    def _is_better(self, value: float) -> bool:
        best, sign = self._state["best"], 1 if self.config.mode == "max" else -1
        return math.isfinite(value) and (best is None or sign * (value - best) > self.config.min_delta)

    def _finish_if_due(self, run: Run) -> None:
        waited, best, at = self._state["waited"], self._state["best"], self._state["at"]
        if waited >= self.config.patience:
            found = "it was never finite" if best is None else f"the best is {best:.4f} of step {at}"
            run.control.finish(f"{self.config.metric} has not improved in {waited} evaluations; {found}")
