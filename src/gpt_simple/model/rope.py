"""Rotary positions: each pair of a head's coordinates is turned by an angle that grows with the position.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021). A pair is made of
coordinates ``i`` and ``i + head_dim/2``, the layout of the published Llama weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_simple.model.shape import Shape

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles, broadcastable to ``[B, heads, T, head_dim / 2]``."""


def rotary_tables(shape: Shape) -> Rotation:
    """Cosines and sines of every position: two float32 tensors ``[n_positions, head_dim / 2]`` on the CPU.

    ``linear`` scaling divides positions by the factor (Chen et al., "Extending Context Window of Large Language Models
    via Positional Interpolation", 2023). ``ntk`` raises the base to ``base * factor^(d/(d-2))`` instead, which
    stretches the slowest pair by exactly the factor and leaves the fastest one as it was.
    """
    base, dim = shape.rope_base, shape.head_dim
    positions = torch.arange(shape.n_positions, dtype=torch.float64, device="cpu")
    if shape.rope_scaling_type == "linear":
        positions = positions / shape.rope_scaling_factor
    elif shape.rope_scaling_type == "ntk" and dim > 2:
        base *= shape.rope_scaling_factor ** (dim / (dim - 2))
    pairs = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    angles = torch.outer(positions, base**-pairs)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn ``x`` ``[B, heads, T, head_dim]``. The arithmetic and the result are float32."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
