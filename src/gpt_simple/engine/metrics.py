"""What is measured between two logging points, without reading the device in between."""

from __future__ import annotations

import time
from typing import Any

import torch
from attrs import define, field

from gpt_simple.hooks.events import CollectMetrics, Metric

_FOLD_AT = 1024


@define
class Interval:
    """Losses, gradient norms and skipped steps since the last logging point, as tensors on the device.

    Per step this only appends references; the arithmetic is done when somebody looks.
    """

    _losses: list[torch.Tensor] = field(factory=list)
    _skipped: list[torch.Tensor] = field(factory=list)
    _targets: list[int] = field(factory=list)
    _folded: list[tuple[torch.Tensor, torch.Tensor]] = field(factory=list)
    _norm: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, targets: int, norm: torch.Tensor, skipped: torch.Tensor) -> None:
        """One optimizer step: this process's summed loss in nats, all target tokens, the norm, 1.0 if skipped."""
        self._losses.append(loss)
        self._targets.append(targets)
        self._skipped.append(skipped)
        self._norm = norm
        if len(self._losses) == _FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        losses, skipped = torch.stack(self._losses).double(), torch.stack(self._skipped).double()
        targets = torch.tensor(self._targets, dtype=torch.float64).to(losses.device, non_blocking=True)
        kept = skipped == 0
        zero = torch.zeros_like(losses)
        sums = torch.stack([torch.where(kept, part, zero).sum() for part in (losses, targets)])
        self._folded.append((sums, skipped))
        self._losses, self._targets, self._skipped = [], [], []

    def metrics(self, learning_rate: float) -> dict[str, Metric]:
        """The engine's own metrics; the interval starts anew.

        ``train/loss`` is the mean over all target tokens of all processes and of all steps that were not skipped.
        """
        if self._losses:
            self._fold()
        sums = torch.stack([sums for sums, _ in self._folded]).sum(0)
        skipped = torch.cat([flags for _, flags in self._folded])
        assert self._norm is not None
        metrics = {
            "train/loss": Metric(sums[0] / sums[1], reduce="sum"),
            "train/lr": Metric(learning_rate, reduce="last"),
            "train/grad_norm": Metric(self._norm, reduce="last"),
            "train/skipped_steps": Metric(skipped.sum(), reduce="max"),
            "train/skipped_streak": Metric(_trailing_ones(skipped), reduce="max"),
        }
        self._folded, self._norm = [], None
        return metrics

    def __bool__(self) -> bool:
        return bool(self._losses or self._folded)


def _trailing_ones(flags: torch.Tensor) -> torch.Tensor:
    """How many of the last entries are 1, without a loop or a read."""
    return torch.cumprod(flags.flip(0), 0).sum()


@define
class Clock:
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

    def exclude_step(self, seconds: float, tokens: int) -> None:
        """The first step of a process: it compiles and warms caches up."""
        self.timed_steps -= 1
        self.timed_tokens -= tokens
        self._excluded += seconds

    def lap(self, step: int, waited: float) -> CollectMetrics:
        """The interval that ends now; ``waited`` is the loader's total time without data."""
        wall = time.perf_counter() - self._started
        return CollectMetrics(
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


def flatten(contributions: list[tuple[str, Any]]) -> dict[str, Metric]:
    """One mapping from what several plugins returned; a later plugin does not overwrite an earlier one's name."""
    merged: dict[str, Metric] = {}
    for owner, metrics in contributions:
        for name, metric in metrics.items():
            merged[name if name not in merged else f"{name}@{owner}"] = metric
    return merged
