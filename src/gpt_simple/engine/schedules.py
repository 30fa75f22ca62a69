"""Learning rates as pure functions of the optimizer step.

A schedule holds no state, so it cannot drift at resume, and it advances once per optimizer step whatever the
accumulation and the number of processes. Steps count from 1: step ``warmup_steps`` has the peak rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gpt_simple.config.schema import OptimizerConfig

Schedule = Callable[[int], float]


def cosine(config: OptimizerConfig, max_steps: int) -> Schedule:
    """Linear warm-up, then half a cosine down to the floor, which holds (Loshchilov & Hutter 2017, one cycle)."""
    return _decaying(config, max_steps, lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)))


def linear(config: OptimizerConfig, max_steps: int) -> Schedule:
    """Linear warm-up, then a straight line down to the floor, which holds."""
    return _decaying(config, max_steps, lambda progress: 1.0 - progress)


def wsd(config: OptimizerConfig, max_steps: int) -> Schedule:
    """Warm-up, a stable phase at the peak, then a straight line to the floor (Hu et al. 2024, MiniCPM).

    The decay takes ``decay_steps`` (unset: the last fifth of the run) and ends with ``max_steps``.
    """
    decay = config.decay_steps if config.decay_steps is not None else max(1, max_steps // 5)
    start = max(config.warmup_steps, max_steps - decay)
    return _decaying(config, max_steps, lambda progress: 1.0 - progress, start=start, length=decay)


def constant(config: OptimizerConfig, max_steps: int) -> Schedule:
    """Linear warm-up, then the peak rate for ever."""
    return _decaying(config, max_steps, lambda progress: 1.0)


def _decaying(
    config: OptimizerConfig,
    max_steps: int,
    shape: Callable[[float], float],
    *,
    start: int | None = None,
    length: int | None = None,
) -> Schedule:
    """Warm-up, the peak until ``start``, then ``shape`` (1 at 0, 0 at 1) scaled between peak and floor."""
    peak, floor, warmup = config.learning_rate, config.learning_rate * config.min_lr_ratio, config.warmup_steps
    begin = warmup if start is None else start
    steps = length if length is not None else config.decay_steps or max(1, max_steps - begin)

    def rate(step: int) -> float:
        if step < warmup:
            return peak * step / warmup
        progress = min(1.0, max(0.0, (step - begin) / steps))
        return floor + (peak - floor) * shape(progress)

    return rate
