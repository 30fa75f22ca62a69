"""Predicted memory of compiled runs against the peaks of torch's allocator on a GPU that computes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from gpt_simple.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.hooks.preflight import MemoryPrediction
from gpt_simple.model.gpt import GPT, MLP
from gpt_simple.model.gpt import build as build_gpt
from gpt_simple.preflight.memory import predict_memory

MIB = 2**20


def configured(
    layers: int = 2,
    rows: int = 4,
    length: int = 1024,
    checkpointing: bool | int = False,
    documents: bool = False,
    scope: Any = "model",
    backend: str = "inductor",
    width: int = 768,
    **model: Any,
) -> Config:
    return Config(
        model=ModelConfig(n_embd=width, n_head=width // 64, n_layer=layers, **model),
        data=DataConfig(max_length=length, document_mask=documents),
        training=TrainingConfig(
            per_device_batch_size=rows,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            compile_scope=scope,
            compile_backend=backend,
        ),
    )


def predicted(config: Config, precision: str = "bf16", **options: Any) -> MemoryPrediction:
    options = {"vocab_size": 50257, "compiled": True, "cuda": True, "workspaces": 0} | options
    return predict_memory(config, precision=precision, **options)


GPT2: dict[str, Any] = {"norm": "layernorm", "mlp_type": "mlp", "position": "learned", "activation": "gelu"}

PEAKS: dict[str, tuple[dict[str, Any], str, float, float]] = {
    "checkpointing": ({"checkpointing": True}, "bf16", 1412.8, 1432.8),
    "no checkpointing": ({}, "bf16", 1624.3, 1637.3),
    "fp32": ({}, "no", 2055.7, 2171.3),
    "blocks count": ({"rows": 16, "vocab_size": 512, "checkpointing": True}, "bf16", 1052.3, 1105.8),
    "blocks count, fp32": ({"rows": 16, "vocab_size": 512, "checkpointing": True}, "no", 1769.3, 1799.6),
    "GPT-2": (GPT2 | {"use_bias": True, "rows": 16, "vocab_size": 512}, "bf16", 1269.0, 1358.4),
    "weights count": ({"rows": 1, "length": 256, "checkpointing": True, "layers": 12}, "bf16", 2776.9, 2857.6),
    "every second block, grouped heads": (
        {"rows": 16, "vocab_size": 512, "checkpointing": 2, "layers": 3, "n_kv_head": 4},
        "bf16",
        1418.2,
        1577.4,
    ),
    "document mask": (
        {"rows": 16, "vocab_size": 512, "checkpointing": True, "documents": True},
        "bf16",
        1032.3,
        1114.1,
    ),
    "dense document mask": ({"rows": 16, "vocab_size": 512, "documents": True}, "no", 2087.6, 2092.8),
    "scope blocks": ({"scope": "blocks", "checkpointing": True}, "bf16", 2700.0, 2703.4),
    "narrow": (
        {"width": 256, "layers": 3, "rows": 16, "length": 256, "vocab_size": 512, "checkpointing": True},
        "bf16",
        121.3,
        123.5,
    ),
}
"""Changes, precision, and MiB measured by tests/nullgpu/peaks.py and predicted."""


@pytest.mark.parametrize("name", PEAKS)
def test_a_peak_is_at_most_15_percent_below_the_prediction(name: str) -> None:
    changes, precision, measured, pinned = PEAKS[name]
    peak = predicted(configured(**changes), precision).training_peak / MIB
    assert measured <= peak <= 1.15 * measured
    assert peak == pytest.approx(pinned, abs=0.1)


def test_a_backend_without_fusion_has_the_old_bound() -> None:
    changes: dict[str, Any] = {"width": 64, "layers": 1, "length": 64}
    fused, plain = (predicted(configured(backend=backend, **changes)).peak for backend in ("inductor", "aot_eager"))
    assert plain > 1.3 * fused


def test_a_model_with_a_part_of_a_plugin_counts_that_part() -> None:
    class Wide(MLP):
        pass

    def build(config: ModelConfig, *, vocab_size: int, max_length: int) -> GPT:
        model = build_gpt(config, vocab_size=vocab_size, max_length=max_length)
        for block in model.blocks:
            block.add_module("mlp", Wide(evolve(model.shape, intermediate_size=8192)))
        return model

    registry = builtin_registry()
    registry.add("model", "wide", build)
    config = configured(width=64, layers=2, length=64)
    wide = evolve(config, model=evolve(config.model, name="wide"))
    plain, own = (predicted(each, vocab_size=257, registry=registry) for each in (config, wide))
    assert own.by_category["gradients"] > 5 * plain.by_category["gradients"]
    assert own.peak - own.by_category["gradients"] > plain.peak


def test_the_gradients_of_a_compiled_model_come_together() -> None:
    config = configured(width=256, layers=4, length=64, rows=1)
    eager, compiled = (predicted(config, vocab_size=257, compiled=value) for value in (False, True))
    size = eager.by_category["parameters"]
    # Weights, two moments, and the gradients of both micro-batches.
    assert eager.by_phase["backward"] - eager.by_category["data"] < 5 * size < compiled.by_phase["backward"]
    assert sum(compiled.by_category.values()) == compiled.peak == max(compiled.by_phase.values())
