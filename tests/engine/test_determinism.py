"""training.deterministic: torch's switch and what it needs beside it, restored afterwards; runs repeat their bits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import ConfigError, hookimpl
from tests.children import Everywhere
from tests.tiny import TinyRun


def state() -> list[Any]:
    deterministic: Any = torch.utils.deterministic
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        torch._inductor.config.deterministic,
    ]


class Watch(Everywhere):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.seen = state()


@pytest.mark.parametrize("fails", [False, True])
def test_a_deterministic_run_leaves_torch_as_it_was(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before, watch = state(), Watch()
        if fails:
            with pytest.raises(ConfigError):
                tiny(training__deterministic=True, training__mixed_precision="fp16")
        else:
            tiny(plugins=[watch], training__deterministic=True)
            assert watch.seen == [True, False, False, ":4096:8", True]
        assert state() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_by_default_torch_chooses_the_kernels(tiny: TinyRun) -> None:
    watch = Watch()
    tiny(plugins=[watch])
    assert watch.seen[0] is False


def test_a_workspace_that_does_not_repeat_is_refused(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert tiny(training__deterministic=True).status == "completed"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"training.deterministic: \$CUBLAS_WORKSPACE_CONFIG is ':0:0'"):
        tiny(training__deterministic=True)


def test_the_numerics_record_it(tiny: TinyRun, tmp_path: Path) -> None:
    """A run on a CPU that leaves it out stays as it was."""
    for value in (False, True):
        tiny(training__deterministic=value, training__output_dir=str(tmp_path / str(value)))
        (newest,) = (tmp_path / str(value) / "checkpoints").iterdir()
        numerics = json.loads((newest / "state.json").read_text())["run"]["numerics"]
        assert numerics.get("deterministic") is (True if value else None)
