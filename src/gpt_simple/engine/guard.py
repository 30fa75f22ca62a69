"""Torch state that belongs to the whole process: a hook that leaves it changed has failed, and training never notices.

Put around every implementation (``PluginHost.wrap``). A plugin may switch gradients off or change the default dtype
inside a hook; what it does not put back is put back here and charged to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


class LeftChanged(Exception):
    """A hook returned with another grad mode or default dtype than it was called with."""


def keeps_torch_state(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``implementation``, which raises LeftChanged after restoring what it left changed."""

    @wraps(implementation)
    def guarded(*arguments: Any) -> Any:
        gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        try:
            return implementation(*arguments)
        finally:
            if torch.is_grad_enabled() is not gradients or torch.get_default_dtype() is not dtype:
                left = f"gradients {'on' if torch.is_grad_enabled() else 'off'}, dtype {torch.get_default_dtype()}"
                torch.set_grad_enabled(gradients)
                torch.set_default_dtype(dtype)
                raise LeftChanged(f"the process was left with {left}: put back what a hook changes")

    return guarded
