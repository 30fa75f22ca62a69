"""A run small enough to be made many times: 0.03 M parameters, rows of 32 bytes, some milliseconds a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import gpt_simple
from gpt_simple import TrainResult

TINY: dict[str, dict[str, Any]] = {
    "model": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "data": {"source": "stories", "tokenizer": "bytes", "max_length": 32, "max_documents": 200},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    "training": {
        "max_steps": 6,
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "compile": False,
        "gradient_checkpointing": False,
        "logging_steps": 2,
        "eval_steps": None,
        "max_eval_batches": 4,
        "save_steps": None,
    },
}

TinyRun = Callable[..., TrainResult]


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    """Train the tiny run in ``tmp_path / out``; keyword arguments are overrides with ``__`` for the dot."""

    def run(out: str = "run", *, plugins: Sequence[Any] = (), force: bool = False, **overrides: Any) -> TrainResult:
        values: Mapping[str, Any] = {key.replace("__", "."): value for key, value in overrides.items()}
        return gpt_simple.train(
            **TINY,
            overrides={"training.output_dir": str(tmp_path / out), **values},
            plugins=plugins,
            force=force,
        )

    return run


def weights(result: TrainResult) -> dict[str, Tensor]:
    """The weights in a run's last checkpoint."""
    assert result.checkpoint_path is not None
    return load_file(result.checkpoint_path / "model.safetensors")


def state_bytes(result: TrainResult) -> tuple[bytes, bytes]:
    """Model and optimizer of a run's last checkpoint, to the bit."""
    assert result.checkpoint_path is not None
    return tuple((result.checkpoint_path / f"{stem}.safetensors").read_bytes() for stem in ("model", "optimizer"))  # type: ignore[return-value]
