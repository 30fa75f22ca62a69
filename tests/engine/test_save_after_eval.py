"""The order of evaluation and checkpoint at a boundary: what each order keeps, however a launch ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import Plugin, TrainResult, hookimpl
from gpt_simple.hooks import NoConfig
from gpt_simple.testing import Recorder, train, train_on_ranks
from tests.children import At, Ended, Everywhere, kill_self, terminate_self
from tests.tiny import TinyRun, state_bytes

AFTER = {"training.save_after_eval": True}


def boundary(recorder: Recorder, step: int) -> list[str]:
    """The hooks between step ``step`` and the next one."""
    hooks = ("evaluate", "on_eval_end", "on_checkpoint_saving", "on_checkpoint_saved")
    return [call.hook for call in recorder.calls if call.hook in hooks and getattr(call.event, "step", 0) == step]


EVALUATION, CHECKPOINT = ["evaluate", "on_eval_end"], ["on_checkpoint_saving", "on_checkpoint_saved"]


@pytest.mark.parametrize("saves_after", [False, True])
def test_the_order_at_a_boundary_is_the_one_chosen(saves_after: bool) -> None:
    trained = train(overrides={"training.save_after_eval": saves_after})
    for step in (2, 3):
        expected = EVALUATION + CHECKPOINT if saves_after else CHECKPOINT + EVALUATION
        assert boundary(trained.recorder, step) == expected
    assert [event.reason for event in trained.recorder.events("on_checkpoint_saved")] == ["every 2 steps", "last step"]


@pytest.mark.parametrize(
    ("eval_steps", "save_steps", "hooks", "hooks_after"),
    [
        (3, 3, CHECKPOINT + EVALUATION, EVALUATION + CHECKPOINT),
        (3, 11, CHECKPOINT + CHECKPOINT + EVALUATION, CHECKPOINT + EVALUATION + CHECKPOINT),
        (11, 3, EVALUATION + CHECKPOINT, EVALUATION + CHECKPOINT),
        (11, 11, CHECKPOINT + EVALUATION + CHECKPOINT, EVALUATION + CHECKPOINT + CHECKPOINT),
    ],
)
@pytest.mark.parametrize("saves_after", [False, True])
def test_the_end_of_the_data_is_a_last_step_in_each_order(
    saves_after: bool, eval_steps: int, save_steps: int, hooks: list[str], hooks_after: list[str]
) -> None:
    """The data end after step 11, which is known only when step 12 asks for them: both may have been done before.

    A checkpoint that was written before is written again, with the reason of the end.
    """
    trained = train(
        max_steps=1000,
        overrides={
            "data.on_exhaustion": "halt",
            "data.max_documents": 4,
            "training.save_after_eval": saves_after,
            "training.eval_steps": eval_steps,
            "training.save_steps": save_steps,
        },
    )
    assert (trained.result.status, trained.result.steps) == ("completed", 11)
    assert boundary(trained.recorder, 11) == (hooks_after if saves_after else hooks)
    if saves_after:
        state, _ = saved(trained.result, 11)
        assert state["best_val_loss"] == trained.result.best_val_loss
        assert trained.recorder.events("on_checkpoint_saved")[-1].val_loss == trained.result.final_val_loss


def saved(result: TrainResult, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """state.json and plugins.json of a checkpoint."""
    path = result.output_dir / "checkpoints" / f"step-{step:08}"
    state, plugins = (json.loads((path / f"{stem}.json").read_text()) for stem in ("state", "plugins"))
    return state, plugins


@pytest.mark.parametrize("saves_after", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_has_what_its_evaluation_decided(saves_after: bool, background: bool) -> None:
    trained = train(
        max_steps=7,
        overrides={
            "training.save_after_eval": saves_after,
            "training.background_save": background,
            "training.eval_steps": 4,
            "training.keep_last_k": None,
        },
    )
    losses = {event.step: event.metrics["eval/loss"] for event in trained.recorder.events("on_eval_end")}
    assert list(losses) == [4, 7]
    for event in trained.recorder.events("on_checkpoint_saved"):
        state, plugins = saved(trained.result, event.step)
        known = {step: loss for step, loss in losses.items() if step < event.step + saves_after}
        assert state["best_val_loss"] == (min(known.values()) if known else None)
        assert plugins["checkpoint"]["state"]["losses"] == {str(step): loss for step, loss in known.items()}
        # A background save is reported after the evaluation of its step; the last save is never in the background.
        reported_late = background and event.step != 7
        assert event.val_loss == (losses.get(event.step) if saves_after or reported_late else None)
        assert "evaluation_due" not in state
    assert [event.step for event in trained.recorder.events("on_checkpoint_saved")] == [2, 4, 6, 7]


class Plateau(Everywhere):
    """Scales the gradients down with every evaluation that is not better: training depends on evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.best = 1.0, float("inf")
        self.evaluated: list[int] = []

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        for parameter in run.model.parameters():
            parameter.grad *= self.scale

    @hookimpl
    def on_eval_end(self, run: Any, event: Any) -> None:
        loss = event.metrics["eval/loss"]
        self.scale *= 0.9 if loss < self.best else 0.5
        self.best = min(self.best, loss)
        self.evaluated.append(event.step)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "best": self.best, "evaluated": list(self.evaluated)}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        self.scale, self.best, self.evaluated = state["scale"], state["best"], list(state["evaluated"])


