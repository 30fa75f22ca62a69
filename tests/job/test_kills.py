"""N short jobs equal one long job, bit for bit, however the short ones ended."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import Metric, hookimpl
from gpt_simple.plugins.evaluate import Evaluate
from tests.children import At, Ended, kill_self, terminate_self
from tests.data.conftest import write_dataset
from tests.tiny import TINY, TinyRun, state_bytes

__all__ = ["write_dataset"]

BUSY: dict[str, Any] = {
    "training__max_steps": 12,
    "training__save_steps": 2,
    "training__eval_steps": 4,
    "training__logging_steps": 1,
    "data__num_workers": 2,
    "model__dropout": 0.1,
}


def killed_often(apart: Callable[..., Ended], kills: int, seed: int, options: Mapping[str, Any]) -> None:
    """Kill a run at a random moment of one of its next steps, again and again; then let it end."""
    dice, reached = random.Random(seed), 0
    for _ in range(kills):
        step = min(reached + dice.randint(1, 4), options["training__max_steps"])
        moments = ["on_step_start", "on_gradients", "on_step_end"]
        if step % options["training__save_steps"] == 0:
            moments.append("on_checkpoint_saving")
        ended = apart("parts", plugins=[At(dice.choice(moments), step, kill_self)], **options)
        assert (ended.code, ended.status.state) == (-9, "crashed")
        reached = max(ended.steps, default=0)
    assert apart("parts", **options).code == 0


def test_a_run_killed_three_times_equals_an_uninterrupted_one(apart: Callable[..., Ended], tiny: TinyRun) -> None:
    whole = tiny("whole", **BUSY)
    killed_often(apart, 3, 1, BUSY)
    assert state_bytes(tiny("parts", **BUSY)) == state_bytes(whole)


@pytest.mark.slow
def test_a_run_killed_twenty_times_equals_an_uninterrupted_one(apart: Callable[..., Ended], tiny: TinyRun) -> None:
    options = BUSY | {"training__max_steps": 40}
    whole = tiny("whole", **options)
    killed_often(apart, 20, 2, options)
    assert state_bytes(tiny("parts", **options)) == state_bytes(whole)


def test_a_run_killed_in_each_stage_equals_a_whole_one(apart: Callable[..., Ended], tiny: TinyRun) -> None:
    stages = [{"steps": 2, "gradient_accumulation_steps": 1, "length": 8}, {"steps": 2, "length": 16}, {"steps": 2}]
    stages[2]["gradient_accumulation_steps"] = 3
    options = BUSY | {"training__warmup_stages": stages, "training__max_steps": 8, "training__save_steps": 1}
    whole = tiny("whole", **options)
    for step in (2, 3, 6, 8):
        assert apart("parts", plugins=[At("on_gradients", step, kill_self)], **options).code == -9
    assert state_bytes(tiny("parts", **options)) == state_bytes(whole)


BUCKETS: dict[str, Any] = {
    "source": "shards",
    "curriculum": [
        {"duration_tokens": 5 * 128, "mix": {"one": 1.0, "two": 2.0}},
        {"duration_tokens": 100 * 128, "mix": {"one": 3.0, "two": 1.0}},
    ],
}
"""The second phase begins after step 5."""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"data__max_documents": 12, "data__val_fraction": 0.2}, id="across epochs"),
        pytest.param(
            {"data__packing": "best_fit", "data__document_mask": True, "data__max_length": 64}, id="packed and masked"
        ),
        pytest.param(BUCKETS, id="across phases of a curriculum"),
        pytest.param(
            {
                "training__compile": True,
                "training__compile_backend": "aot_eager",
                "training__gradient_checkpointing": True,
            },
            id="compiled",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_kill_and_a_stop_change_nothing(
    apart: Callable[..., Ended],
    tiny: TinyRun,
    options: dict[str, Any],
    write_dataset: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if options is BUCKETS:
        dice = random.Random(0)
        documents = [[dice.randrange(256) for _ in range(50)] for _ in range(60)]
        path = write_dataset(train={"one": documents[:30], "two": documents[30:]}, val={"one": documents[:3]})
        for key, value in (BUCKETS | {"path": str(path)}).items():
            monkeypatch.setitem(TINY["data"], key, value)
        options = {}
    options = {"training__max_steps": 14, "training__save_steps": 3, "model__dropout": 0.1} | options
    whole = tiny("whole", **options)
    killed = apart("parts", plugins=[At("on_gradients", 5, kill_self)], **options)
    assert (killed.code, killed.steps) == (-9, [3])
    stopped = apart("parts", plugins=[At("on_gradients", 8, terminate_self)], **options)
    assert (stopped.code, stopped.status.state, stopped.steps) == (75, "stopped", [3, 6, 8])
    rest = tiny("parts", **options)
    assert state_bytes(rest) == state_bytes(whole)


def test_the_best_checkpoint_outlives_a_kill_and_a_finish(
    apart: Callable[..., Ended], tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was written before that evaluation, so what was found is not in it."""

    @hookimpl
    def evaluate(self: Evaluate, run: Any, event: Any) -> dict[str, Metric]:
        return {"eval/loss": Metric(1.0 + abs(event.step - 2)), "eval/bits_per_byte": Metric(1.0)}

    monkeypatch.setattr(Evaluate, "evaluate", evaluate)
    options = {"training__save_steps": 1, "training__eval_steps": 1, "training__keep_last_k": 2}
    assert apart("killed", plugins=[At("on_step_start", 3, kill_self)], **options).code == -9
    tiny("finished", training__max_steps=2, **options)
    for out in ("whole", "killed", "finished"):
        result = tiny(out, **options)
        kept = [path.name for path in sorted((result.output_dir / "checkpoints").iterdir())]
        assert kept == ["step-00000002", "step-00000005", "step-00000006"], out
        assert result.best_val_loss == 1.0, out
        assert json.loads((result.output_dir / "summary.json").read_text())["best_val_loss"] == 1.0
