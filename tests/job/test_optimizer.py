"""The optimizer as plugins meet it: the hook, the rates of its groups, and what a checkpoint keeps of both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpt_simple import Plugin, PluginError, TrainResult, hookimpl
from gpt_simple.run_dir.lineage import read_metrics
from tests.tiny import TinyRun, state_bytes


class Everywhere(Plugin[Any]):
    """A plugin of a test: whatever goes wrong in it ends the run."""

    ranks = "all"
    on_error = "abort"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)


class StopAfter(Everywhere):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == self.step:
            run.control.stop("enough")


class ScalesVectors(Everywhere):
    """The rate of gains and biases is multiplied by ``scale``, and by ``later`` after step ``at``."""

    def __init__(self, scale: object, at: int = 0, later: float = 1.0) -> None:
        super().__init__()
        self.scale, self.at, self.later = scale, at, later
        self.rates: list[list[float]] = []
        self.steps: list[int] = []

    @hookimpl
    def on_optimizer_built(self, run: Any, event: Any) -> None:
        assert run.optimizer is event.optimizer
        event.optimizer.param_groups[1]["lr_scale"] = self.scale
        self.steps.append(event.step)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.rates.append([group["lr"] for group in run.optimizer.param_groups])
        if event.step == self.at:
            run.optimizer.param_groups[1]["lr_scale"] = self.later


def document(result: TrainResult) -> Any:
    assert result.checkpoint_path is not None
    return json.loads((result.checkpoint_path / "state.json").read_text())


def test_a_group_has_the_rate_of_the_schedule_times_its_scale(tiny: TinyRun) -> None:
    plugin = ScalesVectors(0.25)
    result = tiny(plugins=[plugin], training__logging_steps=1)
    logged = [row["train/lr"] for row in read_metrics(result.output_dir / "metrics.jsonl", "train")]
    assert plugin.rates == [[rate, rate * 0.25] for rate in logged]
    assert "groups" not in document(result)["optimizer"]


def test_a_scale_of_one_changes_no_bit(tiny: TinyRun) -> None:
    assert state_bytes(tiny("plain")) == state_bytes(tiny("scaled", plugins=[ScalesVectors(1.0)]))


def test_a_scale_that_is_changed_during_the_run_is_resumed(tiny: TinyRun) -> None:
    whole = tiny("whole", plugins=[ScalesVectors(0.25, at=2, later=0.5)])
    tiny("parts", plugins=[ScalesVectors(0.25, at=2, later=0.5), StopAfter(4)])
    rest = ScalesVectors(0.25, at=2, later=0.5)
    assert state_bytes(tiny("parts", plugins=[rest])) == state_bytes(whole)
    assert rest.steps == [4]


def test_a_scale_set_in_the_hook_may_be_another_at_a_resume(tiny: TinyRun) -> None:
    tiny(plugins=[ScalesVectors(0.25), StopAfter(3)])
    rest = ScalesVectors(0.5)
    tiny(plugins=[rest])
    assert all(vectors == rate * 0.5 for rate, vectors in rest.rates)


@pytest.mark.parametrize("scale", ["half", -1.0, float("nan"), None])
def test_a_scale_that_is_no_factor_is_refused(tiny: TinyRun, scale: object) -> None:
    with pytest.raises(PluginError, match="group 1 of the optimizer has the lr_scale"):
        tiny(plugins=[ScalesVectors(scale)])


def test_there_is_no_optimizer_before_it_is_built(tiny: TinyRun) -> None:
    class TooEarly(Everywhere):
        @hookimpl
        def on_model_built(self, run: Any, event: Any) -> None:
            _ = run.optimizer

    with pytest.raises(PluginError, match=r"run\.optimizer does not exist yet: it is there from on_optimizer_built on"):
        tiny(plugins=[TooEarly()])
