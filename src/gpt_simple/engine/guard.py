"""Torch state that all share: a hook or method that leaves it changed has failed, and training never notices.

Put around everything that a plugin is called for (``PluginHost.wrap``). It may switch gradients off, enter autocast or
inference mode, change the default dtype or device, or put the model into evaluation mode; what it does not put back is
put back here and charged to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.utils._device as devices
from torch import (
    autocast_decrement_nesting,
    autocast_increment_nesting,
    get_default_dtype,
    is_grad_enabled,
    is_inference_mode_enabled,
)
from torch._C import _len_torch_function_stack as count_modes

_KINDS = ("cpu", "cuda", "mps", "xpu")
"""Types of devices that autocast is switched on for."""

_KEPT: list[Any] = []
"""Inference modes that were put back: one that is forgotten would undo that."""


class LeftChanged(Exception):
    """A hook returned with another state of torch than it was called with."""


def keeps_torch_state(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``implementation``, which raises LeftChanged after restoring what it left changed."""

    # This runs in every step, so it asks for little: inference mode switches gradients off, so that it takes a question
    # of its own only where they are off already; and `with torch.device(...)` is a mode on a stack.
    @wraps(implementation)
    def guarded(*arguments: Any) -> Any:
        gradients, dtype = is_grad_enabled(), get_default_dtype()
        inference = not gradients and is_inference_mode_enabled()
        device, modes = devices.CURRENT_DEVICE, count_modes()
        model = getattr(arguments[0], "_model", None) if arguments else None
        training = model is not None and model.training
        autocasts = autocast_increment_nesting() - 1
        autocast_decrement_nesting()
        kinds = autocast_kinds() if autocasts else ()
        try:
            result = implementation(*arguments)
        except BaseException:
            _put_back(gradients, dtype, inference, device, modes, autocasts, kinds, model, training)
            raise  # what went wrong first is what is told
        autocast_increment_nesting()
        if (
            autocast_decrement_nesting() != autocasts
            or is_grad_enabled() is not gradients
            or get_default_dtype() is not dtype
            or devices.CURRENT_DEVICE is not device
            or count_modes() != modes
            or (model is not None and model.training is not training)
            or (not gradients and is_inference_mode_enabled() is not inference)
        ) and (left := _put_back(gradients, dtype, inference, device, modes, autocasts, kinds, model, training)):
            raise LeftChanged(f"the process was left with {left}: put back what is changed")
        return result

    return guarded


def _put_back(
    gradients: bool,
    dtype: torch.dtype,
    inference: bool,
    device: torch.device | None,
    modes: int,
    autocasts: int,
    kinds: tuple[str, ...],
    model: torch.nn.Module | None,
    training: bool,
) -> str:
    """Restore what is another one now, and say what that was; empty if nothing is."""
    left = []
    if is_inference_mode_enabled() is not inference:
        left.append(f"inference mode {_word(not inference)}")
        _KEPT.append(torch.inference_mode(inference))
        _KEPT[-1].__enter__()
    elif is_grad_enabled() is not gradients:
        left.append(f"gradients {_word(not gradients)}")
    torch.set_grad_enabled(gradients)
    if (now := get_default_dtype()) is not dtype:
        left.append(f"the default dtype {now}")
        torch.set_default_dtype(dtype)
    if device != devices.CURRENT_DEVICE or count_modes() > modes:
        left.append(f"the default device {torch.get_default_device()}")
        torch.set_default_device(device)
        while count_modes() > modes:
            torch.device("cpu").__exit__(None, None, None)  # leaves what was entered last
    if model is not None and model.training is not training:
        left.append(f"the model in {'evaluation' if training else 'training'} mode")
        model.train(training)
    left += _leave_autocast(autocasts, kinds)
    return ", ".join(left)


def _leave_autocast(autocasts: int, kinds: tuple[str, ...]) -> list[str]:
    depth = autocast_increment_nesting() - 1
    autocast_decrement_nesting()
    if depth == autocasts:
        return []
    for kind in _KINDS:
        torch.set_autocast_enabled(kind, kind in kinds)
    # Weights that were cast are forgotten when the outermost autocast ends; inside one that never does they would stay.
    while depth != autocasts:
        depth = autocast_decrement_nesting() if depth > autocasts else autocast_increment_nesting()
    torch.clear_autocast_cache()
    return ["autocast entered and not left"]


def autocast_kinds() -> tuple[str, ...]:
    """The types of devices that autocast is on for."""
    return tuple(kind for kind in _KINDS if torch.is_autocast_enabled(kind))


def _word(on: bool) -> str:
    return "on" if on else "off"
