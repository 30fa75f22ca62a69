"""The peak memory of a process."""

from __future__ import annotations

import pytest
import torch

from gpt_simple.engine.memory import peak_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_peak_of_a_gpu_is_its_allocated_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {CUDA: 7 << 40}[device])
    assert peak_bytes(CUDA) == 7 << 40
    assert 1 << 20 < peak_bytes(CPU) < 1 << 40
