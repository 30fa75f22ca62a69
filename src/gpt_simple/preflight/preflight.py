"""``gpt_simple.outlook(config)``: the facts that a check needs beyond the configuration, without torch.

A check that is called for a run or by ``gpt-simple validate`` sees that run's components and origins; called by hand it
sees the built-in ones. Every part is looked at when it is asked for, and raises what the run would raise.
"""

from __future__ import annotations

import os
import time
from functools import cached_property
from typing import TYPE_CHECKING

from attrs import field, frozen

from gpt_simple.config.schema import Config
from gpt_simple.errors import GptSimpleError
from gpt_simple.hooks.components import BUILTIN, Component, Registry, builtin_registry
from gpt_simple.spec import Assembly, Questions, under_check

if TYPE_CHECKING:
    from gpt_simple.model.shape import Shape
    from gpt_simple.preflight.data import DataOutlook
    from gpt_simple.preflight.environment import Environment
    from gpt_simple.preflight.memory import MemoryForecast
    from gpt_simple.preflight.output import OutputOutlook
    from gpt_simple.preflight.resume import ResumeOutlook
    from gpt_simple.preflight.runtime import ThroughputEstimate


def outlook(config: Config) -> Outlook:
    """What there is to know before a run of ``config``."""
    asked = under_check()
    assembly, questions = asked if asked is not None else (None, Questions())
    return Outlook(config, questions, assembly)


@frozen
class Outlook:
    """The facts about a run that has not started. Parts raise GptSimpleError for what the run would refuse."""

    config: Config
    questions: Questions
    _assembly: Assembly | None = field(default=None, repr=False)

    @property
    def registry(self) -> Registry:
        """The components that the configuration can choose from."""
        return self._assembly.registry if self._assembly is not None else builtin_registry()

    @property
    def plugins(self) -> dict[str, str]:
        """The plugins that the run loads, in call order, each with its distribution and version."""
        loaded = self._assembly.host.plugins if self._assembly is not None else ()
        return {plugin.name: f"{plugin.distribution} {plugin.version}".strip() for plugin in loaded}

    @property
    def components(self) -> list[Component]:
        """The chosen parts that plugins bring."""
        chosen = self._assembly.components if self._assembly is not None else ()
        return [part for part in chosen if part.owner != BUILTIN]

    def is_default(self, key: str) -> bool:
        """Whether nobody set this dotted key."""
        return self._assembly is None or self._assembly.origins.is_default(key)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all micro-batches and processes."""
        training = self.config.training
        per_process = training.per_device_batch_size * training.gradient_accumulation_steps
        return per_process * self.questions.world_size

    @cached_property
    def data(self) -> DataOutlook:
        """The data as far as they can be known without reading them. Raises DataError or ConfigError."""
        from gpt_simple.preflight.data import look

        return look(self.config, self.registry)

    @cached_property
    def shape(self) -> Shape | None:
        """The model's numbers; None for a model of a plugin, or while the vocabulary is unknown."""
        from gpt_simple.config.schema import ModelConfig
        from gpt_simple.model.shape import padded, resolve

        model = self.config.model
        if type(model) is not ModelConfig or (model.vocab_size is None and self.data.vocab_size is None):
            return None
        rows = model.vocab_size or padded(self.data.vocab_size or 0)
        return resolve(model, vocab_size=rows, max_length=self.config.data.max_length)

    @cached_property
    def resume(self) -> ResumeOutlook:
        """What the run would start from. Raises CheckpointError."""
        from gpt_simple.preflight.resume import look

        return look(self)

    @property
    def done(self) -> tuple[int, int]:
        """Steps and samples that were made before; none where the run would be refused."""
        try:
            return self.resume.step, self.resume.samples
        except GptSimpleError:
            return 0, 0  # a finding of its own

    @property
    def samples(self) -> int:
        """Samples of the run from its first step on, those of another batch before it goes on included."""
        step, samples = self.done
        return samples + max(0, self.config.training.max_steps - step) * self.rows_per_step

    def check_budget(self) -> None:
        """Raise ConfigError for a time budget that the run would refuse, as far as the model's size is known here."""
        from gpt_simple.engine.time_budget import Deadline, TimeBudget
        from gpt_simple.model.flops import parameter_count

        now = time.monotonic()
        deadline = Deadline.of_launch(self.config.training, os.environ, started=now, now=now, clock=time.time())
        try:
            shape = self.shape
        except GptSimpleError:
            return  # a finding of its own
        if deadline is not None and shape is not None:
            TimeBudget(deadline, first_save_bytes=3 * 4 * parameter_count(shape))

    @cached_property
    def output(self) -> OutputOutlook:
        """Where the run would write and how much. Raises ConfigError or CheckpointError."""
        from gpt_simple.preflight.output import look

        return look(self)

    @cached_property
    def environment(self) -> Environment:
        """What package metadata, the environment's variables and the system tell of this machine."""
        from gpt_simple.preflight.environment import look

        return look(self._assembly.host.broken if self._assembly is not None else ())

    @cached_property
    def memory(self) -> MemoryForecast:
        """The predicted peak of one process; imports torch."""
        from gpt_simple.preflight.memory import forecast

        return forecast(self)

    @cached_property
    def pace(self) -> ThroughputEstimate | None:
        """How fast the run would be: measured with ``probe`` (imports torch), estimated for a known device, or None."""
        from gpt_simple.preflight.runtime import look

        return look(self)
