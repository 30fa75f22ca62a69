"""The norm of a step's gradients, and whether they were edited."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field

from gpt_simple.checkpoint.sharded import whole
from gpt_simple.errors import PluginError


def total_norm(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The L2 norm of all gradients together, 0-d on their device. Of sharded ones all ranks ask together."""
    return whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


@define(eq=False)
class UneditedNorm:
    """``norm()`` is that of the gradients as they were when this object was made, computed in the first call.

    Raises PluginError if they were edited in between. An edit in place counts up a tensor's version, which is no read
    of the device.
    """

    _parameters: Sequence[torch.nn.Parameter]
    _seen: list[tuple[torch.Tensor | None, int]] = field(init=False)
    _norm: torch.Tensor | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._seen = [(p.grad, 0 if p.grad is None else p.grad._version) for p in self._parameters]

    def __call__(self) -> torch.Tensor:
        if self._norm is None:
            for parameter, (gradient, version) in zip(self._parameters, self._seen, strict=True):
                if parameter.grad is not gradient or (gradient is not None and gradient._version != version):
                    raise PluginError(
                        "event.grad_norm is the norm before any edit, and was read after gradients were edited or used",
                        hint="read it first, in on_gradients, and in a method of the plugin's class",
                    )
            self._norm = total_norm(self._parameters)
            self._seen = []
        return self._norm
