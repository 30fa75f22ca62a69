"""The model ``gpt`` as torch.compile makes it on a GPU, for the prediction of memory: stand-ins that keep as much.

Inductor fuses the operations between matrix products and attention. What eager mode keeps of them for the backward pass
is computed again there. What a compiled graph keeps instead was read from the graphs of torch 2.14 on CUDA:

* of a block, the residual stream before and after attention; the operands of its matrix products, which are the
  states after both norms, the attended values and the MLP's hidden units; and the results that a formula reads again:
  queries, keys, values, gate and up. The weights in autocast's dtype are the step's, for all passes;
* of the last norm, its input and its output;
* of the loss, the logits, once and in autocast's dtype. Their gradient takes their place.

A graph of the whole model returns all gradients at its end, whatever the order in which they were computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt_simple.model.attention import Attention
from gpt_simple.model.documents import fits_flex
from gpt_simple.model.gpt import GPT, MLP, Block
from gpt_simple.model.shape import Shape


def stand_in(model: GPT, *, whole: bool) -> None:
    """Replace the blocks and the last norm by ones that compute nothing; ``whole``: the loss, too.

    A model with parts of a plugin stays as it is.
    """
    parts = [type(part) for block in model.blocks for part in (block, block.attention, block.mlp)]
    if type(model) is not GPT or not {*parts} <= {Block, Attention, MLP}:
        return
    for index, block in enumerate(model.blocks):
        model.blocks[index] = _CompiledBlock(model, block, index if whole else None)
    model.add_module("norm", _CompiledNorm(model.norm, whole))
    model.register_forward_pre_hook(_without_mask, with_kwargs=True)
    if whole:
        loss = _CompiledLoss()
        model.register_forward_pre_hook(loss.cast_weight)
        model.set_loss_function(loss)


def _without_mask(model: nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """No documents where flex attention keeps them apart, without a mask. A GPU of fp16 may be too old for it."""
    assert isinstance(model, GPT)
    dtype = _compute_dtype(model.head_weight)
    flex = dtype is torch.bfloat16 and fits_flex(dtype, model.shape.head_dim, model.shape.dropout)
    if not flex:
        return inputs, named
    return inputs[:3], {name: value for name, value in named.items() if name != "document_ids"}


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _CompiledBlock(nn.Module):
    """Has the parameters of ``block``. ``index``: its number in the graph of the model, None for a graph of its own."""

    def __init__(self, model: GPT, block: nn.Module, index: int | None) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.shape, self.index = model.shape, index
        self.recomputes = model.recomputes

    def forward(self, x: Tensor, rotation: object, mask: object, *_: object) -> Tensor:
        recomputed = self.index is not None and self.recomputes(self.index)
        size, tokens = _compute_dtype(x).itemsize, x.shape[0] * x.shape[1]
        if not torch.is_grad_enabled():
            # Two states of the residual stream and what the MLP's activation reads.
            return _keep(x, x.dtype, x.nbytes + tokens * size * _inner(self.shape), 0, self)
        kept = tokens * _kept(self.shape, x.element_size(), size, isinstance(mask, Tensor))
        if isinstance(mask, Tensor) and (not self.index or recomputed):
            kept += size * mask.numel()  # once for a graph, as numbers that are added to the scores
        if self.training and self.shape.dropout:
            kept += 2 * x.numel()  # two masks, of a byte for each element
        work = size * self.shape.intermediate_size  # the gradient of the hidden units
        if recomputed:
            work = max(work, _overlap(self.shape, x.element_size(), size))
        return _keep(x, x.dtype, kept, tokens * work, self)


class _CompiledNorm(nn.Module):
    def __init__(self, norm: nn.Module, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        for name, parameter in norm.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return _keep(x, _compute_dtype(x) if self.whole else x.dtype, 0, 0, self)


def _kept(shape: Shape, residual: int, size: int, dense: bool) -> int:
    """Bytes that a block keeps of a token for its backward pass, beside its input.

    Numbers of the residual stream have ``residual`` bytes, those in matrix products ``size``.
    """
    queries = shape.n_head * shape.head_dim
    keys = queries if dense else shape.n_kv_head * shape.head_dim  # a dense mask has no kernel for grouped heads
    # 16-bit kernels answer in the order of rotated queries, heads first, which the next product cannot read.
    attended = queries * (2 if size < 4 and shape.position == "rope" else 1)
    projected = queries + keys if shape.qk_norm else 0
    matrices = 2 * shape.n_embd + queries + 2 * keys + attended + projected + (_inner(shape) + shape.intermediate_size)
    statistics = 4 + shape.n_head + (shape.n_head + shape.n_kv_head if shape.qk_norm else 0)
    return residual * shape.n_embd + size * matrices + 4 * statistics


def _overlap(shape: Shape, residual: int, size: int) -> int:
    """Bytes of a token that a recomputed block needs beside what is kept: both passes of its attention overlap.

    Measured, in matrices of the width: 5, and for queries and keys each 2, more with rotation. Two gradients of the
    residual stream, which autograd counts, are left out.
    """
    turned = 0 if shape.position == "learned" else 3 if size == 4 else 2
    if turned and shape.qk_norm:
        turned -= 1  # kept anyway
    return size * (5 * shape.n_embd + 2 * (2 + turned) * shape.n_head * shape.head_dim) - 2 * residual * shape.n_embd


def _inner(shape: Shape) -> int:
    """The width of what the MLP's activation reads."""
    return shape.intermediate_size * (2 if shape.gated else 1)


def _keep(x: Tensor, dtype: torch.dtype, kept: int, work: int, module: nn.Module) -> Tensor:
    """An operation on ``x`` that keeps it and ``kept`` bytes, and needs ``work`` bytes more in its backward pass."""
    states: Tensor = _Keep.apply(x, dtype, kept, work, *module.parameters())  # type: ignore[no-untyped-call]
    return states


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, kept: int, work: int, *weights: Tensor) -> Tensor:
        size = x.new_empty(1, dtype=torch.uint8).expand(work)  # has no memory for its elements
        ctx.save_for_backward(x, x.new_empty(kept, dtype=torch.uint8), size, *weights)
        return torch.empty_like(x, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, _, size, *weights = ctx.saved_tensors
        work = x.new_empty(size.shape, dtype=torch.uint8)
        inputs, wanted = (x, *weights), (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        pairs = zip(inputs, wanted, strict=True)
        first, *others = (torch.empty_like(item) if is_wanted else None for item, is_wanted in pairs)
        del work
        return first, None, None, None, *others


class _CompiledLoss:
    """The head's gradient waits in autocast's dtype for the end of the graph: the cast of the weight is made first, so
    that autograd goes back through it last.
    """

    _weight: Tensor | None = None

    def cast_weight(self, model: nn.Module, *_: object) -> None:
        assert isinstance(model, GPT)
        self._weight = model.head_weight.to(_compute_dtype(model.head_weight))

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        cast, self._weight = self._weight, None
        loss: Tensor = _Logits.apply(hidden, cast)  # type: ignore[no-untyped-call]
        return loss


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        states = hidden.to(weight.dtype)
        ctx.save_for_backward(states, weight, states.new_empty(*states.shape[:-1], len(weight)))
        return states.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
        states, weight, _logits = ctx.saved_tensors
        return torch.empty_like(states), torch.empty_like(weight)
