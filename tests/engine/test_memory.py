"""The peak memory of a process."""

from __future__ import annotations

import pytest
import torch

from gpt_simple.engine.memory import peak_bytes, reset_peak

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_peak_of_a_gpu_is_its_allocated_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {CUDA: 7 << 40}[device])
    assert peak_bytes(CUDA) == 7 << 40
    assert 1 << 20 < peak_bytes(CPU) < 1 << 40


def test_a_peak_that_is_reset_begins_with_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, peak = 3 << 30, {CUDA: 7 << 30}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[device])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update({device: allocated}))
    reset_peak(CPU)
    assert peak_bytes(CUDA) == 7 << 30
    reset_peak(CUDA)
    assert peak_bytes(CUDA) == 3 << 30
