"""The peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 1024**3


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
