"""Numbers that go wrong: steps that are skipped again and again, losses that jump, weights that are not finite.

The monitor works on values that were read for the log, so it costs no read of the device. A limit is enforced at that
moment too: the steps since were skipped and have changed no weight.
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

NOT_FINITE = "had a non-finite gradient and were skipped"

_SPREADS = 6.0
_SHARE = 0.1
"""A spike is this many spreads and this share of itself above the usual loss."""


@frozen
class StepRecord:
    """A step, read at the next logging point. ``loss`` in nats per target, of this process's targets.

    A step is ``skipped`` because its gradients were ``not_finite``, or because of the plugins that ``requested`` it:
    a flag for each of those that may.
    """

    step: int
    first_sample: int
    samples: int
    loss: float
    skipped: bool
    not_finite: bool
    requested: tuple[bool, ...] = ()


@frozen
class Spike:
    """A step whose loss was far above the usual one."""

    record: StepRecord
    usual: float
    spread: float

    def __str__(self) -> str:
        record = self.record
        return (
            f"the loss of step {record.step} was {record.loss:.3f}, where {self.usual:.3f} +- {self.spread:.3f}"
            f" is usual ({samples_of([record])})"
        )


@define
class LossMonitor:
    """Follows all steps of a launch, in their order. ``limit`` is ``training.max_skipped_steps``."""

    limit: int | None
    _streak: list[StepRecord] = field(factory=list, init=False)
    _usual: float = field(default=0.0, init=False)
    _spread: float = field(default=0.0, init=False)
    _seen: int = field(default=0, init=False)

    def spike(self, records: Iterable[StepRecord]) -> Spike | None:
        """The highest of the losses that jumped, if any did."""
        spikes = [spike for record in records if not record.skipped and (spike := self._compare(record)) is not None]
        return max(spikes, key=lambda spike: spike.record.loss, default=None)

    def streak(self, records: Iterable[StepRecord]) -> str:
        """Why the run must halt, with the samples to inspect; empty if it need not."""
        worst: list[StepRecord] = []
        for record in records:
            self._streak = [*self._streak, record] if record.not_finite else []
            worst = max(worst, self._streak, key=len)
        if self.limit is None or len(worst) < self.limit:
            return ""
        return (
            f"{len(worst)} steps in a row, {worst[0].step} to {worst[-1].step}, were skipped because their gradients"
            f" were not finite ({samples_of(worst)}); inspect these samples, or lower optimizer.learning_rate and go on"
        )

    def _compare(self, record: StepRecord) -> Spike | None:
        if not math.isfinite(record.loss):
            return None  # the usual loss would never be finite again
        above = record.loss - self._usual
        limit = max(_SPREADS * self._spread, _SHARE * record.loss)
        spike = Spike(record, self._usual, self._spread) if self._seen >= _WARM_UP and above > limit else None
        # The first steps have equal weight. A spike moves the usual loss no further than the limit.
        self._seen += 1
        weight = max(1 / self._seen, 1 - _MEMORY)
        moved = limit if spike else above
        self._usual += weight * moved
        self._spread = math.sqrt((1 - weight) * (self._spread**2 + weight * moved**2))
        return spike


def causes_of_skips(records: Iterable[StepRecord], plugins: Sequence[str]) -> dict[str, int]:
    """The number of skipped steps for each cause. ``plugins`` are those of ``StepRecord.requested``."""
    counts = {NOT_FINITE: 0}
    for record in records:
        if record.skipped:
            cause = NOT_FINITE
            if not record.not_finite:
                names = [name for name, asked in zip(plugins, record.requested, strict=True) if asked]
                several = "s" if len(names) > 1 else ""
                cause = f"were skipped because the plugin{several} {' and '.join(names)} asked for it"
            counts[cause] = counts.get(cause, 0) + 1
    return {cause: count for cause, count in counts.items() if count}


def not_finite_on(records: Iterable[StepRecord], rank: int) -> Metric:
    """The lowest rank whose own loss was not finite in a step that was skipped for it; infinity if there is none."""
    here = any(record.not_finite and not math.isfinite(record.loss) for record in records)
    return Metric(rank if here else math.inf, reduce="min")


def samples_of(records: Sequence[StepRecord]) -> str:
    """The samples of consecutive steps, numbered in the order of the run."""
    return f"samples {records[0].first_sample} to {records[-1].first_sample + records[-1].samples - 1}"


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every element is finite. Reads the device once, or twice if a sum is not."""
    held = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not held:
        return True
    # A finite sum has finite elements only, and takes a fifth of the time. Finite elements may still overflow.
    if bool(torch.stack([tensor.sum().double() for tensor in held]).isfinite().all()):
        return True
    return bool(torch.stack([tensor.isfinite().all() for tensor in held]).all())
