"""Only finite weights are saved, and a save that fails is tried again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.children import At, full_disk_until
from tests.engine.test_loss_monitor import events
from tests.tiny import TinyRun, weights


def test_weights_that_are_not_finite_are_never_saved(tiny: TinyRun) -> None:
    def break_a_weight(run: Any) -> None:
        next(run.model.parameters()).data[0, 0] = math.nan

    options: dict[str, Any] = {"training__save_steps": 2, "training__max_steps": 10, "training__keep_last_k": 1}
    result = tiny(plugins=[At("on_step_end", 5, break_a_weight)], **options)
    assert (result.status, result.exit_code) == ("halted", 76)
    assert "weights are not finite after step 6" in result.reason
    assert "step-00000004" in result.reason
    assert all(torch.isfinite(tensor).all() for tensor in weights(result).values())
    assert tiny(**options).status == "completed"


def test_a_background_save_checks_the_weights_too(tiny: TinyRun) -> None:
    """Training has gone on when it is found out; then the run halts as it would have."""

    def break_a_weight(run: Any) -> None:
        next(run.model.parameters()).data[0, 0] = math.nan

    options: dict[str, Any] = {"training__save_steps": 2, "training__max_steps": 10, "training__background_save": True}
    result = tiny(plugins=[At("on_step_end", 5, break_a_weight)], **options)
    assert (result.status, result.exit_code) == ("halted", 76)
    assert "weights are not finite" in result.reason
    assert "step-00000004" in result.reason
    assert sorted(path.name for path in (result.output_dir / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    assert tiny(**options).status == "completed"


def test_weights_of_the_last_step_are_checked_too(tiny: TinyRun) -> None:
    def break_a_weight(run: Any) -> None:
        next(run.model.parameters()).data[0, 0] = math.inf

    result = tiny(plugins=[At("on_step_end", 6, break_a_weight)])
    assert (result.status, result.checkpoint_path) == ("halted", None)
    assert "there is no earlier checkpoint" in result.reason


def test_a_full_disk_costs_no_step_and_is_retried(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tiny(
        plugins=[full_disk_until(7, monkeypatch)],
        training__max_steps=20,
        training__save_steps=4,
        training__logging_steps=2,
        training__keep_last_k=None,
    )
    assert result.status == "completed"
    failed = events(result, "checkpoint_failed")
    assert [row["step"] for row in failed] == [4], "logged once, not with every attempt"
    assert "No space left on device; it needs" in failed[0]["message"]
    assert [row["step"] for row in events(result, "checkpoint")] == [8, 12, 16, 20]
