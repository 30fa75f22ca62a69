"""Attention that stays inside documents when several of them share a row.

On a GPU: flex attention, a generated kernel that skips blocks in which no query attends to a key. A row of many
documents costs less than a row of one, and no tensor of the size of all scores exists. It has no backward pass on a
CPU, no dropout, and needs triton, 16-bit numbers and a GPU whose shared memory its tiles fit. Elsewhere: a dense mask
for ``scaled_dot_product_attention``. The kernel of torch for variable lengths is not used: the number of documents is a
size that changes every batch.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gpt_simple.hardware import find_compiler

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Kernel = Literal["flex", "dense mask"]

BLOCK = 128
"""Queries and keys of a block of flex attention; its kernels are tuned for this size."""

SMALLEST_HEAD, LARGEST_HEAD = 16, 128
"""Flex attention has no kernel for narrower heads. The backward pass of wider ones needs more shared memory than the
GPUs of capability 8.6, 8.9 and 12 have (104 of 99 KiB)."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def document_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> Kernel:
    """Which kernel keeps the documents of a row apart on this device, for queries of ``dtype`` and this shape."""
    return "flex" if fits_flex(dtype, head_dim, dropout) and _generates_kernels(device) else "dense mask"


@cache  # below a constant: Dynamo warns of a cache that it traces
def _generates_kernels(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and find_spec("triton") is not None
        and bool(find_compiler(gpu=True)[0])
    )


def fits_flex(dtype: torch.dtype, head_dim: int, dropout: float) -> bool:
    """Whether flex attention has kernels for queries of ``dtype`` and this shape."""
    return dtype.itemsize == 2 and SMALLEST_HEAD <= head_dim <= LARGEST_HEAD and not dropout


def document_mask(document_ids: Tensor, kernel: Kernel) -> Tensor | BlockMask:
    """Where a query attends: to earlier positions of its own document.

    ``document_ids`` is an integer tensor ``[B, T]``; equal ids are one document. The dense mask is bool ``[B, 1, T,
    T]``; the other kind is what ``flex`` takes.
    """
    return block_mask(document_ids) if kernel == "flex" else dense_mask(document_ids)


def dense_mask(document_ids: Tensor) -> Tensor:
    """Bool ``[B, 1, T, T]``, true where a query attends to a key."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (same & (index[:, None] >= index)).unsqueeze(1)


def block_mask(document_ids: Tensor) -> BlockMask:
    """The same rule as blocks: left out, full, or in need of the rule for each element.

    Made from the lowest and the highest id in each block, without anything of size T x T. A block pair whose ranges of
    ids do not meet is left out; if ids rise along a row, as the loader's do, no other is empty.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, length = document_ids.shape
    padding = -length % BLOCK
    last = document_ids[:, -1:].expand(rows, padding)
    blocks = torch.cat([document_ids, last], 1).view(rows, -1, BLOCK)
    lowest, highest = blocks.amin(-1), blocks.amax(-1)
    index = torch.arange(blocks.shape[1], device=document_ids.device)
    meet = (lowest[:, :, None] <= highest[:, None, :]) & (lowest[:, None, :] <= highest[:, :, None])
    seen = meet & (index[:, None] >= index)
    single = lowest == highest
    full = seen & (index[:, None] > index) & single[:, :, None] & single[:, None, :]

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_ids[row, query] == document_ids[row, key]) & (query >= key)

    # BlockMask.from_kv_blocks would sort to find the queries of each key, in kernels that no compiler fuses.
    partial = seen & ~full
    n, k = _listed(torch.stack([partial, full, partial.mT, full.mT]))
    lists = n[0], k[0], n[1], k[1], n[2], k[2], n[3], k[3]
    return BlockMask((length, length), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=rule)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool ``[..., B, Q, K]`` as the number of true ones for each q, and their k first: ``[..., B, 1, Q]`` and
    ``[..., B, 1, Q, K]``.

    The j-th of them is where the count of true ones reaches j. What follows the last one is any k.
    """
    numbers = blocks.sum(-1, dtype=torch.int32).unsqueeze(-2)
    if blocks.shape[-1] == 1:  # Inductor's search takes no constant, as 1 is here
        return numbers, torch.zeros_like(blocks, dtype=torch.int32).unsqueeze(-3)
    counts = blocks.cumsum(-1, dtype=torch.int32)
    wanted = torch.arange(1, blocks.shape[-1] + 1, dtype=torch.int32, device=blocks.device).expand(blocks.shape)
    order = torch.searchsorted(counts, wanted.contiguous(), out_int32=True).clamp_(max=blocks.shape[-1] - 1)
    return numbers, order.unsqueeze(-3)


def flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """``[B, heads, T, head_dim]`` to the same shape; keys and values may have fewer heads."""
    attend: Any = _attend if torch.compiler.is_compiling() else _generated()
    attended: Tensor = attend(query, key, value, mask)
    return attended


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])


@cache
def _generated() -> Any:
    """Eager, flex attention would hold all scores in memory: its kernel is generated also in a model that is not."""
    return torch.compile(_attend, dynamic=False)
