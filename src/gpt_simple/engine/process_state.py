"""State that the whole process shares, torch's and signal handlers: a hook or method that leaves it changed has failed.

A plugin may switch gradients off, enter autocast or inference mode, change the default dtype or device, or put the
model into evaluation mode or leave other weights in it, and training would go wrong without an error. It may install
signal handlers, and the run could not be stopped any more. ``Guard`` compares the state after every call of a plugin,
restores what has changed, and counts that as the plugin's failure.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import (
    autocast_decrement_nesting,
    autocast_increment_nesting,
    get_default_dtype,
    is_grad_enabled,
    is_inference_mode_enabled,
)
from torch.overrides import has_torch_function

from gpt_simple.engine.weights import OPEN, undo_exchanges
from gpt_simple.errors import PluginError
from gpt_simple.hooks.batch import Batch
from gpt_simple.hooks.events import BatchReady
from gpt_simple.launch.signals import STOPPING
from gpt_simple.plugin_host.dispatch import Copies, Guard

_KINDS = ("cpu", "cuda", "mps", "xpu")
"""Types of devices that autocast is switched on for."""

_ANY = (None,)
"""``has_torch_function(_ANY)`` is true inside any mode, and a default device is one. It takes a hundredth of the time
of ``get_default_device``."""

_RESTORED: list[torch.inference_mode] = []
"""Inference modes that were entered to undo another one: each ends when its object is deleted."""

Handlers = tuple[Any, ...]

State = tuple[bool, bool, torch.dtype, torch.device | None, bool | None, int, int, tuple[str, ...], Handlers]


def _state(run: Any) -> State:
    """The guarded state. Called after every hook of every plugin, so it reads as little as possible."""
    gradients = is_grad_enabled()
    autocasts = autocast_increment_nesting() - 1
    autocast_decrement_nesting()
    try:
        training = run.raw.training
    except (AttributeError, PluginError):  # there is no run, or it has no model yet
        training = None
    return (
        gradients,
        False if gradients else is_inference_mode_enabled(),  # it switches gradients off
        get_default_dtype(),
        torch.get_default_device() if has_torch_function(_ANY) else None,
        training,
        len(OPEN),
        autocasts,
        _autocast_kinds() if autocasts else (),
        _handlers(),
    )


def _restore(run: Any, before: State) -> str:
    """Restore what has changed, and describe what it was changed to; empty if nothing was."""
    gradients, inference, dtype, device, training, exchanges, autocasts, kinds, handlers = before
    left = []
    if undo_exchanges(exchanges):
        left.append("other weights in the model (run.weights was entered and not left)")
    if is_inference_mode_enabled() is not inference:
        left.append(f"inference mode {_on_off(not inference)}")
        _RESTORED.append(torch.inference_mode(inference))
        _RESTORED[-1].__enter__()
    elif is_grad_enabled() is not gradients:
        left.append(f"gradients {_on_off(not gradients)}")
    torch.set_grad_enabled(gradients)
    if (now := get_default_dtype()) is not dtype:
        left.append(f"the default dtype {now}")
        torch.set_default_dtype(dtype)
    if _default_device() != device:
        left.append(f"the default device {torch.get_default_device()}")
        _restore_device(device)
    if training is not None and run.raw.training is not training:
        left.append(f"the model in {'evaluation' if training else 'training'} mode")
        run.raw.train(training)
    if (_autocast_depth(), _autocast_kinds()) != (autocasts, kinds):
        left.append("autocast entered and not left")
        _restore_autocast(autocasts, kinds)
    if names := _restore_handlers(handlers):
        left.append(f"other handlers of {' and '.join(names)}")
    return ", ".join(left)


def _handlers() -> Handlers:
    # signal.getsignal turns numbers into enums, which takes ten times as long.
    return tuple(map(_signal.getsignal, STOPPING))


def _restore_handlers(before: Handlers) -> list[str]:
    """Restore the handlers of the signals that stop a run, and return the names of those that were changed.

    Only the main thread can change handlers, and only there a plugin may have done so.
    """
    changed = []
    if threading.current_thread() is threading.main_thread():
        for number, now, earlier in zip(STOPPING, _handlers(), before, strict=True):
            if now != earlier and earlier is not None:  # None: not installed from Python, which cannot restore it
                signal.signal(number, earlier)
                changed.append(number.name)
    return changed


def _default_device() -> torch.device | None:
    """The device of ``torch.set_default_device`` or of ``with torch.device(...)``; None where neither is in force."""
    return torch.get_default_device() if has_torch_function(_ANY) else None


def _restore_device(device: torch.device | None) -> None:
    while (now := _default_device()) is not None and now != device:
        torch.device("cpu").__exit__(None, None, None)  # leaves the mode that was entered last
    if device is None or now != device:
        torch.set_default_device(device)


def _autocast_depth() -> int:
    depth = autocast_increment_nesting() - 1
    autocast_decrement_nesting()
    return depth


def _restore_autocast(depth: int, kinds: tuple[str, ...]) -> None:
    for kind in _KINDS:
        torch.set_autocast_enabled(kind, kind in kinds)
    # Cast weights are dropped when the outermost autocast ends; inside one that never does they would stay.
    now = _autocast_depth()
    while now != depth:
        now = autocast_decrement_nesting() if now > depth else autocast_increment_nesting()
    torch.clear_autocast_cache()


def _autocast_kinds() -> tuple[str, ...]:
    """The types of devices that autocast is on for."""
    return tuple(kind for kind in _KINDS if torch.is_autocast_enabled(kind))


def _on_off(on: bool) -> str:
    return "on" if on else "off"


def _with_own_batch(event: BatchReady) -> BatchReady:
    batch = event.batch
    inputs, labels, positions, documents, weights = (None if x is None else x.clone() for x in _tensors(batch))
    assert inputs is not None
    assert labels is not None
    copy = Batch(inputs, labels, positions, documents, batch.first_sample, batch.targets, weights)
    return BatchReady(event.step, event.micro_batch, copy)


def _edited_batch(event: BatchReady) -> str:
    # An edit in place counts up the version. Reading it needs no device.
    return "event.batch" if any(x is not None and x._version for x in _tensors(event.batch)) else ""


def _tensors(batch: Batch) -> tuple[torch.Tensor | None, ...]:
    return batch.input_ids, batch.labels, batch.position_ids, batch.document_ids, batch.weights


TORCH_STATE = Guard(_state, _restore, copies={"on_batch": Copies(_with_own_batch, _edited_batch)})


def _matmul_precision() -> tuple[str, str, str]:
    """The precision of fp32 products in torch's older setting and in its newer ones, of CUDA and of the CPU.

    torch cannot name the older one where a newer one contradicts it. Restoring the newer ones is enough there.
    """
    older = "highest"
    with suppress(RuntimeError):
        older = torch.get_float32_matmul_precision()
    newer = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return older, newer[0].fp32_precision, newer[1].fp32_precision


def _restore_matmul_precision(before: tuple[str, str, str]) -> None:
    torch.set_float32_matmul_precision(before[0])  # changes the newer settings, too
    torch.backends.cuda.matmul.fp32_precision = before[1]
    torch.backends.mkldnn.matmul.fp32_precision = before[2]  # type: ignore[attr-defined]


@contextmanager
def preserved_process_state() -> Iterator[None]:
    """Torch's usual state inside, whatever the caller or a plugin's import has set; afterwards all is as before."""
    python, numpy, matmul = random.getstate(), np.random.get_state(), _matmul_precision()
    kinds = _autocast_kinds()
    modes = is_grad_enabled(), is_inference_mode_enabled()
    places = get_default_dtype(), _default_device(), None, len(OPEN)
    before: State = (*modes, *places, _autocast_depth(), kinds, _handlers())
    try:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("high")
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        # Another device is left only inside the caller's own `with torch.device(...)`.
        device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
        fork = torch.random.fork_rng(range(torch.cuda.device_count()))
        with device, fork, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        _restore(None, before)
        _restore_matmul_precision(matmul)
        random.setstate(python)
        np.random.set_state(numpy)
