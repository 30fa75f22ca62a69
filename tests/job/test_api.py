"""``gpt_simple.train`` is polite: it can be called twice and leaves the process as it found it."""

from __future__ import annotations

import copy
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gpt_simple
from gpt_simple import Config, ConfigError, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tests.tiny import TINY, TinyRun, state_bytes


def sections() -> dict[str, Any]:
    return {
        "model": ModelConfig(**TINY["model"]),
        "data": DataConfig(**TINY["data"]),
        "optimizer": OptimizerConfig(**TINY["optimizer"]),
    }


def test_sections_mappings_a_config_and_a_file_are_the_same_run(tmp_path: Path, tiny: TinyRun) -> None:
    expected = state_bytes(tiny("mappings"))
    objects = gpt_simple.train(
        **sections(), training=TrainingConfig(**TINY["training"], output_dir=str(tmp_path / "a"))
    )
    whole = Config(**sections(), training=TrainingConfig(**TINY["training"], output_dir=str(tmp_path / "b")))
    before = copy.deepcopy(whole)
    config = gpt_simple.train(whole)
    assert whole == before
    (tmp_path / "config.toml").write_text(
        '[model]\nn_embd = 32\nn_layer = 2\nn_head = 2\n[data]\nsource = "stories"\n[optimizer]\nlearning_rate = 1e-2\n'
        f'warmup_steps = 2\n[training]\noutput_dir = "{tmp_path / "c"}"\n'
    )
    file = gpt_simple.train(
        tmp_path / "config.toml", data=TINY["data"], training={**TINY["training"], "output_dir": str(tmp_path / "c")}
    )
    assert state_bytes(objects) == state_bytes(config) == state_bytes(file) == expected


def test_the_process_is_as_it_was(tiny: TinyRun) -> None:
    def handler(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    try:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        flags = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
        tiny(model__dropout=0.1, training__eval_steps=2)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert (random.getstate(), np.random.get_state()[1].tolist()) == expected[:2]
        assert torch.equal(torch.get_rng_state(), expected[2])
        assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()) == flags
    finally:
        signal.signal(signal.SIGTERM, before)


def test_two_runs_in_one_process_with_two_precisions(tiny: TinyRun) -> None:
    first = tiny("fp32")
    second = tiny("bf16", training__mixed_precision="bf16")
    third = tiny("fp32 again")
    assert state_bytes(first) == state_bytes(third)
    assert state_bytes(first) != state_bytes(second)


@pytest.mark.slow
def test_many_compiled_runs_in_one_process_stay_compiled(tiny: TinyRun) -> None:
    """Dynamo falls back to eager, silently, when one piece of code has been compiled for too many models."""
    compiled = {"training__compile": True, "training__compile_backend": "aot_eager", "training__max_steps": 1}
    for index in range(10):
        tiny(f"run{index}", **compiled, model__n_embd=16 + 4 * (index % 3), model__n_layer=1, model__n_head=1)
        assert torch._dynamo.utils.counters["unimplemented"] == {}


def test_accelerates_variables_may_not_contradict(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"\$ACCELERATE_MIXED_PRECISION is 'bf16'"):
        tiny()


def test_the_result_describes_the_run(tiny: TinyRun) -> None:
    result = tiny(training__eval_steps=3)
    assert result.total_tokens == 6 * 2 * 2 * 32
    assert result.checkpoint_path is not None
    assert result.checkpoint_path.is_dir()
    assert result.final_loss is not None
    assert result.final_val_loss == result.best_val_loss
    assert result.bits_per_byte is not None
    assert 0 < (result.floor or 0) < result.final_val_loss
    assert (result.status, result.exit_code) == ("completed", 0)


def test_values_of_other_libraries_are_taken(tiny: TinyRun, tmp_path: Path) -> None:
    first = tiny(training__max_steps=np.int64(2), optimizer__learning_rate=np.float32(0.5))
    assert (first.steps, first.status) == (2, "completed")
    other = {"training.output_dir": tmp_path / "branch", "training.resume": first.checkpoint_path}
    sections = {**TINY, "model": {**TINY["model"], "n_embd": np.int32(32)}}
    sections["training"] = {**TINY["training"], "compile": np.bool_(False), "max_steps": 3}
    second = gpt_simple.train(**sections, overrides={**other, "optimizer.learning_rate": np.float32(0.5)})
    assert second.steps == 3
    sections["training"] |= {"output_dir": tmp_path / "other", "resume": second.checkpoint_path, "max_steps": 4}
    assert gpt_simple.train(**sections).steps == 4


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, np.zeros(2)])
def test_a_value_that_is_none_is_one_error(tiny: TinyRun, value: object) -> None:
    with pytest.raises(ConfigError, match=r"training\.max_steps: expected a value of a configuration"):
        tiny(training__max_steps=value)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_callers_device_does_not_matter(tiny: TinyRun, device: str) -> None:
    plain = tiny("plain")
    with torch.device(device):
        within = tiny("within")
        assert torch.empty(0).device.type == device
    assert state_bytes(within) == state_bytes(plain)


def test_standard_output_may_be_any_writer(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        def write(self, text: str) -> None:
            pass

        def flush(self) -> None:
            pass

    monkeypatch.setattr("sys.stdout", Writer())
    assert tiny().status == "completed"
