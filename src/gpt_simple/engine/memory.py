"""The memory of a run in this process: its peak, and what a checkpoint holds."""

from __future__ import annotations

import resource
import sys

import torch

from gpt_simple.engine.optimizer_modes import has_modes

GIB = 1024**3


def reset_peak(device: torch.device) -> None:
    """Let a GPU's peak begin anew, with what is allocated now. The system counts a process's resident set once only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory used: allocated on a GPU since ``reset_peak``, else the process's resident set so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors of the optimizer's state, once there was a step."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, torch.Tensor)]


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a checkpoint's tensors, once there was a step; those of plugins are left out."""
    weights = model.state_dict(keep_vars=True).values()
    distinct = {id(tensor): tensor for tensor in (*weights, *optimizer_tensors(optimizer))}
    size = sum(tensor.nbytes for tensor in distinct.values() if isinstance(tensor, torch.Tensor))
    evaluated = model.parameters() if has_modes(optimizer) else ()
    return size + sum(parameter.nbytes for parameter in evaluated)