class Leaves(Plugin[NoConfig]):
    """Does ``work(run)`` in the evaluation of ``step``, after the first batch is read."""

    ranks, on_error, before = "all", "abort", ("evaluate",)

    def __init__(self, step: int, work: Callable[[Any], object]) -> None:
        super().__init__(NoConfig())
        self.step, self.work = step, work

    @hookimpl
    def evaluate(self, run: Any, event: Any) -> dict[str, Any]:
        for _ in run.val_batches():
            if event.step == self.step:
                self.work(run)
        return {}


RUN: dict[str, Any] = {
    "training__save_after_eval": True,
    "training__save_steps": 2,
    "training__eval_steps": 4,
    "training__max_steps": 10,
    "model__dropout": 0.1,
}


def request_stop(run: Any) -> None:
    run.control.stop("enough")


@pytest.mark.parametrize(("saves_after", "background"), [(False, False), (True, False), (True, True)])
def test_short_jobs_equal_a_long_one_with_both_orders(
    saves_after: bool, background: bool, apart: Callable[..., Ended], tiny: TinyRun
) -> None:
    options = RUN | {"training__save_after_eval": saves_after, "training__background_save": background}
    whole = tiny("whole", **options)
    killed = apart("parts", plugins=[At("on_eval_end", 4, kill_self)], **options)
    assert (killed.code, max(killed.steps) in ((2, 4) if background else (2 if saves_after else 4,))) == (-9, True)
    assert apart("parts", plugins=[Leaves(8, terminate_self)], **options).code == 75
    assert state_bytes(tiny("parts", **options)) == state_bytes(whole)


ENDINGS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "killed in the evaluation": (lambda: Leaves(4, kill_self), -9, 2),
    "killed after the evaluation": (lambda: At("on_eval_end", 4, kill_self), -9, 2),
    "killed before the checkpoint": (lambda: At("on_checkpoint_saving", 4, kill_self), -9, 2),
    "killed after the checkpoint": (lambda: At("on_step_start", 5, kill_self), -9, 4),
    "stopped in the evaluation": (lambda: Leaves(4, terminate_self), 75, 4),
    "stopped before the evaluation": (lambda: At("on_step_end", 4, request_stop), 75, 4),
    "stopped after the evaluation": (lambda: At("on_eval_end", 4, request_stop), 75, 4),
    "stopped between evaluations": (lambda: At("on_step_end", 5, request_stop), 75, 5),
}
"""What ends a launch, its exit code, and the step of its last checkpoint."""


