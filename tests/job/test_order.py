"""The order of the stages of a launch: what is refused first, and what a failure in a stage leaves behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import CheckpointError, GptSimpleError, Plugin, hookimpl, read_metrics
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.hooks import NoConfig
from gpt_simple.job.train import train as train_spec
from gpt_simple.launch.signals import stop_on_signals
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lock import owner_of
from gpt_simple.run_dir.status import read_status
from gpt_simple.spec import resolve_spec
from gpt_simple.testing import Recorder, misbehaving, train
from tests.children import At, Everywhere
from tests.job.witnesses import SOURCE, brings_source
from tests.launch.conftest import Ranks, ranks, tiny
from tests.launch.test_failures import reported
from tests.run_dir.test_layout import snapshot
from tests.tiny import TINY

__all__ = ["ranks"]


def lineage(run: Path) -> list[Any]:
    entries: list[Any] = json.loads((run / "run.json").read_text())["lineage"]
    return entries


def test_a_checkpoint_is_refused_before_data_are_prepared(tmp_path: Path) -> None:
    run, touched = tmp_path / "run", []
    train(output_dir=run)
    source = brings_source(lambda: touched.append("read"))

    def refused(resume: str) -> None:
        found = snapshot(run)
        with pytest.raises(CheckpointError):
            train(source, output_dir=run, max_steps=5, overrides={**SOURCE, "training.resume": resume})
        assert touched == []
        assert snapshot(run) == found

    refused("scratch")
    for path in run.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    refused("auto")
    train(source, output_dir=tmp_path / "other", max_steps=5, overrides=SOURCE)
    assert touched != []


def test_a_failed_build_adds_no_lineage_entry(tmp_path: Path) -> None:
    train(output_dir=tmp_path)
    for hook in ("on_model_built", "on_checkpoint_loaded"):
        with pytest.raises(GptSimpleError, match="misbehaving"):
            train(misbehaving(hook, "raises", on_error="abort"), output_dir=tmp_path, max_steps=5)
        assert read_status(RunDir(tmp_path)).state == "failed"
        assert len(lineage(tmp_path)) == 1
    train(output_dir=tmp_path, max_steps=5)
    assert [entry["step"] for entry in lineage(tmp_path)] == [0, 3]


def test_log_rows_before_the_first_step_carry_their_step(tmp_path: Path) -> None:
    """Step 0 until the checkpoint is restored, then the checkpoint's."""

    class Logs(Plugin[NoConfig]):
        on_error = "abort"

        @hookimpl
        def check_runtime(self, run: Any) -> list[Any]:
            run.log.info("checking", name="check_runtime")
            return []

        @hookimpl
        def on_model_built(self, run: Any, event: Any) -> None:
            run.log.info("built", name="on_model_built")

        @hookimpl
        def on_checkpoint_loaded(self, run: Any, event: Any) -> None:
            run.log.info("restored", name="on_checkpoint_loaded")

        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            run.log.info("starting", name="on_run_start")

    train(output_dir=tmp_path)
    recorder = Recorder()
    train(Logs, output_dir=tmp_path, max_steps=5, recorder=recorder)
    expected = {"check_runtime": 0, "on_model_built": 0, "on_checkpoint_loaded": 3, "on_run_start": 3}
    assert {row.name: row.step for row in recorder.events("on_log") if row.name in expected} == expected
    rows = read_metrics(tmp_path / "metrics.jsonl", "event")
    assert {row["name"]: row["step"] for row in rows if row["name"] in expected} == expected


def test_run_info_counts_what_on_model_built_changed(tmp_path: Path) -> None:
    class Adds(Plugin[NoConfig]):
        on_error = "abort"

        @hookimpl
        def on_model_built(self, run: Any, event: Any) -> None:
            event.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(7)))

    counts = []
    for name, plugins in {"plain": [], "more": [Adds]}.items():
        recorder = Recorder()
        train(*plugins, output_dir=tmp_path / name, recorder=recorder)
        (start,) = recorder.events("on_run_start")
        written = json.loads((tmp_path / name / "run.json").read_text())["facts"]["run"]
        assert written["parameters"] == start.facts["parameters"]
        counts.append(written["parameters"])
    assert counts[1] == counts[0] + 7


class FailsToRestore(Everywhere):
    """Its state cannot be loaded on one rank."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def state_dict(self) -> dict[str, Any]:
        return {"kept": 1}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        if self.fails:
            raise ValueError("boom")


def explode(run: Any) -> None:
    if run.rank == 1:
        raise ValueError("boom")


@pytest.mark.parametrize("stage", ["claim", "restore", "build"])
def test_a_failure_of_one_rank_before_training_ends_all(ranks: Ranks, tmp_path: Path, stage: str) -> None:
    """With one error, and the run directory is free again."""
    run_dir = RunDir(tmp_path / "run")

    def work(rank: int, steps: int, fails: bool) -> Any:
        plugins: list[Everywhere] = [FailsToRestore(fails and stage == "restore" and rank == 1)]
        if fails and stage == "build":
            plugins.append(At("on_model_built", 0, explode))
        return tiny(run_dir.root, plugins=plugins, training__max_steps=steps).status

    assert ranks(2, lambda rank: work(rank, 2, False)) == ["completed"] * 2
    entries = lineage(run_dir.root)
    if stage == "claim":
        run_dir.run_json.write_text("{")
    answers = ranks(2, lambda rank: work(rank, 4, True))
    ((rank, error, text),) = reported(answers)
    failed, kind, message = {
        "claim": (0, "CheckpointError", "run.json is damaged"),
        "restore": (1, "PluginError", "ValueError: boom"),
        "build": (1, "PluginError", "ValueError: boom"),
    }[stage]
    assert (rank, error) == (failed, kind)
    assert message in text
    assert len({answer["code"] for answer in answers}) == 1
    assert owner_of(run_dir) == (None, "gone")
    assert read_status(run_dir).state == ("completed" if stage == "claim" else "failed")
    if stage != "claim":
        assert lineage(run_dir.root) == entries


@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_while_the_processes_join_stops_the_run(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The handlers of the program are still installed then: it passes on what they noted."""
    join = ProcessGroup.join

    def interrupted(*arguments: Any) -> ProcessGroup:
        if int(os.environ.get("RANK", "0")) == count - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return join(*arguments)

    def work(rank: int) -> list[Any]:
        pending: list[str] = []
        with stop_on_signals(pending.append):
            spec = resolve_spec(
                None, sections={**TINY, "training": {**TINY["training"], "output_dir": str(tmp_path / "run")}}
            )
            result = train_spec(spec, pending_signals=pending)
        return [result.status, result.reason, result.steps, int(result.exit_code)]

    monkeypatch.setattr(ProcessGroup, "join", interrupted)
    reasons = ["another process was asked to stop"] * (count - 1) + ["SIGTERM"]
    assert ranks(count, work) == [["stopped", reason, 0, 75] for reason in reasons]
    assert not (tmp_path / "run").exists()
