"""Values of any shape as JSON and tensors: lists, tuples and dictionaries within each other come back as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import _SIZE as STORABLE
from torch import Tensor, nn

from gpt_simple.errors import CheckpointError


def pack(value: object, name: str, tensors: dict[str, Tensor], home: torch.device) -> Any:
    """JSON for ``value``. Its tensors are added to ``tensors`` under names that begin with ``name``.

    ``home`` is the device of the model: a tensor on the host beside it comes back there. Raises CheckpointError for
    what a checkpoint cannot hold.
    """
    if isinstance(value, Tensor):
        add_tensor(value, name, tensors)
        return {"tensor": name, "host": True} if value.device.type == "cpu" != home.type else {"tensor": name}
    if type(value) in (list, tuple):
        items = [pack(item, f"{name}[{index}]", tensors, home) for index, item in enumerate(value)]  # type: ignore[arg-type,var-annotated]
        return {type(value).__name__: items}
    if isinstance(value, dict):
        return {
            "dict": [[plain(key, name), pack(item, f"{name}[{key!r}]", tensors, home)] for key, item in value.items()]
        }
    return plain(value, name)


def unpack(document: Any, tensors: Mapping[str, Tensor], home: torch.device) -> Any:
    """The value that ``pack`` took. Its tensors are copies."""
    if not isinstance(document, Mapping):
        return document
    if "tensor" in document:
        tensor = tensors[document["tensor"]].clone()
        return tensor if document.get("host") else tensor.to(home)
    if "dict" in document:
        return {key: unpack(item, tensors, home) for key, item in document["dict"]}
    ((kind, items),) = document.items()
    return (tuple if kind == "tuple" else list)(unpack(item, tensors, home) for item in items)


def add_tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> None:
    """Add a tensor. Raises CheckpointError for one that a checkpoint cannot hold."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype not in STORABLE:
        kind = f"{tensor.layout} {tensor.dtype} tensor on {tensor.device}".replace("torch.", "")
        raise CheckpointError(f"{name} is a {kind}, which a checkpoint cannot hold")
    if name in tensors:
        raise CheckpointError(f"two tensors have the name {name}")
    tensors[name] = tensor


def plain(value: object, name: str) -> Any:
    """A number, text or None. Raises CheckpointError for anything else."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold",
        hint="keep state as tensors, numbers, text, and lists, tuples and dictionaries of them",
    )


def mark_of(value: object, depth: int = 4) -> Any:
    """What shows that ``value`` has changed, without a copy of its tensors and without reading them."""
    if isinstance(value, nn.Parameter):
        return id(value)
    if isinstance(value, Tensor):
        return id(value), value._version
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if not depth:
        return id(value)
    if isinstance(value, dict):
        return tuple((id(key) if isinstance(key, Tensor) else key, mark_of(v, depth - 1)) for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(mark_of(item, depth - 1) for item in value)
    return id(value), tuple(mark_of(item, depth - 1) for item in _members(value))


def may_be_state(value: object) -> bool:
    """Whether ``value`` is made of plain values, or has a tensor somewhere inside. A cache of functions is no state."""
    if isinstance(value, (list, tuple, dict)):
        items = value.values() if isinstance(value, dict) else value
        return all(map(may_be_state, items)) or _holds_tensor(value)
    return value is None or isinstance(value, (bool, int, float, str)) or _holds_tensor(value)


def _holds_tensor(value: object, depth: int = 4) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    if isinstance(value, dict):
        items = list(value.values())
    else:
        items = list(value) if isinstance(value, (list, tuple)) else _members(value)
    return depth > 0 and any(_holds_tensor(item, depth - 1) for item in items)


def _members(value: object) -> list[object]:
    """The attributes of an object, such as another optimizer, that may hold state."""
    if isinstance(value, (nn.Module, type)) or callable(value):
        return []
    return list(getattr(value, "__dict__", {}).values())
