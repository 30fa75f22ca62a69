"""Facts that plugins keep in run.json: there before the first checkpoint, for every later launch of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import Plugin, hookimpl
from gpt_simple.errors import PluginError
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord
from gpt_simple.testing import train, train_on_ranks
from tests.children import At, At2, Ended, apart, kill_self
from tests.engine.test_loss_monitor import events
from tests.tiny import TinyRun, tiny

__all__ = ["apart", "tiny"]


class Tracker(Plugin[Any]):
    """Opens a run of a tracker once: the id is made in the first launch."""

    on_error = "abort"

    def __init__(self, made: str, seen: list[Any]) -> None:
        super().__init__(None)
        self.made, self.seen = made, seen

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.seen.append(run.recorded("tracker.id"))
        run.record("tracker.id", run.recorded("tracker.id", self.made))


def test_a_fact_survives_a_kill_before_the_first_checkpoint(apart: Callable[..., Ended], tiny: TinyRun) -> None:
    seen: list[Any] = []
    killed = apart(plugins=[Tracker("first", seen), At("on_step_end", 1, kill_self)])
    assert (killed.steps, killed.status.state) == ([], "crashed")
    result = tiny(plugins=[Tracker("second", seen)])
    assert json.loads((result.output_dir / "run.json").read_text())["recorded"] == {"tracker.id": "first"}
    assert tiny(plugins=[Tracker("third", seen)], training__max_steps=8).steps == 8
    assert seen == ["first", "first"]
    tiny(
        plugins=[Tracker("fourth", seen)],
        training__output_dir=str(result.output_dir.parent / "branch"),
        training__resume=str(result.output_dir / "checkpoints/step-00000008"),
        training__max_steps=9,
    )
    tiny(plugins=[Tracker("fifth", seen)], force=True)
    assert seen == ["first", "first", None, None], "a branch and a forced start are other runs"


def test_a_run_without_facts_has_no_field_for_them(tiny: TinyRun) -> None:
    assert "recorded" not in json.loads((tiny().output_dir / "run.json").read_text())


def test_a_fact_reads_as_it_will_in_a_later_launch(tmp_path: Path) -> None:
    given = {"pair": (1, 2.5), "nested": {3: [None, True, "text"]}}
    read = {"pair": [1, 2.5], "nested": {"3": [None, True, "text"]}}
    found: list[Any] = []

    def work(run: Any) -> None:
        run.record("own.fact", given)
        run.recorded("own.fact")["pair"].append("a copy")
        run.recorded("own.none", given)["pair"] = "a copy"
        found.extend([run.recorded("own.fact"), run.recorded("own.none"), run.recorded("own.none", 7)])

    train(At("on_step_end", 1, work), output_dir=tmp_path)
    assert found == [read, None, 7]
    assert given["pair"] == (1, 2.5)
    assert RunRecord.load(RunDir(tmp_path)).recorded == {"own.fact": read}
    later: list[Any] = []
    train(At("on_step_end", 4, lambda run: later.append(run.recorded("own.fact"))), output_dir=tmp_path, max_steps=4)
    assert later == [read]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("", 1, "was given '' as a key; expected text"),
        (None, 1, "was given None as a key; expected text"),
        ("own.fact", object(), "that JSON cannot hold"),
        ("own.fact", {1, 2}, "that JSON cannot hold"),
        ("own.fact", float("nan"), "that JSON cannot hold"),
        ("own.fact", {(1, 2): 3}, "that JSON cannot hold"),
        ("own.fact", deep(99), "that JSON cannot hold"),
        ("own.fact", deep(100_000), "that JSON cannot hold"),
    ],
)
def test_a_fact_that_run_json_cannot_hold_fails_its_plugin(tmp_path: Path, key: Any, value: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        train(At("on_step_end", 1, lambda run: run.record(key, value)), output_dir=tmp_path)
    assert RunRecord.load(RunDir(tmp_path)).recorded == {}, "the file is as it was"


def test_facts_are_there_from_the_start_of_the_run_on() -> None:
    for work in (lambda run: run.record("own.fact", 1), lambda run: run.recorded("own.fact")):
        with pytest.raises(PluginError, match=r"run\.record(ed)? does not exist yet: it is there from on_run_start on"):
            train(At("on_model_built", 0, work))


def test_a_secret_in_a_fact_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    train(At("on_step_end", 1, lambda run: run.record("own.url", ["x?key=0123456789abcdef"])), output_dir=tmp_path)
    assert RunRecord.load(RunDir(tmp_path)).recorded == {"own.url": ["x?key=(redacted)"]}


def test_a_full_disk_costs_the_fact_and_not_the_run(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: RunRecord) -> None:
        raise OSError(28, "No space left on device")

    def record(run: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(RunRecord, "write", no_room)
            run.record("own.fact", 1)

    result = tiny(plugins=[At("on_step_end", 1, record), At2("on_step_end", 2, lambda run: run.record("own.more", 2))])
    assert result.status == "completed"
    (failed,) = events(result, "output_failed")
    assert "run.json was not written: No space left" in failed["message"]
    assert RunRecord.load(RunDir(result.output_dir)).recorded == {"own.fact": 1, "own.more": 2}


def test_every_process_reads_what_the_main_one_has_written(tmp_path: Path) -> None:
    class Everywhere(Plugin[Any]):
        ranks, on_error = "all", "abort"

        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            earlier = 3 if event.step else None
            assert run.recorded("own.rank") == (0 if event.step else None), run.rank
            assert run.recorded("own.both") == earlier, run.rank
            run.record("own.both", 3)
            if run.is_main:
                run.record("own.rank", run.rank)

    for steps in (1, 2):
        outcomes = train_on_ranks(Everywhere, output_dir=tmp_path, max_steps=steps)
        assert [outcome.error for outcome in outcomes] == ["", ""]
    assert RunRecord.load(RunDir(tmp_path)).recorded == {"own.both": 3, "own.rank": 0}
