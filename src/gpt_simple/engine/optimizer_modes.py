"""Optimizers that train one set of weights and are evaluated on another: schedule-free ones, and those with an average.

Such an optimizer has methods ``train()`` and ``eval()``, which put the one or the other set into the parameters. Going
there and back rounds, so an evaluation would change training. Here everything is put back to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Attributed = Callable[[Callable[[], Any], str], Callable[[], Any]]
"""Makes a function whose failure names the component and what has failed."""


def has_modes(optimizer: Optimizer) -> bool:
    """Whether the optimizer has weights for training and others for evaluation."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def enter_train_mode(optimizer: Optimizer, attributed: Attributed = lambda function, what: function) -> None:
    """Let a new optimizer train. Some refuse their first step otherwise."""
    if has_modes(optimizer):
        attributed(optimizer.train, "failed in train")()  # type: ignore[attr-defined]


@contextmanager
def evaluation_weights(
    optimizer: Optimizer, attributed: Attributed = lambda function, what: function
) -> Iterator[None]:
    """Inside, the parameters have the weights for evaluation; afterwards they and all state are as before, to the bit.

    Takes memory on the device meanwhile: a copy of the optimizer's parameters, which is what gradients take in a step,
    and of the state that ``eval()`` and ``train()`` write into, which is none in a schedule-free optimizer.
    """
    if not has_modes(optimizer):
        yield
        return
    originals = _Originals(_tensors([vars(optimizer), optimizer.param_groups, optimizer.state]))
    parameters = [(parameter, parameter.detach()) for group in optimizer.param_groups for parameter in group["params"]]
    for _, before in parameters:
        originals.keep(before)
    groups = [dict(group) for group in optimizer.param_groups]
    state = {key: dict(value) if isinstance(value, dict) else value for key, value in optimizer.state.items()}
    try:
        with originals, torch.no_grad():
            attributed(optimizer.eval, "failed in eval")()  # type: ignore[attr-defined]
        yield
    finally:
        try:
            with originals, torch.no_grad():
                attributed(optimizer.train, "failed in train")()  # type: ignore[attr-defined]
        finally:
            with torch.no_grad():
                for parameter, before in parameters:
                    if _memory(parameter) != _memory(before):
                        parameter.set_(before)
                originals.put_back()
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(options)
            for key in [key for key in optimizer.state if key not in state]:
                del optimizer.state[key]
            for key, value in state.items():
                _put_back(optimizer.state, key, value)


def _put_back(state: dict[Any, Any], key: Any, value: Any) -> None:
    if isinstance(value, dict) and isinstance(entry := state.get(key), dict):
        entry.clear()
        entry.update(value)
    else:
        state[key] = value


class _Originals(TorchDispatchMode):
    """Copies a tensor among ``tensors`` just before an operation inside writes into its memory for the first time."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._by_storage: dict[int, dict[int, Tensor]] = {}
        for tensor in tensors:
            self._by_storage.setdefault(_memory(tensor), {})[id(tensor)] = tensor.detach()
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                for leaf in tree_leaves(written):
                    if isinstance(leaf, Tensor):
                        self.keep(leaf)
        return func(*args, **kwargs)

    def keep(self, tensor: Tensor) -> None:
        """Copy what shares memory with ``tensor``, once."""
        storage = _memory(tensor)
        if storage in self._by_storage and storage not in self._kept:
            self._kept[storage] = [(each, each.clone()) for each in self._by_storage[storage].values()]

    def put_back(self) -> None:
        """Write the copies back."""
        for tensor, copy in (pair for kept in self._kept.values() for pair in kept):
            tensor.copy_(copy)


def _memory(tensor: Tensor) -> int:
    """The same number for all tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in containers and in optimizers within each other."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple, Optimizer)) and id(value) not in seen:
        seen.add(id(value))
        inner = vars(value) if isinstance(value, Optimizer) else value
        for item in inner.values() if isinstance(inner, dict) else inner:
            yield from _tensors(item, seen)
