"""The stories' floor is exact: an honest model nears it from above, one that sees the future is caught below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt_simple.run_dir.lineage import read_metrics
from tests.tiny import TinyRun

OPTIONS: dict[str, Any] = {
    "data__tokenizer": "bpe",
    "data__tokenizer_vocab_size": 512,
    "data__max_length": 64,
    "data__max_documents": 2000,
    "model__n_embd": 64,
    "optimizer__warmup_steps": 20,
    "training__max_steps": 250,
    "training__per_device_batch_size": 16,
    "training__gradient_accumulation_steps": 1,
    "training__logging_steps": 250,
    "training__eval_steps": 250,
    "training__max_eval_batches": None,
}


@pytest.mark.slow
def test_training_approaches_the_floor_and_leaks_go_below_it(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tiny("honest", **OPTIONS)
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *arguments, **options: attend(*arguments, **{**options, "is_causal": False}),
    )
    leaky = tiny("leaky", **OPTIONS)
    assert honest.floor is not None
    assert leaky.floor == honest.floor
    assert honest.floor < honest.final_val_loss < 2.2 * honest.floor
    assert leaky.final_val_loss < leaky.floor
    events = [row["name"] for row in read_metrics(leaky.output_dir / "metrics.jsonl") if row["kind"] == "event"]
    assert "below_floor" in events
