"""A projection whose weight may be cast to autocast's dtype before the forward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """``nn.Linear`` that computes with a cast of its weight while it has one."""

    cast_weight: Tensor | None = None

    def use(self, cast_weight: Tensor | None) -> None:
        """Compute with ``cast_weight``, which is the weight in another dtype, until the next call; None: the weight."""
        self.cast_weight = cast_weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        weight = self.weight if self.cast_weight is None else _cast(self.weight, self.cast_weight)
        return F.linear(x, weight, self.bias)


class _Cast(torch.autograd.Function):
    """``cast``, made from ``weight``, with the gradient of the cast that autocast makes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cast: Tensor) -> Tensor:
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0].float(), None


# Applied in each pass: autograd leaves what was made before a forward pass to the end of its backward pass, and DDP
# would reduce nothing until then.
_cast: Any = _Cast.apply