@pytest.mark.parametrize("ending", ENDINGS)
def test_state_of_evaluations_survives_each_ending(ending: str, apart: Callable[..., Ended], tiny: TinyRun) -> None:
    """What a plugin has decided in its evaluations, and with it the weights, are those of a run that never ended."""
    plateau = Plateau()
    whole = tiny("whole", plugins=[plateau], **RUN)
    ends, code, step = ENDINGS[ending]
    ended = apart("parts", plugins=[Plateau(), ends()], **RUN)
    assert (ended.code, max(ended.steps)) == (code, step)
    resumed = Plateau()
    parts = tiny("parts", plugins=[resumed], **RUN)
    assert resumed.evaluated == plateau.evaluated == [4, 8, 10]
    assert state_bytes(parts) == state_bytes(whole)
    assert parts.best_val_loss == whole.best_val_loss


def test_an_evaluation_that_is_due_survives_a_second_stop(apart: Callable[..., Ended], tiny: TinyRun) -> None:
    plateau = Plateau()
    whole = tiny("whole", plugins=[plateau], **RUN)
    for _ in range(2):
        ended = apart("parts", plugins=[Plateau(), Leaves(4, terminate_self)], **RUN)
        assert (ended.code, ended.steps) == (75, [2, 4])
    resumed = Plateau()
    parts = tiny("parts", plugins=[resumed], **RUN)
    assert resumed.evaluated == plateau.evaluated
    assert state_bytes(parts) == state_bytes(whole)


@pytest.mark.parametrize(
    ("request_", "status", "steps"),
    [("save", "completed", [2, 3, 6]), ("stop", "stopped", [2, 3]), ("halt", "halted", [2, 3])],
)
def test_requests_of_an_evaluation_hold_for_its_step(request_: str, status: str, steps: list[int]) -> None:
    class Asks(Plugin[NoConfig]):
        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            if event.step == 3:
                getattr(run.control, request_)("it asks")

    overrides = AFTER | {"training.eval_steps": 3, "training.save_steps": None, "training.keep_last_k": None}
    trained = train(Asks, At("on_step_end", 2, lambda run: run.control.save("2")), max_steps=6, overrides=overrides)
    assert trained.result.status == status
    assert [event.step for event in trained.recorder.events("on_checkpoint_saved")] == steps


def test_an_evaluation_may_ask_for_the_next_one() -> None:
    class Asks(Plugin[NoConfig]):
        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            run.control.evaluate("again")

    trained = train(Asks, max_steps=5, overrides=AFTER | {"training.eval_steps": 3})
    assert [event.step for event in trained.recorder.events("evaluate")] == [3, 4, 5]


@pytest.mark.parametrize(("kind", "status"), [("stop", "completed"), ("halt", "halted")])
def test_requests_of_the_last_evaluation_change_little(kind: str, status: str) -> None:
    class Asks(Plugin[NoConfig]):
        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            if event.step == 3:
                getattr(run.control, kind)("it asks")

    trained = train(Asks, overrides=AFTER)
    assert trained.result.status == status
    assert trained.result.reason == ("finished all 3 steps" if kind == "stop" else "it asks")
    assert trained.recorder.events("on_checkpoint_saved")[-1].val_loss == trained.result.final_val_loss


class StopsOnOne(Leaves):
    """A process that is not the main one asks for the stop."""

    def __init__(self) -> None:
        super().__init__(2, lambda run: run.rank == 1 and run.control.stop("enough"))


def test_all_processes_keep_what_a_stop_leaves_out(tmp_path: Path) -> None:
    for plugins, hooks in (([StopsOnOne()], ["evaluate"]), ([], ["evaluate", "on_eval_end"])):
        outcomes = train_on_ranks(*plugins, output_dir=tmp_path, overrides=AFTER)
        assert [outcome.error for outcome in outcomes] == ["", ""]
        for outcome in outcomes:
            called = [hook for hook in outcome.hooks if hook in ("on_step_start", "evaluate", "on_eval_end")]
            first = ["on_step_start"] * 2 + hooks if plugins else [*hooks, "on_step_start"]
            assert called[: len(first)] == first, called
        found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert found == ["step-00000002", *([] if plugins else ["step-00000003"])]
    assert all(one.name < other.name for one, other in pairwise(sorted((tmp_path / "checkpoints").iterdir())))
