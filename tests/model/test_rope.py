"""Rotary positions and the two ways of stretching them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt_simple.config.schema import ModelConfig
from gpt_simple.model.rope import rotary_tables, rotate
from gpt_simple.model.shape import resolve


def tables(**fields: Any) -> tuple[Tensor, Tensor]:
    config = ModelConfig(n_embd=32, n_head=4, **fields)
    return rotary_tables(resolve(config, vocab_size=10, max_length=64))


def angles(**fields: Any) -> Tensor:
    """What position 1 turns each of the 4 pairs by."""
    cos, sin = tables(**fields)
    return torch.atan2(sin[1], cos[1])


def test_scores_depend_on_the_distance_alone() -> None:
    cos, sin = tables()
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator).unbind(0)
    scores = {
        (a - b): [
            (rotate(query, (cos[m], sin[m])) * rotate(key, (cos[n], sin[n]))).sum()
            for m, n in [(a, b), (a + 20, b + 20)]
        ]
        for a, b in [(3, 3), (9, 4), (30, 2)]
    }
    for near, far in scores.values():
        torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-5)
    assert len({round(near.item(), 3) for near, _ in scores.values()}) == 3


def test_linear_scaling_makes_every_pair_slower_by_the_factor() -> None:
    stretched = angles(rope_scaling_type="linear", rope_scaling_factor=4.0)
    torch.testing.assert_close(stretched, angles() / 4)


def test_ntk_scaling_stretches_only_the_slow_pairs() -> None:
    ratio = angles() / angles(rope_scaling_type="ntk", rope_scaling_factor=4.0)
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([1.0, 4.0]))
    assert (ratio.diff() > 0).all()


def test_ntk_scaling_of_a_single_pair_has_nothing_to_stretch() -> None:
    config = ModelConfig(n_embd=8, n_head=4, rope_scaling_type="ntk", rope_scaling_factor=4.0)
    cos, _ = rotary_tables(resolve(config, vocab_size=10, max_length=4))
    torch.testing.assert_close(cos[1], torch.ones(1).cos())


def test_late_positions_are_as_exact_as_early_ones() -> None:
    config = ModelConfig(n_embd=32, n_head=4, n_positions=1_000_000)
    cos, _ = rotary_tables(resolve(config, vocab_size=10, max_length=8))
    exact = torch.tensor(999_999.0, dtype=torch.float64).cos()
    torch.testing.assert_close(cos[-1, 0].double(), exact, atol=1e-6, rtol=0)
