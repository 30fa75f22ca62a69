"""Tensors that are sharded over processes: torch's DTensor, whose import takes seconds that other runs do not need."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether this process has only a part of ``tensor``."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Any) -> Tensor:
    """The part of a tensor that this process has, in the same memory: all of it, unless the tensor is sharded."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def whole(tensor: Any) -> Tensor:
    """All of a tensor. If it is sharded, all processes call this together."""
    value: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return value


def part_like(own: Any, tensor: Tensor) -> Tensor:
    """The part of ``tensor``, which is whole, that this process has of ``own``: a view of it."""
    for dimension, placement in enumerate(own.placements if is_sharded(own) else ()):
        if placement.is_shard():
            parts = tensor.chunk(own.device_mesh.size(dimension), placement.dim)
            number = own.device_mesh.get_local_rank(dimension)
            tensor = parts[number] if number < len(parts) else tensor.narrow(placement.dim, 0, 0)
    return tensor


def sharded_like(own: Any, tensor: Tensor) -> Tensor:
    """``tensor``, which is whole, sharded as ``own`` is if both have one shape; else as it is."""
    if not is_sharded(own) or is_sharded(tensor) or tensor.shape != own.shape:
        return tensor
    from torch.distributed.tensor import DTensor

    part = part_like(own, tensor).to(own.device)
    place = {"shape": own.shape, "stride": own.stride(), "run_check": False}
    sharded: Tensor = DTensor.from_local(part, own.device_mesh, own.placements, **place)
    return sharded
