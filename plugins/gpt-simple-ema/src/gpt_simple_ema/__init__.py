"""Keeps an exponential moving average of the weights, as the set ``ema``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from attrs import frozen
from typing_extensions import Doc

from gpt_simple import Plugin, Run, hookimpl
from gpt_simple.hooks import CheckpointLoaded, OptimizerBuilt, RunStart, StepEnd


@frozen
class EmaConfig:
    decay: Annotated[float, Ge(0), Lt(1), Doc("share of the average that an update keeps")] = 0.999
    every: Annotated[int, Ge(1), Doc("steps between two updates")] = 1
    warmup: Annotated[bool, Doc("keep at most (1 + n) / (10 + n) in update n, so that the first weights fade")] = True


class Ema(Plugin[EmaConfig]):
    """Every process has the whole average and updates it in the same way. Nothing is read on the host."""

    Config = EmaConfig
    ranks = "all"

    def __init__(self, config: EmaConfig) -> None:
        super().__init__(config)
        self._average: dict[str, torch.Tensor] = {}
        self._parameters: list[torch.nn.Parameter] = []
        self._restored = False

    def weight_sets(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        return {"ema": self._average}

    @hookimpl
    def on_optimizer_built(self, run: Run, event: OptimizerBuilt) -> None:
        """At the start, and after another plugin has changed the model: what is new begins with its weights."""
        named, old = dict(run.model.named_parameters()), self._average
        fits = {name for name, parameter in named.items() if name in old and old[name].shape == parameter.shape}
        self._average = {name: old[name] if name in fits else named[name].detach().clone() for name in named}
        self._parameters = list(named.values())

    @hookimpl
    def on_checkpoint_loaded(self, run: Run, event: CheckpointLoaded) -> None:
        self._restored = "ema" in event.weight_sets

    @hookimpl
    def on_run_start(self, run: Run, event: RunStart) -> None:
        # Of a new set, also in a run that goes on: it begins with the weights that are there now.
        if not self._restored:
            self._move(1.0)

    @hookimpl
    def on_step_end(self, run: Run, event: StepEnd) -> None:
        updates, rest = divmod(event.step, self.config.every)
        if rest:
            return
        limit = (1 + updates) / (10 + updates) if self.config.warmup else 1.0
        weight = 1 - min(self.config.decay, limit)
        skipped: torch.Tensor | None = getattr(event, "skipped", None)  # not in every version of the trainer
        self._move(weight if skipped is None else ~skipped * weight)

    @torch.no_grad()
    def _move(self, weight: float | torch.Tensor) -> None:
        """Move the average towards the weights by this share of the way."""
        average = list(self._average.values())
        weights = weight if isinstance(weight, float) else [weight.to(tensor.dtype) for tensor in average]
        torch._foreach_lerp_(average, self._parameters, weights)
