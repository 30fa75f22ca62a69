"""Summed cross-entropy over the vocabulary, the largest tensor of a training step.

The logits of a micro-batch are tokens x vocabulary, often more memory than all else together. Two ways avoid several
float32 copies of them:

* Compiled, the plain formula: Inductor fuses the cast, the log-softmax and its gradient, so that only the matmul's own
  output exists.
* Eager, in chunks, with the gradient computed together with a chunk's logits: no tensor of the size of all logits
  exists and nothing is computed twice. On a CPU it is also faster than the plain formula (by a quarter at a vocabulary
  of 4,096 in float32, by a tenth at 32,768 in bfloat16).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""A label that is not in the loss."""

ROWS_PER_CHUNK = {"cpu": 512, "cuda": 4096}
"""Tokens in a chunk. Each one adds to a gradient of vocabulary size, which fewer rows would not repay."""


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    fused: bool | None = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` in nats, summed over labels that are not ``IGNORED``.

    ``hidden`` is ``[..., C]``, ``weight`` ``[V, C]``, ``labels`` integer ``[...]``. The product runs in
    autocast's dtype, everything after it in float32. Returns a 0-d float32 tensor.

    ``fused`` chooses the plain formula (None: while it is being compiled); ``rows_per_chunk`` is the size of a chunk of
    the other (None: by the device).
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if torch.compiler.is_compiling() if fused is None else fused:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum", ignore_index=IGNORED)
    rows = rows_per_chunk or ROWS_PER_CHUNK.get(hidden.device.type, ROWS_PER_CHUNK["cuda"])
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, rows, None)  # type: ignore[no-untyped-call]
    return loss


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    fused: bool | None = None,
    rows_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum with ``weights``, a factor of each label (float32 ``[...]``), and the sum without, which has no gradient.

    The other arguments are those of ``summed_cross_entropy``. Returns two 0-d float32 tensors.
    """
    hidden, labels, weights = hidden.flatten(0, -2), labels.flatten(), weights.flatten()
    if torch.compiler.is_compiling() if fused is None else fused:
        logits = F.linear(hidden, weight).float()
        nats = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        return (nats * weights).sum(), nats.detach().sum()
    rows = rows_per_chunk or ROWS_PER_CHUNK.get(hidden.device.type, ROWS_PER_CHUNK["cuda"])
    both: tuple[Tensor, Tensor]
    both = _ChunkedCrossEntropy.apply(hidden, weight, labels, rows, weights)  # type: ignore[no-untyped-call]
    return both


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The same number, with the gradients of both factors computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, weights: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            weighted, total = _chunked(ctx, hidden, weight, labels, rows, dtype, weights)
        if weights is None:
            return total
        ctx.mark_non_differentiable(total)
        return weighted, total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scale, *_ = grad_outputs
        # In place: the gradient of the vocabulary is large. A second backward is then refused by autograd's
        # version check, not answered wrongly.
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale),
            None if grad_weight is None else grad_weight.mul_(scale),
            None,
            None,
            None,
        )


def _chunked(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: int,
    dtype: torch.dtype,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum, which is the plain one without ``weights``, and the plain one."""
    cast_weight = weight.to(dtype)
    wants_hidden, wants_weight, *_ = ctx.needs_input_grad
    grad_hidden = torch.empty_like(hidden) if wants_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    weighted = total if weights is None else torch.zeros_like(total)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        inputs, targets = hidden[part].to(dtype), labels[part]
        log_probs = F.linear(inputs, cast_weight).float().log_softmax(-1)
        if weights is None:
            total += F.nll_loss(log_probs, targets, reduction="sum", ignore_index=IGNORED)
        else:
            nats = F.nll_loss(log_probs, targets, reduction="none", ignore_index=IGNORED)
            total += nats.sum()
            weighted += (nats * weights[part]).sum()
        if not (wants_hidden or wants_weight):
            continue
        counted = (targets != IGNORED).unsqueeze(1)
        if weights is not None:
            counted = counted * weights[part].unsqueeze(1).to(dtype)
        index = targets.clamp(min=0).unsqueeze(1)
        # Softmax minus one-hot. Rows without a label are struck out of the narrow factors: cheaper than here.
        grad = log_probs.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=torch.float32)).to(dtype)
        if grad_hidden is not None:
            grad_hidden[part] = (grad @ cast_weight) * counted
        if grad_weight is not None:
            grad_weight += grad.T @ (inputs * counted)
    ctx.save_for_backward(grad_hidden, grad_weight)
    return weighted, total
