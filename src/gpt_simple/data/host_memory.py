"""Host memory that a GPU copies from and to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch


def host_tensor(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """A new tensor without values on the CPU.

    ``pinned``: in page-locked memory, from which copies are faster and do not block. Where the system gives none (WSL
    2, containers, small hosts) it is in ordinary memory, with one warning.
    """
    if pinned:
        try:
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:  # torch.AcceleratorError, which reads like a lack of GPU memory
            reason = str(error).partition("\n")[0]
            warnings.warn(f"no page-locked host memory ({reason}): copies to the GPU are slower", stacklevel=2)
    return torch.empty(shape, dtype=dtype, device="cpu")
