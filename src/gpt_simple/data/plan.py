"""What each optimizer step reads: a pure function of its number.

A sample is a row of ``data.max_length`` tokens. A stage of ``training.warmup_stages`` changes how many samples a step
has (batch-size warm-up: the accumulation) and into how many rows each of them is cut (sequence-length warm-up). A
micro-batch always has ``per_device_batch_size`` samples, so its number of tokens is the same in all stages. The order
of samples does not depend on the plan, and the position in the data stays one number.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from attrs import frozen

from gpt_simple.config.schema import Config, WarmupStage
from gpt_simple.hooks.preflight import BatchStage


class StepPlan(NamedTuple):
    """One optimizer step: its first sample in the order of samples, and its stage."""

    first_sample: int
    stage: BatchStage


@frozen
class BatchPlan:
    """The plan of a launch that begins after step ``step`` and sample ``samples``.

    A resume may change the plan or the number of processes: it takes the position from the checkpoint, and the plan
    goes on from there. ``stages`` ascend; the last one has no end.
    """

    stages: tuple[BatchStage, ...]
    step: int = 0
    samples: int = 0

    @classmethod
    def of(cls, config: Config, *, world_size: int = 1, step: int = 0, samples: int = 0) -> BatchPlan:
        """The plan of a configuration on ``world_size`` processes."""
        training, max_length = config.training, config.data.max_length
        stages, first_step = [], 1
        for warmup in (*training.warmup_stages, WarmupStage(1)):
            accumulation = warmup.gradient_accumulation_steps or training.gradient_accumulation_steps
            length = warmup.length or max_length
            rows, size = training.per_device_batch_size * max_length // length, accumulation * world_size
            samples_of_step = size * training.per_device_batch_size
            stages.append(BatchStage(first_step, accumulation, rows, length, samples_of_step, size * rows * length))
            first_step += warmup.steps
        return cls(tuple(stages), step, samples)

    def at(self, step: int) -> StepPlan:
        """Step ``step`` of this launch, from ``self.step + 1`` on."""
        for first_step, first_sample, stage, end in self._stretches:
            if end is None or step < end:
                return StepPlan(first_sample + (step - first_step) * stage.samples, stage)
        raise AssertionError("the last stage has no end")

    def stage(self, step: int) -> BatchStage:
        """The stage of ``step``."""
        for stage in reversed(self.stages):
            if stage.first_step <= step:
                return stage
        return self.stages[0]

    def between(self, first_step: int, last_step: int) -> list[BatchStage]:
        """The stages that these steps belong to."""
        ends = [*(stage.first_step for stage in self.stages[1:]), last_step + 1]
        return [s for s, end in zip(self.stages, ends, strict=True) if s.first_step <= last_step and end > first_step]

    def stage_end(self, step: int) -> int | None:
        """The first step after the stage of ``step``; None if it has no end."""
        return next((stage.first_step for stage in self.stages if stage.first_step > step), None)

    def samples_after(self, step: int) -> int:
        """Samples that are consumed after ``step`` steps; those of the launch's beginning for an earlier step."""
        return self.at(step + 1).first_sample if step > self.step else self.samples

    def tokens_between(self, step: int, last_step: int) -> int:
        """Positions of the steps after ``step`` up to ``last_step``, both at or after the launch's beginning."""
        per_sample = self.stages[0].tokens // self.stages[0].samples
        return max(0, self.samples_after(last_step) - self.samples_after(step)) * per_sample

    def last_step(self, total: int) -> int:
        """The last step whose samples are all among the first ``total``; the launch's beginning if none is."""
        for first_step, first_sample, stage, end in self._stretches:
            whole = max(0, total - first_sample) // stage.samples
            if end is None or whole < end - first_step:
                return first_step - 1 + whole
        raise AssertionError("the last stage has no end")

    @cached_property
    def _stretches(self) -> tuple[tuple[int, int, BatchStage, int | None], ...]:
        """The stages from the launch's beginning on: first step, first sample, stage, and the step after the last."""
        found: list[tuple[int, int, BatchStage, int | None]] = []
        step, sample = self.step + 1, self.samples
        for stage, following in zip(self.stages, self.stages[1:], strict=False):
            if (end := following.first_step) > step:
                found.append((step, sample, stage, end))
                step, sample = end, sample + (end - step) * stage.samples
        return *found, (step, sample, self.stages[-1], None)
