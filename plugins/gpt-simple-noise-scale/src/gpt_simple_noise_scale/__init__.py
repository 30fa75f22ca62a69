"""Measures the gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from attrs import frozen
from typing_extensions import Doc

from gpt_simple import Finding, Metric, Plugin, Run, hookimpl
from gpt_simple.hooks import BatchReady, CheckpointSaving, CollectMetrics, GradientsReady, Preflight, RunStart, StepEnd


@frozen
class NoiseScaleConfig:
    decay: Annotated[float, Ge(0), Lt(1), Doc("share of the running means that a step keeps")] = 0.99


class NoiseScale(Plugin[NoiseScaleConfig]):
    """Each process has its own means of the first of its micro-batches. Nothing is read on the host."""

    Config = NoiseScaleConfig
    ranks = "all"

    def __init__(self, config: NoiseScaleConfig) -> None:
        super().__init__(config)
        self._means = torch.zeros(2)  # of the trace of the gradient's covariance, and of its squared norm
        self._all: torch.Tensor | None = None  # of all processes, [processes, 2], as in the checkpoint
        self._measured, self._targets = False, 0
        self._last = (0, 0)  # step, and target tokens up to its end
        self._small: torch.Tensor | None = None  # squared norms, as the engine has the gradients
        self._whole: torch.Tensor | None = None

    @hookimpl
    def check_config(self, config: Any, preflight: Preflight) -> Sequence[Finding]:
        if all(stage.accumulation < 2 for stage in preflight.stages):
            message = "the noise scale compares a micro-batch with its step, and every step is one micro-batch"
            key, hint = "training.gradient_accumulation_steps", "set it to 2 or more"
            return [Finding("error", "one-micro-batch", message, key, hint)]
        message = "the noise scale is that of the step 'standard'; another may change gradients on the way"
        other = Finding("warning", "another-step", message, "training.step")
        return [] if config.training.step == "standard" else [other]

    @hookimpl
    def check_runtime(self, run: Run, preflight: Preflight) -> Sequence[Finding]:
        message = "the noise scale cannot be measured in fp16, whose gradients are scaled until a step is complete"
        hint = 'set it to "bf16" or "no", or disable the plugin noise_scale'
        scaled = Finding("error", "scaled-gradients", message, "training.mixed_precision", hint)
        return [scaled] if run.facts()["precision"] == "fp16" else []

    @hookimpl
    def on_run_start(self, run: Run, event: RunStart) -> None:
        if (rows := self._all) is not None:
            self._means = rows[run.rank] if len(rows) == run.world_size else rows.mean(0)
        self._means = self._means.to(run.device)

    @hookimpl
    def on_batch(self, run: Run, event: BatchReady) -> None:
        if event.micro_batch == 0:
            self._targets, self._small = event.batch.targets, None
        elif event.micro_batch == 1:
            # Of micro-batch 0 of this process alone: gradients are reduced with the last one.
            gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
            self._small = torch.nn.utils.get_total_norm(gradients).square()

    @hookimpl
    def on_gradients(self, run: Run, event: GradientsReady) -> None:
        self._whole = event.grad_norm.square()

    @hookimpl
    def on_step_end(self, run: Run, event: StepEnd) -> None:
        (step, before), self._last = self._last, (event.step, event.target_tokens)
        few, many = self._targets, event.target_tokens - before
        if self._small is None or self._whole is None or step != event.step - 1 or not 0 < few < many:
            return
        # The engine divides a micro-batch's summed loss by its share of the step's targets, many / world_size.
        small, whole = self._small * (many / (few * run.world_size)) ** 2, self._whole
        trace, square = (small - whole) / (1 / few - 1 / many), (many * whole - few * small) / (many - few)
        means = self._means.lerp(found := torch.stack([trace, square]), 1 - self.config.decay)
        self._means, self._measured = torch.where(found.isfinite().all(), means, self._means), True

    @hookimpl
    def collect_metrics(self, run: Run, event: CollectMetrics) -> Mapping[str, Metric]:
        trace, square = run.comm.sum(self._means)
        scale = torch.where(square > 0, trace / square, torch.nan)
        return {"train/noise_scale": Metric(scale)} if self._measured else {}

    @hookimpl
    def on_checkpoint_saving(self, run: Run, event: CheckpointSaving) -> None:
        mine = torch.arange(run.world_size, device=run.device)[:, None] == run.rank
        self._all = run.comm.sum(torch.where(mine, self._means, 0.0))

    def state_dict(self) -> dict[str, Any]:
        return {"means": self._all, "measured": self._measured, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        self._all, self._measured, self._last = state["means"], state["measured"], tuple(state["last"])
