"""Find the line that waits for the device.

Reading a tensor on the host (``.item()``, ``float(tensor)``, ``if tensor:``) takes tens of milliseconds on a GPU and
none on a CPU, so a test on a CPU cannot find it by its time. ``no_host_sync`` makes it an error on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostSync(AssertionError):
    """A tensor was read on the host."""


class _RefuseScalars(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``item``, ``float``, ``int`` and ``bool`` of a tensor all call one operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise HostSync("a tensor was read on the host: keep it on the device, or read it in on_metrics")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise HostSync inside, at the line that reads a tensor."""

    def refuse(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            raise HostSync(f"a tensor was read on the host with .{name}()")

        return call

    # These two read memory without an operator, so a dispatch mode does not see them.
    with (
        patch.object(torch.Tensor, "tolist", refuse("tolist")),
        patch.object(torch.Tensor, "numpy", refuse("numpy")),
        _RefuseScalars(),  # type: ignore[no-untyped-call]
    ):
        yield
