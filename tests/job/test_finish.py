"""A run that a plugin or the end of the data completes before ``training.max_steps``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from gpt_simple import Plugin, hookimpl, read_metrics
from gpt_simple.hooks import HOOKS
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.status import read_status
from gpt_simple.testing import Recorder, train
from tests.children import At, Ended, apart, kill_self
from tests.conftest import Shell
from tests.job.test_endings import does, without_logs
from tests.launch.conftest import Ranks, ranks
from tests.launch.conftest import tiny as tiny_at
from tests.run_dir.test_layout import snapshot
from tests.tiny import TinyRun, state_bytes, tiny

__all__ = ["apart", "ranks", "tiny"]

RHYTHM = {"training.logging_steps": 4, "training.eval_steps": 2, "training.save_steps": 2}


def asks(hook: str, step: int | None, kind: str = "finish") -> type[Plugin[Any]]:
    """A plugin that asks in ``hook``, at ``step`` if the hook has one, and answers as the hook must."""
    answer: Any = {} if HOOKS[hook].returns == "metrics" else None

    def act(self: Any, run: Any, event: Any) -> Any:
        if step is None or event.step == step:
            getattr(run.control, kind)("enough")
        return answer

    return type("Asks", (Plugin,), {hook: hookimpl(act), "on_error": "abort"})


def state_of(run: Path, step: int) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / f"checkpoints/step-{step:08d}/state.json").read_text())
    return document


def steps_of(run: Path, kind: str) -> list[int]:
    return [row["step"] for row in read_metrics(run / "metrics.jsonl", kind)]


@pytest.mark.parametrize(
    ("hook", "asked_at", "ends_at"),
    [
        ("on_model_built", None, 0),
        ("on_run_start", None, 0),
        ("on_step_start", 3, 3),
        ("on_batch", 3, 3),
        ("on_gradients", 3, 3),
        ("on_step_end", 3, 3),
        ("collect_metrics", 4, 4),
        ("on_metrics", 4, 4),
        ("on_step_end", 4, 4),
        ("on_checkpoint_saving", 2, 2),
        ("on_checkpoint_saved", 2, 2),
        ("evaluate", 2, 2),
        ("on_eval_end", 2, 2),
        ("on_eval_end", 4, 4),
    ],
)
def test_a_run_is_completed_where_a_plugin_asks(tmp_path: Path, hook: str, asked_at: int | None, ends_at: int) -> None:
    """It logs, saves and evaluates once, says so everywhere, and the next launch changes nothing."""
    plugin = asks(hook, asked_at)
    trained = train(plugin, output_dir=tmp_path, max_steps=9, overrides=RHYTHM)
    result, recorder = trained.result, trained.recorder
    assert (result.status, result.reason, int(result.exit_code), result.steps) == ("completed", "enough", 0, ends_at)
    assert result.checkpoint_path == tmp_path / f"checkpoints/step-{ends_at:08d}"
    assert state_of(tmp_path, ends_at)["finished"] == "enough"
    assert [event.step for event in recorder.events("on_eval_end")] == [*range(2, ends_at, 2), ends_at]
    assert [event.step for event in recorder.events("on_metrics")] == ([ends_at] if ends_at else [])
    assert recorder.events("on_run_end")[0].status == "completed"
    status, summary = read_status(RunDir(tmp_path)), json.loads((tmp_path / "summary.json").read_text())
    assert (status.state, status.step, status.reason) == ("completed", ends_at, "enough")
    assert (summary["status"], summary["reason"], summary["steps"]) == ("completed", "enough", ends_at)
    assert summary["next"] == "train(...) with training.max_steps 18 goes on from here"

    found = snapshot(tmp_path)
    again = train(plugin, output_dir=tmp_path, max_steps=9, overrides=RHYTHM)
    assert (again.result.status, int(again.result.exit_code), again.result.steps) == ("completed", 0, ends_at)
    assert again.result.reason.startswith(f"the run was completed at step {ends_at} of 9 (enough): raise training.max_")
    assert without_logs(again.recorder) == ["check_config", "check_runtime", "on_close"]
    assert snapshot(tmp_path) == found


def test_without_an_evaluation_the_next_step_decides(tmp_path: Path) -> None:
    options = {"training.eval_steps": None, "training.save_steps": 2, "training.logging_steps": None}
    result = train(asks("on_checkpoint_saved", 2), output_dir=tmp_path, max_steps=9, overrides=options).result
    assert (result.status, result.steps, result.final_val_loss) == ("completed", 3, None)
    assert steps_of(tmp_path, "train") == [], "nothing is logged where logging is off"
    assert result.final_loss is not None


@pytest.mark.parametrize(
    ("other", "step", "status", "reason", "remembered"),
    [
        ("stop", 3, "completed", "enough; the last evaluation was left out: now", "enough"),
        ("halt", 3, "halted", "now", ""),
        ("save", 3, "completed", "enough", "enough"),
        ("evaluate", 3, "completed", "enough", "enough"),
        ("save", 5, "completed", "finished all 5 steps", ""),
        ("stop", 5, "completed", "finished all 5 steps; the last evaluation was left out: now", ""),
        ("halt", 5, "halted", "now", ""),
    ],
)
def test_another_request_in_the_same_step(
    tmp_path: Path, other: str, step: int, status: str, reason: str, remembered: str
) -> None:
    """A halt has precedence. A stop leaves out the last evaluation. Step 5 is the last one anyway."""
    also = does("on_step_end", lambda run: getattr(run.control, other)("now"), step)
    plugins = asks("on_step_end", step), type("Also", (also,), {})
    trained = train(*plugins, output_dir=tmp_path, max_steps=5, overrides=RHYTHM)
    assert (trained.result.status, trained.result.reason, trained.result.steps) == (status, reason, step)
    assert state_of(tmp_path, step)["finished"] == remembered
    evaluated = [event.step for event in trained.recorder.events("on_eval_end")]
    assert (step in evaluated) == (other in ("save", "evaluate"))


@pytest.mark.parametrize(("other", "status"), [("stop", "completed"), ("halt", "halted")])
def test_another_request_before_the_first_step(tmp_path: Path, other: str, status: str) -> None:
    plugins = asks("on_run_start", None), type("Also", (asks("on_run_start", None, other),), {})
    trained = train(*plugins, output_dir=tmp_path, overrides=RHYTHM)
    assert (trained.result.status, trained.result.steps) == (status, 0)
    assert trained.recorder.events("on_eval_end") == []
    assert (trained.result.checkpoint_path is not None) == (status == "completed")


def test_a_resumed_run_can_finish_before_its_first_step(tmp_path: Path) -> None:
    """The checkpoint from which it goes on is replaced: it says now that the run is complete."""
    train(does("on_step_end", lambda run: run.control.stop("later"), 2), output_dir=tmp_path, max_steps=5)
    assert state_of(tmp_path, 2)["finished"] == ""
    asked = asks("on_run_start", None)
    assert train(asked, output_dir=tmp_path, max_steps=5).result.reason == "enough"
    assert state_of(tmp_path, 2)["finished"] == "enough"
    assert "completed at step 2 of 5" in train(asked, output_dir=tmp_path, max_steps=5).result.reason


def test_a_halt_of_the_last_log_has_precedence(tmp_path: Path) -> None:
    """Too many skipped steps are noticed when they are logged, here only because the run finishes."""

    class Skips(Plugin[Any]):
        ranks = "all"

        @hookimpl
        def on_gradients(self, run: Any) -> None:
            for parameter in run.model.parameters():
                parameter.grad.fill_(float("nan"))

    options = {**RHYTHM, "training.max_skipped_steps": 3}
    trained = train(Skips, asks("on_step_end", 3), output_dir=tmp_path, max_steps=9, overrides=options)
    assert (trained.result.status, trained.result.steps) == ("halted", 3)
    assert state_of(tmp_path, 3)["finished"] == ""


@pytest.mark.parametrize("hook", ["on_step_end", "on_eval_end"])
def test_a_kill_between_decision_and_save_loses_nothing(
    apart: Callable[..., Ended], tiny: TinyRun, hook: str, tmp_path: Path
) -> None:
    """The next launch comes to the same decision, and the run ends with the same bits."""
    options: dict[str, Any] = {"training__eval_steps": 4, "training__save_steps": 2, "training__max_steps": 9}
    asked = asks(hook, 4)
    whole = tiny("whole", plugins=[asked], **options)
    saves: list[int] = []

    def kill_in_last_save(run: Any) -> None:
        saves.append(run.step)
        if len(saves) == (2 if hook == "on_eval_end" else 1):
            kill_self(run)

    killed = apart("killed", plugins=[asked, At("on_checkpoint_saving", 4, kill_in_last_save)], **options)
    assert killed.status.state == "crashed"
    assert killed.steps[-1] == (4 if hook == "on_eval_end" else 2)
    if hook == "on_eval_end":
        asked = type("Asks", (asks("on_run_start", None),), {})  # what a plugin that keeps its decision does
    result = tiny("killed", plugins=[asked], **options)
    assert (result.status, result.reason, result.steps) == ("completed", "enough", 4)
    assert state_bytes(result) == state_bytes(whole)
    assert state_of(tmp_path / "killed", 4)["finished"] == "enough"


def test_a_finished_run_goes_on_to_the_same_bits(tiny: TinyRun) -> None:
    options: dict[str, Any] = {"training__eval_steps": 2, "optimizer__schedule": "constant"}
    whole = tiny("whole", training__max_steps=8, **options)
    tiny("parts", plugins=[asks("on_eval_end", 4)], training__max_steps=6, **options)
    later = tiny("parts", training__max_steps=8, **options)
    assert (later.status, later.reason) == ("completed", "finished all 8 steps")
    assert state_bytes(later) == state_bytes(whole)


@frozen
class BudgetConfig:
    tokens: int = 128


class Budget(Plugin[BudgetConfig]):
    Config = BudgetConfig

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.tokens >= self.config.tokens:
            run.control.finish("the budget is spent")


@pytest.mark.parametrize(
    ("plugins", "changes", "steps"),
    [
        ([Budget], {}, 2),
        ([Budget], {"training.max_steps": 8}, 2),
        ([Budget], {"training.logging_steps": 2, "data.num_workers": 1}, 2),
        ([Budget], {"training.max_steps": 12}, 3),
        ([Budget], {"plugins.budget.tokens": 256}, 4),
        ([Budget], {"data.on_exhaustion": "halt"}, 3),
        ([], {"training.max_steps": 4}, 4),
    ],
)
def test_what_lets_a_finished_run_go_on(
    tmp_path: Path, plugins: list[Any], changes: dict[str, Any], steps: int
) -> None:
    assert train(Budget, output_dir=tmp_path, max_steps=9).result.steps == 2
    recorder = Recorder()
    assert (
        train(
            *plugins, output_dir=tmp_path, recorder=recorder, overrides={"training.max_steps": 9, **changes}
        ).result.steps
        == steps
    )
    assert bool(recorder.events("on_run_start")) == (steps > 2)


def test_data_that_end_complete_a_run_for_good(tiny: TinyRun, tmp_path: Path) -> None:
    short: dict[str, Any] = {"data__max_documents": 12, "training__max_steps": 1000, "training__save_steps": 1}
    recorder = Recorder()
    first = tiny(plugins=[recorder], data__on_exhaustion="halt", training__eval_steps=1, **short)
    evaluated = [event.step for event in recorder.events("on_eval_end")]
    assert evaluated == list(range(1, first.steps + 1)), "the last step is evaluated once"
    assert first.reason.startswith("the data end")
    assert state_of(tmp_path / "run", first.steps)["finished"] == first.reason
    found = snapshot(tmp_path / "run")
    again = tiny(plugins=[Recorder()], data__on_exhaustion="halt", training__eval_steps=1, **short)
    assert (again.status, again.steps) == ("completed", first.steps)
    assert "was completed at step" in again.reason
    assert snapshot(tmp_path / "run") == found
    ends = tiny(data__on_exhaustion="halt", training__eval_steps=1, **short | {"training__max_steps": 1001})
    assert (ends.status, ends.steps, ends.reason) == ("completed", first.steps, first.reason)


def test_one_process_of_two_finishes_the_run(ranks: Ranks, tmp_path: Path) -> None:
    class Finishes(Plugin[Any]):
        ranks, on_error = "all", "abort"

        def __init__(self, hook: str) -> None:
            super().__init__(None)
            self.hook = hook

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            self.meet("on_step_end", run, event)

        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            self.meet("on_eval_end", run, event)

        def meet(self, hook: str, run: Any, event: Any) -> None:
            if (hook, event.step) == (self.hook, 2) and not run.is_main:
                run.control.finish("enough")

    for hook in ("on_step_end", "on_eval_end"):

        def work(rank: int, hook: str = hook) -> list[Any]:
            out = tiny_at(tmp_path / hook, plugins=[Finishes(hook)], training__eval_steps=2)
            again = tiny_at(tmp_path / hook, plugins=[Finishes(hook)], training__eval_steps=2)
            return [out.status, out.reason, out.steps, again.status, again.reason.split(":")[0]]

        expected = ["completed", "enough", 2, "completed", "the run was completed at step 2 of 6 (enough)"]
        assert ranks(2, work) == [expected] * 2
        assert state_of(tmp_path / hook, 2)["finished"] == "enough"
        assert steps_of(tmp_path / hook, "eval") == [2]


def test_the_commands_show_a_finished_run(shell: Shell, here: Path) -> None:
    (here / "enough.py").write_text(
        "from gpt_simple import Plugin, hookimpl\n\n\nclass Enough(Plugin):\n    @hookimpl\n"
        "    def on_step_end(self, run, event):\n        if event.step == 2:\n"
        '            run.control.finish("the budget is spent")\n'
    )
    command = ("run", "config.toml", "-p", "./enough.py")
    first = shell(*command)
    assert first.code == 0, first.err
    assert "completed: the budget is spent" in first.out
    again = shell(*command)
    assert (again.code, again.err) == (0, "")
    assert "nothing to do, the run was completed at step 2 of 4 (the budget is spent): raise" in again.out
    assert shell("status", "out").out.splitlines()[0].startswith("completed  step 2/4")
    assert shell("status", "out").out.splitlines()[1] == "the budget is spent"
    checked = shell("validate", "config.toml", "-p", "./enough.py")
    said = " ".join(checked.out.split())
    assert "there is nothing to do, the run was completed at step 2 of 4 (the budget is spent): raise" in said
    assert shell("report", "out").code == 0
    assert "completed: the budget is spent" in (here / "out/report.html").read_text()


def test_a_save_in_the_background_is_replaced_too(tmp_path: Path) -> None:
    options = {**RHYTHM, "training.background_save": True}
    trained = train(asks("on_eval_end", 4), output_dir=tmp_path, max_steps=9, overrides=options)
    assert (trained.result.status, trained.result.steps) == ("completed", 4)
    saved = [(event.step, event.reason) for event in trained.recorder.events("on_checkpoint_saved")]
    assert saved == [(2, "every 2 steps"), (4, "every 2 steps"), (4, "enough")]
    assert state_of(tmp_path, 4)["finished"] == "enough"
    assert "completed at step 4" in train(asks("on_eval_end", 4), output_dir=tmp_path, max_steps=9).result.reason
