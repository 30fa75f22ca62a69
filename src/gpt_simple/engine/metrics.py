"""What is measured between two logging points, without reading the device in between."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from attrs import define, field

from gpt_simple.data.loader import StepData
from gpt_simple.engine.loss_monitor import StepRecord
from gpt_simple.engine.step import StepResult
from gpt_simple.hooks.events import CollectMetrics
from gpt_simple.hooks.results import COLUMNS, Metric

_FOLD_AT = 1024


@define
class MetricBuffer:
    """Losses, gradient norms and skipped steps since the last logging point, as tensors on the device.

    Per step this only keeps references; ``read`` reads the device once.
    """

    _steps: list[tuple[int, int, int, int, int, tuple[str, ...]]] = field(factory=list, init=False)
    """Number, first sample, samples and targets of each step, the length of its vector of requests, and the names of
    the further terms of its loss."""
    _values: list[torch.Tensor] = field(factory=list, init=False)
    """Loss and flag of a gradient that is not finite in turn, of the steps that are not folded yet."""
    _folded: list[torch.Tensor] = field(factory=list, init=False)
    """The same of earlier steps, many in one tensor: a run that never logs must not collect millions."""
    _vectors: list[torch.Tensor] = field(factory=list, init=False)
    """The requests to skip a step and the further terms of its loss, of the steps that have them."""
    _norm: torch.Tensor | None = field(default=None, init=False)

    def add(self, step: int, data: StepData, result: StepResult) -> None:
        """Keep what one optimizer step has left on the device."""
        width = 0
        if result.requests is not None:
            width = len(result.requests)
            self._vectors.append(result.requests)
        if result.terms:
            self._vectors.append(torch.stack([term.float() for term in result.terms.values()]))
        self._steps.append((step, data.first_sample, data.samples, data.targets, width, tuple(result.terms)))
        self._values += result.loss, result.not_finite
        self._norm = result.norm
        if len(self._values) == 2 * _FOLD_AT:
            self._folded.append(torch.stack(self._values))
            self._values = []
            self._vectors = [torch.cat(self._vectors)] if self._vectors else []

    def read(self, learning_rate: float, world_size: int) -> tuple[dict[str, Metric], list[StepRecord]]:
        """The engine's own metrics since the last call, and each step. Call it after at least one step.

        ``train/loss`` is the mean over all target tokens of all processes and of all steps that were not skipped, and
        so is ``train/NAME`` for each further term of the loss.
        """
        assert self._norm is not None
        newest = torch.stack([*self._values, self._norm.float()])
        parts = [*self._folded, newest, *self._vectors]
        numbers = iter((torch.cat(parts) if len(parts) > 1 else newest).tolist())
        pairs = list(islice(numbers, 2 * len(self._steps)))
        norm = next(numbers)
        records, nats, targets = [], 0.0, 0
        terms: dict[str, float] = {}
        for (step, first, samples, count, width, names), loss, spoiled in zip(
            self._steps, pairs[::2], pairs[1::2], strict=True
        ):
            # Every process has about its share of the nats; the count is that of all processes.
            mean = loss * world_size / max(1, count)
            requested = tuple(number > 0 for number in islice(numbers, width))
            skipped = bool(spoiled) or any(requested)
            records.append(StepRecord(step, first, samples, mean, skipped, bool(spoiled), requested))
            values = list(islice(numbers, len(names)))
            if not skipped:
                nats, targets = nats + loss, targets + count
                for name, value in zip(names, values, strict=True):
                    terms[name] = terms.get(name, 0.0) + value
        self._steps, self._values, self._folded, self._vectors, self._norm = [], [], [], [], None
        metrics = {
            "train/loss": Metric(nats / targets if targets else math.nan, reduce="sum"),
            **{f"train/{name}": Metric(value / max(1, targets), reduce="sum") for name, value in terms.items()},
            "train/lr": Metric(learning_rate, reduce="last"),
            "train/grad_norm": Metric(norm, reduce="last"),
            "train/skipped_steps": Metric(sum(record.skipped for record in records), reduce="max"),
        }
        return metrics, records

    def __bool__(self) -> bool:
        return bool(self._steps)


@define
class StepTimer:
    """Time of an interval, with training apart from evaluation, checkpoints and steps that compile."""

    _started: float = field(factory=time.perf_counter)
    waited_before: float = 0.0
    """The loader's total time without data, at the start."""
    _excluded: float = 0.0
    steps: int = 0
    tokens: int = 0
    target_tokens: int = 0
    timed_steps: int = 0
    timed_tokens: int = 0
    timed_flops: float = 0.0

    def step(self, tokens: int, target_tokens: int, flops: float) -> None:
        """Count one optimizer step. ``flops`` are those of the model, 0 where they are unknown."""
        self.steps += 1
        self.timed_steps += 1
        self.tokens += tokens
        self.timed_tokens += tokens
        self.timed_flops += flops
        self.target_tokens += target_tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside from training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - began

    def exclude_step(self, seconds: float, tokens: int, flops: float) -> None:
        """Exclude a step that was counted: the first one with rows of its length compiles and warms caches up."""
        self.timed_steps -= 1
        self.timed_tokens -= tokens
        self.timed_flops -= flops
        self._excluded += seconds

    def split(self, step: int, waited: float) -> tuple[CollectMetrics, StepTimer]:
        """The interval that ends now, and the timer of the next one, so that no time lies between them.

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
            timed_flops=self.timed_flops,
        )
        return ended, StepTimer(started=now, waited_before=waited)


def namespaced(contributions: list[tuple[str, Mapping[str, Metric]]]) -> dict[str, Metric]:
    """The metrics of several plugins under names that keep two plugins apart: ``name@plugin``."""
    return {f"{name}@{owner}": metric for owner, metrics in contributions for name, metric in metrics.items()}


def resolve_name_collisions(values: Mapping[str, float], owners: Sequence[str]) -> dict[str, float]:
    """Names without their owners, the engine's own first, then in the order of ``owners``.

    The first metric of a name keeps it, so a plugin replaces no metric of the engine or of an earlier plugin, and no
    column of a row.
    """
    places = {owner: place for place, owner in enumerate(owners)}
    resolved: dict[str, float] = {}
    for label in sorted(values, key=lambda label: places.get(label.rpartition("@")[2], -1)):
        name = label.rpartition("@")[0] or label
        resolved[label if name in resolved or name in COLUMNS else name] = values[label]
    return resolved
