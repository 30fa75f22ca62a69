"""The peak of memory is that of the run, whatever the process did before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.tiny import TinyRun


class Reset(BaseException):
    """The fake GPU can do no more."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that a run can join and that has nothing but a number."""

    def reset(device: torch.device) -> None:
        raise Reset(str(device))

    answers: dict[str, Any] = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_a_run_resets_the_peak_of_its_gpu(gpu: None, tiny: TinyRun) -> None:
    with pytest.raises(Reset, match=r"^cuda:0$"):
        tiny("run")
