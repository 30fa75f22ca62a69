"""Numbers that go wrong: steps that are skipped again and again, losses that jump, weights that are no numbers.

Everything here works on values that were read for the log anyway, so it costs no look at the device. That is also when
a limit is enforced: the steps that were made meanwhile were skipped and have changed no weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from attrs import define, field, frozen

from gpt_simple.hooks.results import Metric

_WARM_UP = 20
"""Steps until a loss can be called unusual."""

_MEMORY = 0.98
"""What a step leaves of the usual loss and its spread: they follow about the last 50 steps."""

_SPREADS = 6.0
_SHARE = 0.1
"""A spike is this many spreads and this share of itself above the usual loss."""


@frozen
class StepRecord:
    """A step as it is known at the next logging point. ``loss`` in nats per target, as this process saw it."""

    step: int
    first_sample: int
    samples: int
    loss: float
    skipped: bool


@frozen
class Spike:
    """A step whose loss was far above the usual one."""

    made: StepRecord
    usual: float
    spread: float

    def __str__(self) -> str:
        return (
            f"the loss of step {self.made.step} was {self.made.loss:.3f}, where {self.usual:.3f} +- {self.spread:.3f}"
            f" is usual ({samples_of([self.made])})"
        )


@define
class LossMonitor:
    """Looks at all steps of a launch, in their order. ``limit`` is ``training.max_skipped_steps``."""

    limit: int | None
    _streak: list[StepRecord] = field(factory=list)
    _usual: float = 0.0
    _spread: float = 0.0
    _seen: int = 0

    def spike(self, steps: Iterable[StepRecord]) -> Spike | None:
        """The highest of the losses that jumped, if any did."""
        spikes = [found for made in steps if not made.skipped and (found := self._compare(made)) is not None]
        return max(spikes, key=lambda spike: spike.made.loss, default=None)

    def streak(self, steps: Iterable[StepRecord]) -> str:
        """Why the run must halt, with the samples to look at; empty if it need not."""
        worst: list[StepRecord] = []
        for made in steps:
            self._streak = [*self._streak, made] if made.skipped else []
            worst = max(worst, self._streak, key=len)
        if self.limit is None or len(worst) < self.limit:
            return ""
        return (
            f"{len(worst)} steps in a row, {worst[0].step} to {worst[-1].step}, were skipped because their gradients"
            f" were not finite ({samples_of(worst)}); look at these samples, or lower optimizer.learning_rate and go on"
        )

    def _compare(self, made: StepRecord) -> Spike | None:
        above = made.loss - self._usual
        limit = max(_SPREADS * self._spread, _SHARE * made.loss)
        spike = Spike(made, self._usual, self._spread) if self._seen >= _WARM_UP and above > limit else None
        # The first steps count as much as they are; one that jumps moves what is usual no further than it is allowed.
        self._seen += 1
        weight = max(1 / self._seen, 1 - _MEMORY)
        moved = limit if spike else above
        self._usual += weight * moved
        self._spread = math.sqrt((1 - weight) * (self._spread**2 + weight * moved**2))
        return spike


def not_finite_on(steps: Iterable[StepRecord], rank: int) -> Metric:
    """The first process whose own loss was no number in a step that was skipped; infinity if it was one in all."""
    seen = any(made.skipped and not math.isfinite(made.loss) for made in steps)
    return Metric(rank if seen else math.inf, reduce="min")


def samples_of(steps: Sequence[StepRecord]) -> str:
    """The samples of steps that follow one another, as they are numbered in the order of the run."""
    return f"samples {steps[0].first_sample} to {steps[-1].first_sample + steps[-1].samples - 1}"


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every element is a number. Reads the device once, or twice if the answer is no."""
    held = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not held:
        return True
    # A sum of numbers may overflow, but one that is finite has only numbers in it, and it takes a fifth of the time.
    if bool(torch.stack([tensor.sum().double() for tensor in held]).isfinite().all()):
        return True
    return bool(torch.stack([tensor.isfinite().all() for tensor in held]).all())
