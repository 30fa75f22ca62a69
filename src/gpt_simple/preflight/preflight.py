"""The parts of a preflight, each from the function that computes it. Nothing here imports torch before it is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import evolve, frozen

from gpt_simple.config.schema import Config, ModelConfig
from gpt_simple.data.plan import BatchPlan
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
from gpt_simple.errors import CheckpointError, ConfigError, DataError, GptSimpleError, system_errors
from gpt_simple.hooks.components import BUILTIN, Component, Registry
from gpt_simple.hooks.preflight import (
    BatchStage,
    CheckedOutput,
    Environment,
    InspectedData,
    MemoryForecast,
    MemoryPrediction,
    PlannedResume,
    PreflightOptions,
    ThroughputEstimate,
)
from gpt_simple.spec import RunSpec

if TYPE_CHECKING:
    from gpt_simple.model.shape import Shape

T = TypeVar("T")


@frozen
class RunPreflight:
    """Implements ``gpt_simple.hooks.preflight.Preflight``.

    Parts stay as they were first computed: after a change, for instance once data are prepared, make a new object.
    """

    _spec: RunSpec
    options: PreflightOptions

    @property
    def config(self) -> Config:
        return self._spec.config

    @property
    def registry(self) -> Registry:
        return self._spec.registry

    @property
    def plugins(self) -> dict[str, str]:
        loaded = self._spec.host.plugins
        return {plugin.name: f"{plugin.distribution} {plugin.version}".strip() for plugin in loaded}

    @property
    def components(self) -> list[Component]:
        return [part for part in self._spec.components if part.owner != BUILTIN]

    def is_default(self, key: str) -> bool:
        return self._spec.origins.is_default(key)

    @property
    def rows_per_step(self) -> int:
        return self._plan.stages[-1].samples

    @property
    def stages(self) -> list[BatchStage]:
        return self._plan.between(1, self.config.training.max_steps)

    def samples_after(self, step: int) -> int:
        return self._plan.samples_after(step)

    def last_step(self, samples: int) -> int:
        return self._plan.last_step(samples)

    @property
    def _plan(self) -> BatchPlan:
        """The plan of the launch; from the first step on if the resume would be refused."""
        world_size = self.options.world_size
        return BatchPlan.of(self.config, world_size=world_size, step=self._steps_over, samples=self.samples_done)

    @property
    def steps_done(self) -> int:
        return self._resume_or_scratch.step

    @property
    def samples_done(self) -> int:
        return self._resume_or_scratch.samples

    @cached_property
    def _resume_or_scratch(self) -> PlannedResume:
        return _unless_refused(lambda: self.resume) or PlannedResume("scratch")

    @property
    def samples(self) -> int:
        return self.samples_after(self.config.training.max_steps)

    @property
    def _steps_over(self) -> int:
        """Of ``training.max_steps``, those that this launch does not make: all of them if the run is complete."""
        resume, steps = self._resume_or_scratch, self.config.training.max_steps
        return steps if resume.kind == "finished" else min(resume.step, steps)

    @cached_property
    def data(self) -> InspectedData:
        from gpt_simple.preflight.data import inspect_data

        with system_errors(DataError):
            return inspect_data(self.config, self.registry)

    @cached_property
    def shape(self) -> Shape | None:
        """The model's numbers; None for a model of a plugin, or while the vocabulary is unknown."""
        from gpt_simple.model.shape import padded, resolve

        model = self.config.model
        if type(model) is not ModelConfig or (model.vocab_size is None and self.data.vocab_size is None):
            return None
        rows = model.vocab_size or padded(self.data.vocab_size or 0)
        return resolve(model, vocab_size=rows, max_length=self.config.data.max_length)

    @cached_property
    def resume(self) -> PlannedResume:
        from gpt_simple.preflight.resume import plan_resume

        with system_errors(CheckpointError):
            return plan_resume(
                self.config, self.registry, self.options, self.plugins, lambda: _unless_refused(lambda: self.data)
            )

    @cached_property
    def output(self) -> CheckedOutput:
        from gpt_simple.preflight.output import check_output

        shape = _unless_refused(lambda: self.shape)
        with system_errors(ConfigError, key="training.output_dir"):
            return check_output(self.config, shape, steps_done=self._steps_over, force=self.options.force)

    @cached_property
    def environment(self) -> Environment:
        from gpt_simple.preflight.environment import check_environment

        with system_errors(GptSimpleError):
            return check_environment(self._spec.host.broken)

    @cached_property
    def _checkpointing(self) -> ActivationCheckpointing:
        """What ``training.gradient_checkpointing`` is in this run; raises what ``memory`` raises."""
        resume = self._resume_or_scratch
        checkpointing = ActivationCheckpointing.of(self.config, resume.gradient_checkpointing)
        if not checkpointing.is_undecided:
            return checkpointing
        from gpt_simple.preflight.activation_checkpointing import decide_for

        return decide_for(self.config, self.registry, self.options, self._vocab_size)

    @property
    def _vocab_size(self) -> int:
        if (size := self.data.vocab_size) is None:
            raise ConfigError("the vocabulary is not known before the data are prepared: set model.vocab_size")
        return size

    @cached_property
    def memory(self) -> MemoryForecast:
        from gpt_simple.preflight.memory import forecast_memory

        return forecast_memory(self.config, self.registry, self.options, self._vocab_size, self._checkpointing)

    @cached_property
    def runtime(self) -> ThroughputEstimate | None:
        from gpt_simple.preflight.runtime import estimate_runtime

        # What cannot be decided is a finding of the memory.
        checkpointing = _unless_refused(lambda: self._checkpointing) or ActivationCheckpointing.of(self.config)
        return estimate_runtime(
            checkpointing.applied(self.config),
            self.registry,
            self.options,
            data=self.data,
            shape=self.shape,
            plan=self._plan,
            checkpoint_bytes=self.output.checkpoint_bytes,
            compile_is_explicit=not self.is_default("training.compile"),
        )

    def check_time_budget(self) -> None:
        from gpt_simple.engine.time_budget import Deadline, TimeBudget
        from gpt_simple.model.flops import parameter_count

        now = time.monotonic()
        deadline = Deadline.of_launch(self.config.training, os.environ, started=now, now=now, clock=time.time())
        shape = _unless_refused(lambda: self.shape)
        if deadline is not None and shape is not None:
            TimeBudget(deadline, first_save_bytes=3 * 4 * parameter_count(shape))

    def predict_memory(self, gradient_checkpointing: bool | int | None = None, **assumptions: Any) -> MemoryPrediction:
        from gpt_simple.preflight.memory import predict_memory

        checkpointing = ActivationCheckpointing.of(self.config)
        if gradient_checkpointing is not None:
            checkpointing = evolve(checkpointing, setting=gradient_checkpointing)
        return predict_memory(checkpointing.applied(self.config), registry=self.registry, **assumptions)


def _unless_refused(part: Callable[[], T]) -> T | None:
    """A part that another one uses; None where the run would refuse it, which is a finding of that part alone."""
    try:
        return part()
    except GptSimpleError:
        return None
