"""What is measured between two logging points, without reading the device in between."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from attrs import define, field

from gpt_simple.data.loader import StepData
from gpt_simple.engine.loss_monitor import StepRecord
from gpt_simple.hooks.events import CollectMetrics
from gpt_simple.hooks.results import Metric

_FOLD_AT = 1024


@define
class MetricBuffer:
    """Losses, gradient norms and skipped steps since the last logging point, as tensors on the device.

    Per step this only keeps references; the device is read, once, when somebody looks.
    """

    _losses: list[torch.Tensor] = field(factory=list)
    _skipped: list[torch.Tensor] = field(factory=list)
    _made: list[tuple[int, int, int, int]] = field(factory=list)
    _folded: list[tuple[torch.Tensor, torch.Tensor]] = field(factory=list)
    _norm: torch.Tensor | None = None

    def add(self, step: int, data: StepData, loss: torch.Tensor, norm: torch.Tensor, skipped: torch.Tensor) -> None:
        """One optimizer step: this process's summed loss in nats, the gradient's norm, 1.0 if it was skipped."""
        self._losses.append(loss)
        self._made.append((step, data.first_sample, data.samples, data.targets))
        self._skipped.append(skipped)
        self._norm = norm
        if len(self._losses) == _FOLD_AT:  # one tensor instead of many, for runs that never look
            self._fold()

    def read(self, learning_rate: float, world_size: int) -> tuple[dict[str, Metric], list[StepRecord]]:
        """The engine's own metrics since the last call, and each step; there must have been one.

        ``train/loss`` is the mean over all target tokens of all processes and of all steps that were not skipped.
        """
        assert self._norm is not None
        if self._folded:
            self._fold()
            losses, skipped = (torch.cat(parts) for parts in zip(*self._folded, strict=True))
            *values, norm = torch.cat([losses, skipped, self._norm.float().reshape(1)]).tolist()
        else:
            *values, norm = torch.stack([*self._losses, *self._skipped, self._norm.float()]).tolist()
        flags = values[len(values) // 2 :]
        steps, nats, targets = [], 0.0, 0
        for (step, first, samples, count), loss, flag in zip(self._made, values, flags, strict=False):
            # Every process has about its share of the nats and knows everybody's targets.
            mean = loss * world_size / max(1, count)
            steps.append(StepRecord(step, first, samples, mean, bool(flag)))
            if not flag:
                nats, targets = nats + loss, targets + count
        self._losses, self._skipped, self._folded, self._made, self._norm = [], [], [], [], None
        metrics = {
            "train/loss": Metric(nats / targets if targets else math.nan, reduce="sum"),
            "train/lr": Metric(learning_rate, reduce="last"),
            "train/grad_norm": Metric(norm, reduce="last"),
            "train/skipped_steps": Metric(sum(flags), reduce="max"),
        }
        return metrics, steps

    def _fold(self) -> None:
        if not self._losses:
            return
        self._folded.append((torch.stack(self._losses), torch.stack(self._skipped)))
        self._losses, self._skipped = [], []

    def __bool__(self) -> bool:
        return self._norm is not None


@define
class StepTimer:
    """Time of an interval, with training apart from evaluation, checkpoints and the first step."""

    _started: float = field(factory=time.perf_counter)
    _excluded: float = 0.0
    steps: int = 0
    tokens: int = 0
    target_tokens: int = 0
    timed_steps: int = 0
    timed_tokens: int = 0
    waited_before: float = 0.0

    def step(self, tokens: int, target_tokens: int) -> None:
        """One optimizer step was made."""
        self.steps += 1
        self.timed_steps += 1
        self.tokens += tokens
        self.timed_tokens += tokens
        self.target_tokens += target_tokens

    def exclude(self, seconds: float) -> None:
        """Time that was not training."""
        self._excluded += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here is not training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.exclude(time.perf_counter() - began)

    def exclude_step(self, seconds: float, tokens: int) -> None:
        """The first step of a process: it compiles and warms caches up."""
        self.timed_steps -= 1
        self.timed_tokens -= tokens
        self._excluded += seconds

    def split(self, step: int, waited: float) -> tuple[CollectMetrics, StepTimer]:
        """The interval that ends now, and the clock of the next one, so that no time lies between them.

        ``waited`` is the loader's total time without data.
        """
        now = time.perf_counter()
        wall = now - self._started
        ended = CollectMetrics(
            step=step,
            steps=self.steps,
            tokens=self.tokens,
            target_tokens=self.target_tokens,
            timed_steps=self.timed_steps,
            timed_tokens=self.timed_tokens,
            train_seconds=max(0.0, wall - self._excluded),
            wall_seconds=wall,
            data_seconds=waited - self.waited_before,
        )
        return ended, StepTimer(started=now, waited_before=waited)


def namespaced(contributions: list[tuple[str, Mapping[str, Metric]]]) -> dict[str, Metric]:
    """What several plugins told, under names that keep two plugins apart: ``name@plugin``."""
    return {f"{name}@{owner}": metric for owner, metrics in contributions for name, metric in metrics.items()}


def resolve_name_collisions(values: Mapping[str, float], owners: Sequence[str]) -> dict[str, float]:
    """Names without their owners, the engine's own first, then in the order of ``owners``.

    Of a name that several tell the first one keeps it; nobody can take one from the engine or from an earlier plugin.
    """
    places = {owner: place for place, owner in enumerate(owners)}
    told: dict[str, float] = {}
    for label in sorted(values, key=lambda label: places.get(label.rpartition("@")[2], -1)):
        name = label.rpartition("@")[0] or label
        told[name if name not in told else label] = values[label]
    return told
