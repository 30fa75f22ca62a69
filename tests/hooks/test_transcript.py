"""The order of all calls of a run, and one test for each hook of when it comes and with what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from gpt_simple import Metric, Plugin, Run, hookimpl
from gpt_simple.errors import GptSimpleError
from gpt_simple.hooks import HOOKS, NoConfig
from gpt_simple.testing import Recorder, Trained, misbehaving, train
from tests.children import stops_at

STEP = ["on_step_start", "on_batch", "on_batch", "on_gradients", "on_step_end"]
LOG = ["collect_metrics", "on_metrics"]
SAVE = ["on_checkpoint_saving", "on_checkpoint_saved"]
EVALUATE = ["evaluate", "on_eval_end"]
START = ["check_config", "check_runtime", "on_model_built", "on_optimizer_built"]
RHYTHM = {"training.logging_steps": 2, "training.eval_steps": 3, "training.save_steps": 3}


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Trained]:
    """Six steps, stopped after four and resumed."""
    folder = tmp_path_factory.mktemp("transcript")
    return (
        train(stops_at(4), output_dir=folder, max_steps=6, overrides=RHYTHM),
        train(output_dir=folder, max_steps=6, overrides=RHYTHM),
    )


@pytest.fixture(scope="module")
def whole() -> Recorder:
    """Three steps without a stop."""
    return train().recorder


def hooks(recorder: Recorder) -> list[str]:
    return [hook for hook in recorder.hooks() if hook != "on_log"]


def test_the_calls_of_a_run_that_is_stopped_come_in_this_order(
    stopped_and_resumed: tuple[Trained, Trained],
) -> None:
    stopped, _ = stopped_and_resumed
    assert stopped.result.status == "stopped"
    assert hooks(stopped.recorder) == [
        *START,
        "on_run_start",
        *STEP,
        *(STEP + LOG),
        *(STEP + SAVE + EVALUATE),
        *(STEP + LOG + SAVE),
        "on_run_end",
        "on_close",
    ]


def test_the_calls_of_a_whole_run_come_in_this_order(whole: Recorder) -> None:
    assert hooks(whole) == [
        *START,
        "on_run_start",
        *(STEP + LOG),
        *(STEP + LOG + SAVE + EVALUATE),
        *(STEP + LOG + SAVE + EVALUATE),
        "on_run_end",
        "on_close",
    ]


def test_the_calls_of_a_resumed_run_come_in_this_order(stopped_and_resumed: tuple[Trained, Trained]) -> None:
    _, resumed = stopped_and_resumed
    assert hooks(resumed.recorder) == [
        *START,
        "on_checkpoint_loaded",
        "on_run_start",
        *STEP,
        *(STEP + LOG + SAVE + EVALUATE),
        "on_run_end",
        "on_close",
    ]


def test_the_calls_of_a_run_that_fails_end_with_the_error() -> None:
    recorder = Recorder()
    with pytest.raises(GptSimpleError):
        train(misbehaving("on_step_end", "raises", on_error="abort"), recorder=recorder)
    assert hooks(recorder) == [*START, "on_run_start", *STEP[:-1], "on_run_error", "on_close"]
    assert recorder.events("on_close")[0].ok is False


def test_the_hot_hooks_are_those_of_every_step() -> None:
    assert {name for name, info in HOOKS.items() if info.hot} == set(STEP)


def test_every_hook_has_a_test_of_its_name() -> None:
    names = {name for name, value in globals().items() if callable(value)}
    assert {f"test_{hook}" for hook in HOOKS} <= names


def test_register_components() -> None:
    class Brings(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Any) -> None:
            registry.add("schedule", "flat", lambda config, max_steps: lambda step: 0.5)

    metrics = train(Brings, overrides={"optimizer.schedule": "flat"}).recorder.events("on_metrics")
    assert [event.metrics["train/lr"] for event in metrics] == [0.5] * 3


def seen_by(hook: str, look: Callable[[Any], Any]) -> list[Any]:
    """What ``look`` finds in the run (or the configuration) when ``hook`` is called."""
    seen: list[Any] = []
    answer: Any = {"none": None, "metrics": {}, "findings": []}[HOOKS[hook].returns]

    def of_config(self: Any, config: Any) -> Any:
        seen.append(look(config))
        return answer

    def of_run(self: Any, run: Any) -> Any:
        seen.append(look(run))
        return answer

    implementation = of_config if "config" in HOOKS[hook].arguments else of_run
    train(type("Looks", (Plugin,), {hook: hookimpl(implementation), "on_error": "abort"}))
    return seen


def test_check_config() -> None:
    assert seen_by("check_config", lambda config: config.training.max_steps) == [3]


def test_check_runtime() -> None:
    assert seen_by("check_runtime", lambda run: (run.device.type, run.step)) == [("cpu", 0)]


def test_on_model_built() -> None:
    assert seen_by("on_model_built", lambda run: any(p.grad is not None for p in run.model.parameters())) == [False]


def test_on_optimizer_built(stopped_and_resumed: tuple[Trained, Trained]) -> None:
    steps = [trained.recorder.events("on_optimizer_built")[0].step for trained in stopped_and_resumed]
    assert steps == [0, 4]
    assert seen_by("on_optimizer_built", lambda run: len(run.optimizer.state)) == [0]


def test_on_checkpoint_loaded(stopped_and_resumed: tuple[Trained, Trained]) -> None:
    stopped, resumed = stopped_and_resumed
    (event,) = resumed.recorder.events("on_checkpoint_loaded")
    assert (event.step, event.path) == (4, stopped.result.checkpoint_path)


def test_on_run_start(stopped_and_resumed: tuple[Trained, Trained]) -> None:
    first, second = (trained.recorder.events("on_run_start")[0] for trained in stopped_and_resumed)
    assert (first.step, first.resumed_from, first.tokens) == (0, None, 0)
    assert (second.step, second.tokens) == (4, 4 * 64)
    assert second.resumed_from is not None


def test_on_step_start(whole: Recorder) -> None:
    assert [event.step for event in whole.events("on_step_start")] == [1, 2, 3]


def test_on_batch(whole: Recorder) -> None:
    events = whole.events("on_batch")
    assert [(event.step, event.micro_batch) for event in events] == [(s, m) for s in (1, 2, 3) for m in (0, 1)]
    assert {tuple(event.batch.input_ids.shape) for event in events} == {(2, 16)}


def test_on_gradients() -> None:
    assert all(seen_by("on_gradients", lambda run: all(p.grad is not None for p in run.model.parameters())))


def test_on_step_end(whole: Recorder) -> None:
    events = whole.events("on_step_end")
    assert [(event.step, event.tokens, event.is_last) for event in events] == [
        (1, 64, False),
        (2, 128, False),
        (3, 192, True),
    ]


def test_collect_metrics() -> None:
    class Collects(Plugin[NoConfig]):
        @hookimpl
        def collect_metrics(self, run: Run, event: Any) -> dict[str, Metric]:
            return {"own/steps": Metric(float(event.steps))}

    events = train(Collects, overrides={"training.logging_steps": 2}).recorder.events("on_metrics")
    assert [(event.step, event.metrics["own/steps"]) for event in events] == [(2, 2.0), (3, 1.0)]


def test_on_metrics(whole: Recorder) -> None:
    events = whole.events("on_metrics")
    assert [event.step for event in events] == [1, 2, 3]
    for event in events:
        assert all(type(value) is float for value in event.metrics.values())
        assert 4 < event.metrics["train/loss"] < 7


def test_on_checkpoint_saving(stopped_and_resumed: tuple[Trained, Trained]) -> None:
    stopped, _ = stopped_and_resumed
    assert [event.step for event in stopped.recorder.events("on_checkpoint_saving")] == [3, 4]
    assert stopped.recorder.events("on_checkpoint_saving")[1].reason == "enough"


def test_on_checkpoint_saved(stopped_and_resumed: tuple[Trained, Trained]) -> None:
    stopped, _ = stopped_and_resumed
    events = stopped.recorder.events("on_checkpoint_saved")
    assert [event.step for event in events] == [3, 4]
    for event in events:
        assert (event.path / "MANIFEST.json").exists()
        assert event.bytes > 0


def test_evaluate() -> None:
    class Evaluates(Plugin[NoConfig]):
        @hookimpl
        def evaluate(self, run: Run, event: Any) -> dict[str, Metric]:
            return {"eval/training_mode": Metric(float(run.model.training))}

    events = train(Evaluates).recorder.events("on_eval_end")
    assert [(event.step, event.metrics["eval/training_mode"]) for event in events] == [(2, 0.0), (3, 0.0)]


def test_on_eval_end(whole: Recorder) -> None:
    events = whole.events("on_eval_end")
    assert [event.step for event in events] == [2, 3]
    assert all(event.metrics["eval/loss"] > 0 for event in events)


def test_on_log() -> None:
    class Says(Plugin[NoConfig]):
        @hookimpl
        def on_run_start(self, run: Run, event: Any) -> None:
            run.log.warning("look here", name="hint", where="there")

    (record,) = [event for event in train(Says).recorder.events("on_log") if event.name == "hint"]
    assert (record.level, record.message, dict(record.fields)) == ("warning", "look here", {"where": "there"})


def test_on_run_end(whole: Recorder, stopped_and_resumed: tuple[Trained, Trained]) -> None:
    (end,) = whole.events("on_run_end")
    assert (end.status, end.step, end.tokens) == ("completed", 3, 192)
    (end,) = stopped_and_resumed[0].recorder.events("on_run_end")
    assert (end.status, end.step, end.reason) == ("stopped", 4, "enough")


def test_on_run_error() -> None:
    recorder = Recorder()
    with pytest.raises(GptSimpleError) as caught:
        train(misbehaving("on_step_end", "raises", on_error="abort"), recorder=recorder)
    (event,) = recorder.events("on_run_error")
    assert event.error is caught.value


def test_on_close(whole: Recorder) -> None:
    (event,) = whole.events("on_close")
    assert event.ok is True


def test_no_event_can_be_changed(whole: Recorder) -> None:
    events = {type(call.event): call.event for call in whole.calls if call.event is not None}
    assert len(events) > 10
    for kind, event in events.items():
        for field in attrs.fields(kind):
            with pytest.raises(attrs.exceptions.FrozenInstanceError):
                setattr(event, field.name, 7)


def test_the_configuration_cannot_be_changed_from_a_hook(tmp_path: Path) -> None:
    class Meddles(Plugin[NoConfig]):
        @hookimpl
        def on_step_start(self, run: Run, event: Any) -> None:
            run.config.training.max_steps = 1  # type: ignore[misc]

    trained = train(Meddles)
    assert trained.failed == ["meddles"]
    assert trained.result.steps == 3
