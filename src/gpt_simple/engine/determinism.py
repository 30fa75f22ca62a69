"""Kernels that add in the same order every time, so that a GPU repeats its bits.

On a CPU they do so anyway, for the same number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from gpt_simple.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE = (":4096:8", ":16:8")
"""The values with which cuBLAS repeats its bits; the first one needs 24 MiB and is the fast one."""


def repeats_bits() -> bool:
    """Whether torch has no kernel in use that adds in any order."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Torch without kernels that add in any order, if ``wanted``; afterwards all is as before.

    An operator that has no other kernel raises RuntimeError. Raises ConfigError if the environment contradicts.
    """
    if not wanted:
        yield
        return
    workspace = os.environ.get(_WORKSPACE, _REPEATABLE[0])
    if workspace not in _REPEATABLE:
        raise ConfigError(
            f"${_WORKSPACE} is {workspace!r}, with which cuBLAS does not repeat its bits",
            key="training.deterministic",
            hint=f"unset it, or set it to {' or '.join(_REPEATABLE)}",
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with patch.dict(os.environ, {_WORKSPACE: workspace}):
        try:
            torch.use_deterministic_algorithms(True)
            # Fills what is about to be overwritten: a help against mistakes, at the cost of a kernel each time.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
