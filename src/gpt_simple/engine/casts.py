"""Weights in autocast's type, cast once a step: for all micro-batches, and for what checkpointing computes twice.

They take 2 bytes for each parameter of a projection during the forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from attrs import define, field

from gpt_simple.checkpoint.sharded import is_sharded
from gpt_simple.model.linear import Linear


@define(eq=False)
class WeightCasts:
    """The projections of a model whose weights are cast to ``dtype``.

    ``keeps``: the casts of all steps are in the same memory, from which CUDA graphs read them. Otherwise it is free
    between the passes of one step and of the next.
    """

    layers: Sequence[Linear]
    dtype: torch.dtype
    keeps: bool = False
    _kept: list[torch.Tensor] = field(factory=list, init=False)

    @classmethod
    def of(cls, model: torch.nn.Module, dtype: torch.dtype | None, *, keeps: bool = False) -> WeightCasts:
        """All projections of float32 weights that are trained; none without a ``dtype``."""
        layers = () if dtype is None else (layer for layer in model.modules() if isinstance(layer, Linear))
        return cls([layer for layer in layers if _is_cast(layer.weight)], dtype or torch.float32, keeps)

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Passes with the casts, and none of them afterwards."""
        try:
            self.renew()
            yield
        finally:
            self.drop()

    def renew(self) -> None:
        """Cast the weights as they are now, for the passes that follow."""
        if self.layers:
            weights = [layer.weight.detach() for layer in self.layers]
            casts = self._kept or [torch.empty_like(weight, dtype=self.dtype) for weight in weights]
            self._kept = casts if self.keeps else []
            torch._foreach_copy_(casts, weights)
            for layer, cast in zip(self.layers, casts, strict=True):
                layer.use(cast)

    def drop(self) -> None:
        """Let the projections compute with their weights."""
        for layer in self.layers:
            layer.use(None)


def _is_cast(weight: torch.Tensor) -> bool:
    # FSDP2 casts what is sharded by its own policy.
    return weight.requires_grad and weight.dtype == torch.float32 and not is_sharded(weight)
