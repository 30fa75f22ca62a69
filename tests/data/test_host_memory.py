"""Rows and checkpoints are copied also where the host gives no page-locked memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt_simple.data.host_memory import host_tensor


def test_ordinary_memory_where_there_is_no_page_locked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, asked = torch.empty, []

    def refuse(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ...")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.warns(UserWarning, match=r"no page-locked host memory \(CUDA error: out of memory\): copies"):
        tensor = host_tensor((2, 3), torch.int64, pinned=True)
    assert (tuple(tensor.shape), tensor.dtype, asked) == ((2, 3), torch.int64, [True, False])


def test_it_is_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        assert host_tensor((2,), torch.float32, pinned=False).device.type == "cpu"
