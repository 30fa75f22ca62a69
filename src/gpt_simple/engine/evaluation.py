"""The mode in which a model is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpt_simple.engine.precision import Precision
from gpt_simple.engine.rng import isolated_rng


@contextmanager
def evaluation_mode(model: torch.nn.Module, precision: Precision, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, autocast and random numbers from ``seed``; afterwards all is as before."""
    was_training = model.training
    model.eval()
    try:
        with isolated_rng(seed, precision.device), torch.no_grad(), precision.autocast():
            yield
    finally:
        model.train(was_training)
