"""The peak memory of a run in this process."""

from __future__ import annotations

import resource
import sys

import torch

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
