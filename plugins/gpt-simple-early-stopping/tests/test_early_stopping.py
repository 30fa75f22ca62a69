"""The plugin keeps the contract, and completes a run at the same evaluation however often it was interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpt_simple_early_stopping import EarlyStopping, EarlyStoppingConfig

from gpt_simple import Metric, Plugin, PluginError, hookimpl
from gpt_simple.testing import check_contract, train

SCORE = {"metric": "eval/score"}


def scores(values: Sequence[float]) -> type[Plugin[Any]]:
    """Reports one of ``values`` in each evaluation: at steps 2, 4, 6, ..."""

    class Scores(Plugin[Any]):
        @hookimpl
        def evaluate(self, run: Any, event: Any) -> dict[str, Metric]:
            return {"eval/score": Metric(values[event.step // 2 - 1])}

    return Scores


def run(values: Sequence[float], *plugins: Any, **options: Any) -> Any:
    own = {key: value for key, value in {**SCORE, **options}.items() if "." not in key}
    overrides = {f"plugins.early_stopping.{key}": value for key, value in own.items()}
    overrides |= {key: value for key, value in options.items() if "." in key}
    output_dir = overrides.pop("training.output_dir", None)
    max_steps = overrides.pop("training.max_steps", 2 * len(values))
    return train(
        EarlyStopping, scores(values), *plugins, output_dir=output_dir, max_steps=max_steps, overrides=overrides
    )


class DiesAt(Plugin[Any]):
    """Ends the run with an error in a step that no checkpoint has."""

    on_error = "abort"

    def __init__(self, step: int) -> None:
        super().__init__(None)
        self.step = step

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        if event.step == self.step:
            raise RuntimeError("killed")


def test_keeps_the_contract() -> None:
    check_contract(EarlyStopping)


@pytest.mark.parametrize(
    ("values", "options", "steps", "best"),
    [
        ([3, 2, 1, 0.5], {"patience": 1}, 8, 0.5),
        ([3, 2, 2, 1], {"patience": 1}, 6, 2),
        ([3, 2, 2, 1, 1, 1, 9], {"patience": 2}, 12, 1),
        ([3, 2.95, 2.89, 2.8], {"patience": 1, "min_delta": 0.1}, 4, 3),
        ([3, 2.95, 2.89, 2.8], {"patience": 2, "min_delta": 0.1}, 8, 2.89),
        ([1, 2, 2, 3], {"patience": 1, "mode": "max"}, 6, 2),
        ([math.nan, math.nan, 3, 3], {"patience": 2}, 4, None),
        ([-math.inf, 3, math.nan, 2, math.inf, 2], {"patience": 2}, 12, 2),
    ],
)
def test_a_run_is_complete_after_its_patience(values: list[float], options: Any, steps: int, best: float) -> None:
    result = run(values, **options).result
    assert (result.status, result.steps, int(result.exit_code)) == ("completed", steps, 0)
    assert result.summary["plugins"]["early_stopping"]["eval/score"] == best
    early = "has not improved in" in result.reason
    assert early == (steps < 2 * len(values))


def test_the_default_is_the_validation_loss(tmp_path: Path) -> None:
    options = {"plugins.early_stopping.min_delta": 10.0, "plugins.early_stopping.patience": 2}
    result = train(EarlyStopping, output_dir=tmp_path, max_steps=20, overrides=options).result
    assert (result.status, result.steps) == ("completed", 6)
    assert result.reason.startswith("eval/loss has not improved in 2 evaluations; the best is ")
    again = train(EarlyStopping, output_dir=tmp_path, max_steps=20, overrides=options).result
    assert (again.status, again.steps) == ("completed", 6)
    assert "was completed at step 6 of 20 (eval/loss has not improved" in again.reason


@pytest.mark.parametrize(("dies", "save_steps"), [(range(3, 9), 1), ([3, 5, 7], 2), ([5], 2), ([4, 8], 3)], ids=str)
def test_the_count_resumes_exactly(tmp_path: Path, dies: Sequence[int], save_steps: int) -> None:
    """A checkpoint of an evaluated step lacks its evaluation; one in between has it."""
    values = [3.0, 2.0, 2.5, 2.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    options = {"patience": 3, "training.output_dir": tmp_path, "training.save_steps": save_steps}
    whole = run(values, patience=3).result
    assert whole.steps == 16
    for step in dies:
        with pytest.raises(PluginError, match="killed"):
            run(values, DiesAt(step), **options)
    resumed = run(values, **options).result
    assert (resumed.steps, resumed.reason) == (whole.steps, whole.reason)
    state = json.loads((tmp_path / "checkpoints/step-00000016/plugins.json").read_text())["early_stopping"]["state"]
    assert state == {"best": 1.0, "at": 10, "waited": 3}


def test_a_decision_that_was_not_saved_is_taken_again(tmp_path: Path) -> None:
    class DiesBeforeTheLastSave(Plugin[Any]):
        on_error = "abort"
        evaluated = False

        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            self.evaluated = event.step == 4

        @hookimpl
        def on_checkpoint_saving(self, run: Any, event: Any) -> None:
            if self.evaluated:
                raise RuntimeError("killed")

    values = [1.0, 1.0, 1.0, 1.0]
    with pytest.raises(PluginError, match="killed"):
        run(values, DiesBeforeTheLastSave, patience=1, **{"training.output_dir": tmp_path})
    result = run(values, patience=1, **{"training.output_dir": tmp_path}).result
    assert (result.status, result.steps) == ("completed", 4)


def test_more_patience_lets_a_run_go_on(tmp_path: Path) -> None:
    where = {"training.output_dir": tmp_path}
    assert run([1.0] * 8, patience=2, **where).result.steps == 6
    assert run([1.0] * 8, patience=4, **where).result.steps == 10
    more = run([1.0] * 9, patience=4, **where).result
    assert (more.steps, more.reason) == (
        12,
        "eval/score has not improved in 5 evaluations; the best is 1.0000 of step 2",
    )


def test_a_metric_that_is_not_there_halts_the_run(tmp_path: Path) -> None:
    result = run([1.0] * 4, metric="eval/typo", **{"training.output_dir": tmp_path}).result
    assert (result.status, result.steps) == ("halted", 3)
    assert "early_stopping: no metric 'eval/typo' among" in result.reason
    assert "eval/loss" in result.reason
    assert result.checkpoint_path == tmp_path / "checkpoints/step-00000003"


@pytest.mark.parametrize(
    ("overrides", "code"),
    [({"training.eval_steps": None}, "no-evaluations"), ({"training.eval_steps": 2}, "never-due"), ({}, "")],
)
def test_a_configuration_without_effect_is_a_warning(overrides: dict[str, Any], code: str) -> None:
    steps = 4 if "training.eval_steps" in overrides else 20
    logged = train(EarlyStopping, max_steps=steps, overrides=overrides).recorder.events("on_log")
    assert [event.name for event in logged if event.name in ("no-evaluations", "never-due")] == ([code] if code else [])


@pytest.mark.parametrize("options", [{"patience": 0}, {"min_delta": -1.0}, {"mode": "most"}], ids=str)
def test_a_wrong_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=f"early_stopping.{next(iter(options))}"):
        run([1.0], **options)


def test_the_history_in_run_json_stays_short(tmp_path: Path) -> None:
    quick = {"training.output_dir": tmp_path, "training.eval_steps": 1, "training.save_steps": None}
    overrides = {**quick, "training.max_eval_batches": 1, "plugins.early_stopping.patience": 1000}
    overrides.pop("training.output_dir")
    train(EarlyStopping, output_dir=tmp_path, max_steps=105, overrides=overrides)
    history = json.loads((tmp_path / "run.json").read_text())["recorded"]["early_stopping.evaluations"]
    assert list(history) == [str(step) for step in range(6, 106)]
    assert EarlyStoppingConfig().patience == 5
