"""Counts the bytes of all live tensors by category, and records their peak and where it was.

A storage counts from the operation that returns it until it is freed, for fake tensors as for real ones. Memory that a
kernel allocates and frees inside one operation is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporaries", "data", "workspaces")

_CATEGORY_OF_PHASE = {"set-up": "parameters", "data": "data", "forward": "activations"}
"""The category of tensors that are created in a phase; in any other phase they are temporary until they are named."""


class MemoryTracker(TorchDispatchMode):
    """``peaks`` is the most in each phase; the peak's own phase and place (a module) are kept beside it.

    ``granularity``: an allocator hands out multiples of this many bytes (a GPU's: 512).
    """

    def __init__(self, granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase, self.place = "set-up", ""
        self.now, self.peak = 0, 0
        self.peak_phase, self.peak_place = "", ""
        self.peak_by: Mapping[str, int] = {}
        self.peaks: Counter[str] = Counter()
        self.kept = 0
        self._by: Counter[str] = Counter()
        self._granularity = granularity
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 1  # a number that a formula or a branch reads from a fake tensor
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        return result

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self.phase, self.place = phase, ""

    def move_to(self, place: str) -> None:
        """Continue at this module."""
        self.place = place

    def measure_kept(self, module: torch.nn.Module) -> None:
        """Have ``kept`` be the bytes that a forward pass of ``module`` in training leaves, its result among them."""
        before = 0

        def on_entry(*_: object) -> None:
            nonlocal before
            before = self.now

        def on_exit(module: torch.nn.Module, *_: object) -> None:
            if module.training:
                self.kept = self.now - before

        module.register_forward_pre_hook(on_entry)
        module.register_forward_hook(on_exit)

    def name(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Move tensors to another category: their purpose is known only after they were created."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._alive:
                reference, size, before = self._alive[key]
                self._by[before] -= size
                self._by[category] += size
                self._alive[key] = reference, size, category

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        category = _CATEGORY_OF_PHASE.get(self.phase, "temporaries")
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key)), size, category
        self.now += size
        self._by[category] += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)
        if self.now > self.peak:
            self.peak, self.peak_by = self.now, dict(self._by)
            self.peak_phase, self.peak_place = self.phase, self.place

    def _forget(self, key: int) -> None:
        _, size, category = self._alive.pop(key)
        self.now -= size
        self._by[category] -= size
