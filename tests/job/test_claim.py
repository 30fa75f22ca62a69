"""A run directory has one owner, who keeps it and leaves alone what another run has written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_simple.errors import GptSimpleError
from gpt_simple.job.claim import LockLost
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord, read_metrics
from gpt_simple.run_dir.lock import RunLock
from gpt_simple.run_dir.status import read_status
from tests.children import At, At2, Ended
from tests.engine.test_loss_monitor import events
from tests.run_dir.test_lock import in_child, kill
from tests.tiny import TinyRun


def delete(run: Any) -> None:
    shutil.rmtree(run.output_dir)


def test_a_directory_deleted_during_the_run_is_made_again(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_directory_that_another_run_took_is_left_alone(tiny: TinyRun, tmp_path: Path) -> None:
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


def test_a_missing_run_json_is_logged(tiny: TinyRun) -> None:
    result = tiny()
    (result.output_dir / "run.json").unlink()
    assert len(events(tiny(training__max_steps=8), "record_gone")) == 1


def test_leftovers_of_a_dead_process_are_removed(tiny: TinyRun) -> None:
    result = tiny(training__keep_last_k=None)
    leftover = result.output_dir / "checkpoints/.step-00000004.tmp-999999999"
    leftover.mkdir()
    assert tiny(training__keep_last_k=None, training__max_steps=8).status == "completed"
    assert not leftover.exists()


def test_a_second_run_in_the_directory_is_refused(apart: Callable[..., Ended], tiny: TinyRun) -> None:
    def second(run: Any) -> None:
        before = sorted(run.output_dir.rglob("*"))
        for force in (False, True):
            with pytest.raises(GptSimpleError, match="is in use by process"):
                tiny(force=force)
        assert sorted(run.output_dir.rglob("*")) == before

    assert apart(plugins=[At("on_step_end", 3, second)]).code == 0


def test_an_unwritable_summary_does_not_fail_the_run(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: Any, **_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gpt_simple.job.summary.write_json", full)
    result = tiny()
    assert (result.status, read_status(RunDir(result.output_dir)).state) == ("completed", "completed")
    assert "summary.json was not written: No space left" in events(result, "output_failed")[0]["message"]
