"""Causal self-attention with any number of key/value heads, in one call of ``scaled_dot_product_attention``.

That call stays one opaque kernel under Inductor: the compiler fuses only the code around it, so memory stays linear in
the sequence length. Documents that share a row may have a kernel of their own: see documents.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_simple.model.documents import flex
from gpt_simple.model.linear import Linear
from gpt_simple.model.rope import Rotation, rotate
from gpt_simple.model.shape import Shape

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


_GROUPS_WITH_MASK = torch.version.hip is None and torch.torch_version.TorchVersion(torch.__version__) >= "2.14"
"""Whether torch's memory-efficient CUDA kernel takes a mask and grouped heads together. It took one of them before, and
all scores would be in memory."""


class LayerCache:
    """Keys and values of one layer for the positions seen so far, in buffers that are allocated once."""

    def __init__(self, length: int) -> None:
        self.capacity = length
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[B, n_kv_head, T, head_dim]`` and return all keys and values up to and including them."""
        if self._keys is None or self._values is None:
            size = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(size), values.new_empty(size)
        end = self.length + keys.shape[2]
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class Attention(nn.Module):
    """Multi-head (n_kv_head = n_head), grouped-query or multi-query (n_kv_head = 1) attention.

    Queries, keys and values have separate projections: one fused matrix was slower in eager mode on a CPU,
    and under compilation there is nothing between them to save.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.groups = shape.n_head // shape.n_kv_head
        self.dropout = shape.dropout
        width, kv_width = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
        self.query = Linear(shape.n_embd, width, bias=shape.qkv_bias)
        self.key = Linear(shape.n_embd, kv_width, bias=shape.qkv_bias)
        self.value = Linear(shape.n_embd, kv_width, bias=shape.qkv_bias)
        self.output = Linear(width, shape.n_embd, bias=shape.attn_out_bias)
        self.query_norm = nn.RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None
        self.key_norm = nn.RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None

    def forward(
        self, x: Tensor, rotation: Rotation | None, mask: Tensor | BlockMask | None, cache: LayerCache | None = None
    ) -> Tensor:
        """``[B, T, n_embd]`` to the same shape.

        ``mask``, one of documents.py, replaces the plain causal rule. With a cache, the first call takes the whole
        prompt and each later one a single token.
        """
        rows, length, _ = x.shape
        heads = (rows, length, -1, self.head_dim)
        query = self.query(x).view(heads).transpose(1, 2)
        key = self.key(x).view(heads).transpose(1, 2)
        value = self.value(x).view(heads).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query.float()), self.key_norm(key.float())
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        query, key = query.type_as(value), key.type_as(value)
        if cache is not None:
            key, value = cache.extend(key, value)
        if mask is None or isinstance(mask, Tensor):
            attended = self._attend(query, key, value, mask)
        else:
            attended = flex(query, key, value, mask)
        merged: Tensor = self.output(attended.transpose(1, 2).reshape(rows, length, -1))
        return merged

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        grouped = self.groups > 1
        if grouped and mask is not None and not (mask.is_cuda and _GROUPS_WITH_MASK):
            key, value = key.repeat_interleave(self.groups, 1), value.repeat_interleave(self.groups, 1)
            grouped = False
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and query.shape[2] > 1,
            enable_gqa=grouped,
        )
