"""Torch state that all share: a hook or method that leaves it changed has failed, and training never notices.

Looked at after everything that a plugin is called for (``PluginHost.guard``). It may switch gradients off, enter
autocast or inference mode, change the default dtype or device, or put the model into evaluation mode; what it does not
put back is put back here and charged to it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
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

from gpt_simple.errors import PluginError
from gpt_simple.plugin_host.dispatch import Guard

_KINDS = ("cpu", "cuda", "mps", "xpu")
"""Types of devices that autocast is switched on for."""

_KEPT: list[Any] = []
"""Inference modes that were put back: one that is forgotten would undo that."""


State = tuple[bool, bool, torch.dtype, torch.device | None, int, int, tuple[str, ...], bool | None]


def _look(run: Any) -> State:
    """All that is guarded. Asked for after every call of every plugin, so in as few questions as can be."""
    gradients = is_grad_enabled()
    autocasts = autocast_increment_nesting() - 1
    autocast_decrement_nesting()
    try:
        training = run.model.training
    except (AttributeError, PluginError):  # there is none yet
        training = None
    return (
        gradients,
        False if gradients else is_inference_mode_enabled(),  # it switches gradients off
        get_default_dtype(),
        devices.CURRENT_DEVICE,
        count_modes(),  # `with torch.device(...)` is a mode on a stack
        autocasts,
        autocast_kinds() if autocasts else (),
        training,
    )


def _put_back(run: Any, before: State) -> str:
    """Restore what is another one now, and say what that was; empty if nothing is."""
    gradients, inference, dtype, device, modes, autocasts, kinds, training = before
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
    if training is not None and run.model.training is not training:
        left.append(f"the model in {'evaluation' if training else 'training'} mode")
        run.model.train(training)
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


TORCH_STATE = Guard(_look, _put_back)


@contextmanager
def process_as_found() -> Iterator[None]:
    """Training has torch's usual state, whatever the caller or a plugin's import made of it, which comes back after."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    grad, dtype, matmul = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )
    device, autocasts = devices.CURRENT_DEVICE, autocast_kinds()
    try:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("high")
        if device is not None:
            torch.set_default_device(None)
        for kind in autocasts:
            torch.set_autocast_enabled(kind, False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for kind in autocasts:
            torch.set_autocast_enabled(kind, True)
        if device is not None:
            torch.set_default_device(device)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(matmul)
