"""Host memory that a GPU copies from and to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key")

_PIECE = 2**26
"""Bytes of the smallest piece of memory that many tensors share."""

_ALIGNMENT = 64


def host_tensor(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """A new tensor without values on the CPU.

    ``pinned``: in page-locked memory, from which copies are faster and do not block. Where the system gives none (WSL
    2, containers, small hosts) it is in ordinary memory, with one warning.
    """
    if pinned:
        try:
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:  # torch.AcceleratorError, which reads like a lack of GPU memory
            reason = str(error).partition("\n")[0]
            warnings.warn(f"no page-locked host memory ({reason}): copies to the GPU are slower", stacklevel=2)
    return torch.empty(shape, dtype=dtype, device="cpu")


def host_tensors(tensors: Mapping[Key, torch.Tensor], *, pinned: bool) -> dict[Key, torch.Tensor]:
    """New tensors without values on the CPU, of the shapes and types of ``tensors``, in few pieces of memory.

    torch rounds every piece of page-locked memory up to a power of two. So the tensors share pieces of such a size, as
    large as the largest of them needs.
    """
    sizes = {key: -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for key, tensor in tensors.items()}
    room = max(_PIECE, 1 << (max(sizes.values(), default=1) - 1).bit_length())
    used: list[int] = []
    places: dict[Key, tuple[int, int]] = {}
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        piece = next((index for index, taken in enumerate(used) if taken + sizes[key] <= room), len(used))
        used += [0] * (piece == len(used))
        places[key] = piece, used[piece]
        used[piece] += sizes[key]
    pieces = [host_tensor((taken,), torch.uint8, pinned=pinned) for taken in used]
    return {key: _at(pieces[piece], offset, tensors[key]) for key, (piece, offset) in places.items()}


def _at(memory: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor in ``memory``. It has a storage of its own: what writes tensors to files tells shared ones by it."""
    if not like.nbytes:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")
    made = torch.frombuffer(memory.numpy(), dtype=like.dtype, count=like.numel(), offset=offset)
    return made.view(like.shape)
