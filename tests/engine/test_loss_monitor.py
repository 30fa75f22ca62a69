"""Skipped steps and spikes are counted, and reported with their samples."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from gpt_simple import Plugin, PluginError, TrainResult, hookimpl
from gpt_simple.engine.loss_monitor import LossMonitor, StepRecord, all_finite
from gpt_simple.run_dir.lineage import read_metrics
from tests.tiny import TinyRun, weights


class Spoils(Plugin[Any]):
    """Steps ``first`` to ``last``: the loss (a weight is NaN in the forward) or one gradient is not finite."""

    ranks, on_error = "all", "abort"

    def __init__(self, first: int, last: int, what: str) -> None:
        super().__init__(None)
        self.steps, self.what, self.kept = range(first, last + 1), what, torch.zeros(())

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        if self.what == "loss" and event.step in self.steps and event.micro_batch == 0:
            weight = next(run.model.parameters()).data
            self.kept = weight.clone()
            weight.fill_(math.nan)

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        weight = next(run.model.parameters())
        if event.step in self.steps:
            if self.what == "loss":
                weight.data.copy_(self.kept)
            else:
                weight.grad.view(-1)[7] = math.inf


def events(result: TrainResult, name: str) -> list[dict[str, Any]]:
    rows = read_metrics(result.output_dir / "metrics.jsonl")
    return [row for row in rows if row["kind"] == "event" and row["name"] == name]


@pytest.mark.parametrize("what", ["loss", "one gradient"])
def test_too_many_skipped_steps_halt_and_name_the_samples(tiny: TinyRun, what: str) -> None:
    options: dict[str, Any] = {"training__max_skipped_steps": 4, "training__max_steps": 30, "training__save_steps": 5}
    result = tiny(plugins=[Spoils(7, 30, what)], **options)
    assert (result.status, result.exit_code, result.steps) == ("halted", 76, 10)
    # Four rows a step, counted from 0: step 7 begins with the 25th.
    assert "4 steps in a row, 7 to 10, were skipped" in result.reason
    assert "samples 24 to 39" in result.reason
    assert all(torch.isfinite(tensor).all() for tensor in weights(result).values())
    assert json.loads((result.output_dir / "status.json").read_text())["state"] == "halted"
    assert (result.output_dir / "checkpoints/step-00000005").exists()
    assert tiny(**options).status == "completed", "a person may let it go on"


class Asks(Plugin[Any]):
    """Asks to skip these steps. The gradients of the steps in ``bad`` are not finite, too."""

    ranks, on_error = "all", "abort"

    def __init__(self, asked: range, bad: range = range(0)) -> None:
        super().__init__(None)
        self.asked, self.bad = asked, bad

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        if event.step in self.bad:
            next(run.model.parameters()).grad.view(-1)[7] = math.inf
        if event.step in self.asked:
            run.control.skip_step(torch.tensor(True))


def test_requests_to_skip_are_reported_as_such_and_never_halt(tiny: TinyRun) -> None:
    limit = {"training__max_skipped_steps": 3, "training__max_steps": 12, "training__logging_steps": 4}
    result = tiny(plugins=[Asks(range(2, 12), bad=range(6, 8))], **limit)
    assert (result.status, result.steps) == ("completed", 12)
    asked, bad = "because the plugin asks asked for it", "had a non-finite gradient and were skipped"
    assert [(row["step"], row["message"]) for row in events(result, "skipped_steps")] == [
        (4, f"3 of the last 4 steps were skipped {asked}"),
        (8, f"2 of the last 4 steps {bad}"),
        (8, f"2 of the last 4 steps were skipped {asked}"),
        (12, f"3 of the last 4 steps were skipped {asked}"),
    ]
    rows = [row for row in read_metrics(result.output_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["train/skipped_steps"] for row in rows] == [3.0, 4.0, 3.0]


class AsksToo(Asks):
    """Another plugin that asks."""


def test_skips_are_attributed_to_the_plugins_that_asked(tiny: TinyRun) -> None:
    flags: dict[int, list[str]] = {}

    class Watches(Plugin[Any]):
        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            flags[event.step] = [name for name, flag in event.skipped_by.items() if flag]
            assert bool(event.skipped) == (event.step in range(2, 8))

    options = {"training__max_steps": 9, "training__logging_steps": 9}
    plugins = [Asks(range(2, 7), bad=range(7, 8)), AsksToo(range(4, 6)), Spoils(99, 99, ""), Watches]
    result = tiny(plugins=plugins, **options)
    both, one = ["asks", "askstoo"], ["asks"]
    assert flags == {1: [], 2: one, 3: one, 4: both, 5: both, 6: one, 7: [], 8: [], 9: []}
    assert [row["message"] for row in events(result, "skipped_steps")] == [
        "1 of the last 9 steps had a non-finite gradient and were skipped",
        "3 of the last 9 steps were skipped because the plugin asks asked for it",
        "2 of the last 9 steps were skipped because the plugins asks and askstoo asked for it",
    ]


@pytest.mark.parametrize("hook", ["on_step_start", "on_batch", "on_step_end", "collect_metrics"])
def test_a_step_is_skipped_from_on_gradients_only(tiny: TinyRun, hook: str) -> None:
    def ask(self: Any, run: Any, event: Any) -> None:
        run.control.skip_step(torch.tensor(True))

    early = type("Early", (Plugin,), {hook: hookimpl(ask), "on_error": "abort"})
    with pytest.raises(PluginError, match=rf"plugin early .* failed in {hook} .*used outside of on_gradients"):
        tiny(plugins=[early, Asks(range(2, 3))])


@pytest.mark.parametrize("asked", [range(0), range(1, 13)])
def test_requests_do_not_hide_gradients_that_are_not_finite(tiny: TinyRun, asked: range) -> None:
    result = tiny(plugins=[Asks(asked, bad=range(5, 9))], training__max_skipped_steps=4, training__max_steps=12)
    assert (result.status, result.steps) == ("halted", 8)
    assert "4 steps in a row, 5 to 8, were skipped because their gradients were not finite" in result.reason


def test_fewer_skipped_steps_do_not_halt(tiny: TinyRun) -> None:
    result = tiny(plugins=[Spoils(3, 5, "one gradient")], training__max_skipped_steps=4, training__max_steps=8)
    assert (result.status, result.steps) == ("completed", 8)


def test_skipped_steps_halt_a_run_without_a_log(tiny: TinyRun) -> None:
    result = tiny(
        plugins=[Spoils(2, 400, "one gradient")],
        training__max_skipped_steps=4,
        training__max_steps=400,
        training__logging_steps=None,
    )
    assert (result.status, result.steps) == ("halted", 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_weights_are_finite(dtype: torch.dtype) -> None:
    large = torch.full((1000,), 0.9 * torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([large, torch.ones(3), torch.empty(0)])
    for wrong in (math.nan, math.inf, -math.inf):
        large[-1] = wrong
        assert not all_finite([torch.ones(3), large])
    assert not all_finite([torch.tensor([math.inf, -math.inf])])
    assert all_finite([])


def test_a_spike_is_reported_once_with_its_samples(tiny: TinyRun) -> None:
    class Scrambles(Plugin[Any]):
        ranks, on_error = "all", "abort"

        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            run.model.register_forward_pre_hook(lambda model, given: self.scramble(run, *given))

        def scramble(self, run: Any, inputs: torch.Tensor, labels: torch.Tensor) -> Any:
            return inputs, torch.full_like(labels, 255) if run.step + 1 == 105 else labels

    result = tiny(plugins=[Scrambles(None)], training__max_steps=120, training__logging_steps=20)
    (row,) = events(result, "loss_spike")
    assert row["at"] == 105
    assert "samples 416 to 419" in row["message"]


def records(losses: list[float], skipped: tuple[int, ...] = ()) -> list[StepRecord]:
    return [
        StepRecord(step, 8 * (step - 1), 8, loss, step in skipped, step in skipped)
        for step, loss in enumerate(losses, 1)
    ]


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0)).tolist()
    falling = [2 + 8 * math.exp(-step / 200) + 0.1 * noise[step] for step in range(2000)]
    assert LossMonitor(None).spike(records(falling)) is None


def test_a_level_that_stays_high_is_reported_and_then_usual() -> None:
    losses = [3.0 + 0.01 * (step % 2) for step in range(100)] + [9.0] * 300
    monitor = LossMonitor(None)
    steps = records(losses)
    spike = monitor.spike(steps[:101])
    assert spike is not None
    assert spike.record.step == 101
    monitor.spike(steps[101:390])
    assert monitor.spike(steps[390:]) is None


def test_a_streak_is_followed_over_logging_points() -> None:
    steps = records([1.0] * 10, skipped=(3, 4, 5, 6))
    monitor = LossMonitor(4)
    assert monitor.streak(steps[:5]) == ""
    assert "3 to 6" in monitor.streak(steps[5:])
    monitor = LossMonitor(4)
    assert monitor.streak([*steps[:4], steps[8], *steps[4:6]]) == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_hides_no_later_spike(bad: float) -> None:
    monitor = LossMonitor(None)
    assert monitor.spike(records([bad] + [3.0 + 0.01 * (step % 2) for step in range(100)])) is None
    spike = monitor.spike(records([9.0]))
    assert spike is not None
    assert math.isfinite(spike.usual)
