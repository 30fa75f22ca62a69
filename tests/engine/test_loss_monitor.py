"""Numbers that go wrong: skipped, counted, reported with their samples, and never saved."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import Plugin, TrainResult, hookimpl
from gpt_simple.checkpoint.draft import Draft
from gpt_simple.engine.loss_monitor import LossMonitor, StepRecord, all_finite
from gpt_simple.errors import GptSimpleError
from gpt_simple.job.claim import LockLost
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord, read_metrics
from gpt_simple.run_dir.lock import RunLock
from gpt_simple.run_dir.status import read_status
from tests.children import At, At2, Ended
from tests.run_dir.test_lock import in_child, kill
from tests.tiny import TinyRun, weights


class Spoils(Plugin[Any]):
    """From step ``first`` to ``last`` the loss (a weight is NaN in the forward) or one gradient is no number."""

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
def test_too_many_skipped_steps_in_a_row_halt_the_run_and_name_the_samples(tiny: TinyRun, what: str) -> None:
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


def test_fewer_change_nothing(tiny: TinyRun) -> None:
    result = tiny(plugins=[Spoils(3, 5, "one gradient")], training__max_skipped_steps=4, training__max_steps=8)
    assert (result.status, result.steps) == ("completed", 8)


def test_skipped_steps_are_seen_when_nothing_is_logged(tiny: TinyRun) -> None:
    result = tiny(
        plugins=[Spoils(2, 400, "one gradient")],
        training__max_skipped_steps=4,
        training__max_steps=400,
        training__logging_steps=None,
    )
    assert (result.status, result.steps) == ("halted", 100)


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


def test_weights_that_are_not_finite_are_never_saved_in_the_background_either(tiny: TinyRun) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_weights_are_numbers(dtype: torch.dtype) -> None:
    large = torch.full((1000,), 0.9 * torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([large, torch.ones(3), torch.empty(0)])
    for wrong in (math.nan, math.inf, -math.inf):
        large[-1] = wrong
        assert not all_finite([torch.ones(3), large])
    assert not all_finite([torch.tensor([math.inf, -math.inf])])
    assert all_finite([])


def test_weights_that_break_in_the_last_step_are_not_saved_either(tiny: TinyRun) -> None:
    def break_a_weight(run: Any) -> None:
        next(run.model.parameters()).data[0, 0] = math.inf

    result = tiny(plugins=[At("on_step_end", 6, break_a_weight)])
    assert (result.status, result.checkpoint_path) == ("halted", None)
    assert "there is no earlier checkpoint" in result.reason


def test_a_spike_is_reported_once_with_its_samples(tiny: TinyRun) -> None:
    class Scrambles(Plugin[Any]):
        ranks, on_error = "all", "abort"

        @hookimpl
        def on_batch(self, run: Any, event: Any) -> None:
            if event.step == 105:
                event.batch.labels.fill_(255)

    result = tiny(plugins=[Scrambles(None)], training__max_steps=120, training__logging_steps=20)
    (row,) = events(result, "loss_spike")
    assert row["at"] == 105
    assert "samples 416 to 419" in row["message"]


def made(losses: list[float], skipped: tuple[int, ...] = ()) -> list[StepRecord]:
    return [StepRecord(step, 8 * (step - 1), 8, loss, step in skipped) for step, loss in enumerate(losses, 1)]


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0)).tolist()
    falling = [2 + 8 * math.exp(-step / 200) + 0.1 * noise[step] for step in range(2000)]
    assert LossMonitor(None).spike(made(falling)) is None


def test_a_level_that_stays_high_is_reported_and_then_usual() -> None:
    losses = [3.0 + 0.01 * (step % 2) for step in range(100)] + [9.0] * 300
    watch = LossMonitor(None)
    steps = made(losses)
    spike = watch.spike(steps[:101])
    assert spike is not None
    assert spike.record.step == 101
    watch.spike(steps[101:390])
    assert watch.spike(steps[390:]) is None


def test_a_streak_is_followed_over_logging_points() -> None:
    steps = made([1.0] * 10, skipped=(3, 4, 5, 6))
    watch = LossMonitor(4)
    assert watch.streak(steps[:5]) == ""
    assert "3 to 6" in watch.streak(steps[5:])
    watch = LossMonitor(4)
    assert watch.streak([*steps[:4], steps[8], *steps[4:6]]) == ""


def test_a_full_disk_costs_no_step_and_is_tried_again_when_the_log_is_due(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = Draft.add_tensors, [True]

    def add_tensors(self: Draft, stem: str, tensors: Any) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, stem, tensors)

    def make_room(run: Any) -> None:
        full[0] = False

    monkeypatch.setattr(Draft, "add_tensors", add_tensors)
    result = tiny(
        plugins=[At("on_step_end", 7, make_room)],
        training__max_steps=20,
        training__save_steps=4,
        training__logging_steps=2,
        training__keep_last_k=None,
    )
    assert result.status == "completed"
    failed = events(result, "checkpoint_failed")
    assert [row["step"] for row in failed] == [4], "told once, not with every attempt"
    assert "No space left on device; it needs" in failed[0]["message"]
    assert [row["step"] for row in events(result, "checkpoint")] == [8, 12, 16, 20]


def delete(run: Any) -> None:
    shutil.rmtree(run.output_dir)


def test_a_directory_that_is_deleted_under_the_run_is_told_and_made_anew(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_simple.engine.control._THROTTLE_SECONDS", 0.0)
    names: set[str] = set()

    def look(run: Any) -> None:
        assert read_status(RunDir(run.output_dir)).state == "running"
        names.update(path.name for path in run.output_dir.iterdir())
        with pytest.raises(GptSimpleError, match="is in use by process"):
            tiny()

    result = tiny(
        plugins=[At("on_step_end", 3, delete), At2("on_step_end", 4, look)],
        training__save_steps=2,
        training__logging_steps=1,
    )
    assert (result.status, result.steps) == ("completed", 6)
    assert names == {".lock", "run.json", "status.json", "metrics.jsonl", "tokenizer"}
    assert [row["step"] for row in events(result, "output_gone")] == [3]
    rows = read_metrics(result.output_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    longer = tiny(training__max_steps=8)
    assert (longer.status, longer.steps) == ("completed", 8)
    assert len(RunRecord.load(RunDir(result.output_dir)).lineage) == 2


def test_a_run_whose_place_another_has_taken_leaves_it_alone(tiny: TinyRun, tmp_path: Path) -> None:
    others: list[int] = []
    run_dir = RunDir(tmp_path / "run")

    def take(run: Any) -> None:
        delete(run)
        run_dir.create()
        others.append(in_child(lambda: RunLock(run_dir).acquire()))
        (run_dir.root / "metrics.jsonl").write_text("theirs\n")

    try:
        with pytest.raises(LockLost, match=r"was deleted under the run, and another began there: .* process \d+"):
            tiny(plugins=[At("on_step_end", 3, take)], training__save_steps=4)
    finally:
        kill(others[0])
    assert {path.name for path in run_dir.root.iterdir()} == {".lock", "metrics.jsonl"}
    assert (run_dir.root / "metrics.jsonl").read_text() == "theirs\n"


def test_rows_of_metrics_wait_for_room_on_the_disk(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk(FileIO):
        """Takes half of what it is given while step 2 and 3 are told, then nothing."""

        def write(self, data: Any) -> int:
            if full[0] == 1:
                full[0] = 2
                return super().write(bytes(data[: len(data) // 2]))
            if full[0] == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def fill(run: Any) -> None:
        full[0] = 1

    def make_room(run: Any) -> None:
        full[0] = 0

    full = [0]
    monkeypatch.setattr("gpt_simple.plugins.metrics.FileIO", Disk)
    plugins = [At("on_step_start", 2, fill), At2("on_step_start", 4, make_room)]
    result = tiny(plugins=plugins, training__logging_steps=1)
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    warned = [row["message"] for row in rows if row.get("level") == "warning"]
    assert [text.partition(": ")[2] for text in warned] == [
        "No space left on device; the rows are kept and written later"
    ]


def test_a_summary_that_cannot_be_written_makes_no_failure_of_a_run(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any, **_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gpt_simple.job.summary.write_json", full)
    result = tiny()
    assert (result.status, read_status(RunDir(result.output_dir)).state) == ("completed", "completed")
    assert "summary.json was not written: No space left" in events(result, "output_failed")[0]["message"]


def test_a_run_json_that_is_gone_is_told(tiny: TinyRun) -> None:
    result = tiny()
    (result.output_dir / "run.json").unlink()
    assert len(events(tiny(training__max_steps=8), "record_gone")) == 1


def test_leftovers_of_a_dead_process_are_swept_at_the_start(tiny: TinyRun) -> None:
    result = tiny(training__keep_last_k=None)
    leftover = result.output_dir / "checkpoints/.step-00000004.tmp-999999999"
    leftover.mkdir()
    assert tiny(training__keep_last_k=None, training__max_steps=8).status == "completed"
    assert not leftover.exists()


def test_two_runs_in_one_directory_are_one(apart: Callable[..., Ended], tiny: TinyRun) -> None:
    def second(run: Any) -> None:
        before = sorted(run.output_dir.rglob("*"))
        for force in (False, True):
            with pytest.raises(GptSimpleError, match="is in use by process"):
                tiny(force=force)
        assert sorted(run.output_dir.rglob("*")) == before

    assert apart(plugins=[At("on_step_end", 3, second)]).code == 0
