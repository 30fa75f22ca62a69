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
            result = implementation(*arguments)
        except BaseException:
            _put_back(gradients, dtype)
            raise  # what went wrong first is what is told
        if left := _put_back(gradients, dtype):
            raise LeftChanged(f"the process was left with {left}: put back what a hook changes")
        return result

    return guarded


def _put_back(gradients: bool, dtype: torch.dtype) -> str:
    """Restore the state if it is another one now, and say which; empty if it is as it was."""
    if torch.is_grad_enabled() is gradients and torch.get_default_dtype() is dtype:
        return ""
    left = f"gradients {'on' if torch.is_grad_enabled() else 'off'}, dtype {torch.get_default_dtype()}"
    torch.set_grad_enabled(gradients)
    torch.set_default_dtype(dtype)
    return left
