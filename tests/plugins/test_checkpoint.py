"""Which checkpoints are kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpt_simple import Plugin, TrainResult, hookimpl
from gpt_simple.hooks import NoConfig
from gpt_simple.plugins.checkpoint import Checkpoint
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord
from tests.tiny import TinyRun


class Evaluates(Plugin[Any]):
    """Makes the validation loss of each step this number, in weights that are scaled only meanwhile."""

    ranks, on_error, before = "all", "abort", ("evaluate", "checkpoint")

    def __init__(self, losses: dict[int, float]) -> None:
        super().__init__(NoConfig())
        self.losses, self.weights = losses, list[torch.Tensor]()

    @hookimpl
    def evaluate(self, run: Any, event: Any) -> dict[str, Any]:
        self.weights = [parameter.detach().clone() for parameter in run.model.parameters()]
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(self.losses[event.step])
        return {}

    @hookimpl
    def on_eval_end(self, run: Any, event: Any) -> None:
        with torch.no_grad():
            for parameter, weight in zip(run.model.parameters(), self.weights, strict=True):
                parameter.copy_(weight)


def kept(result: TrainResult) -> list[int]:
    return sorted(int(path.name[5:]) for path in (result.output_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(tiny: TinyRun, bad: float) -> None:
    often = {"training__eval_steps": 1, "training__save_steps": 1, "training__keep_last_k": 1}
    losses = {1: bad, 2: 1.0, 3: bad} | dict.fromkeys(range(4, 13), 40.0)
    result = tiny(plugins=[Evaluates(losses)], training__max_steps=8, **often)
    assert kept(result) == [2, 7, 8]
    assert result.summary["best_val_loss"] == RunRecord.load(RunDir(result.output_dir)).val_losses["2"]
    resumed = tiny(plugins=[Evaluates(losses)], training__max_steps=12, **often)
    assert kept(resumed) == [2, 11, 12]
    assert resumed.summary["best_val_loss"] == result.summary["best_val_loss"]


def test_state_of_an_earlier_version_may_hold_a_nan() -> None:
    plugin = Checkpoint(NoConfig())
    plugin.load_state_dict({"losses": {"1": math.nan, "2": 3.0}}, 1)
    assert plugin.state_dict() == {"losses": {"2": 3.0}}
