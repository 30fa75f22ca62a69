"""However a launch ends: which hooks are called, and what they find in the run directory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import GptSimpleError, Plugin, hookimpl, read_metrics
from gpt_simple.checkpoint.draft import Draft
from gpt_simple.hooks import NoConfig
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lock import owner_of
from gpt_simple.run_dir.status import read_status
from gpt_simple.testing import Recorder, misbehaving, train
from tests.job.witnesses import SOURCE, Watches, brings_source
from tests.run_dir.test_layout import snapshot


def does(hook: str, work: Callable[[Any], object], step: int | None = None) -> type[Plugin[NoConfig]]:
    """A plugin that does ``work(run)`` in ``hook``, at ``step`` if the hook has one."""

    def act(self: Any, run: Any, event: Any) -> None:
        if step is None or event.step == step:
            work(run)

    return type("Does", (Plugin,), {hook: hookimpl(act), "on_error": "abort"})


def terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def without_logs(recorder: Recorder) -> list[str]:
    return [hook for hook in recorder.hooks() if hook != "on_log"]


def fails_in(hook: str) -> type[Plugin[Any]]:
    return misbehaving(hook, "raises", on_error="abort")


ENDINGS = {
    "completed": ((), "completed", 3),
    "stopped in a step": ((does("on_step_end", lambda run: run.control.stop("enough"), 2),), "stopped", 2),
    "halted in a step": ((does("on_step_end", lambda run: run.control.halt("wrong"), 2),), "halted", 2),
    "stopped before a step": ((does("on_model_built", terminate),), "stopped", 0),
    "failed in build": ((fails_in("on_model_built"),), "failed", 0),
    "failed in on_run_start": ((fails_in("on_run_start"),), "failed", 0),
    "failed in a step": ((fails_in("on_step_end"),), "failed", 1),
    "failed in an evaluation": ((fails_in("evaluate"),), "failed", 2),
    "failed in on_run_end": ((fails_in("on_run_end"),), "failed", 3),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_last_hooks_find_a_final_status_and_a_free_lock(tmp_path: Path, ending: str) -> None:
    """No thread is left, and nothing in the directory changes any more."""
    plugins, state, step = ENDINGS[ending]
    watches = Watches()
    failed = state == "failed"
    if failed:
        with pytest.raises(GptSimpleError):
            train(*plugins, watches, output_dir=tmp_path)
    else:
        assert train(*plugins, watches, output_dir=tmp_path).result.status == state
    assert [(found.hook, found.ok) for found in watches.found] == (
        [("on_run_error", False), ("on_close", False)] if failed else [("on_close", True)]
    )
    for found in watches.found:
        assert (found.state, found.step, found.lock, found.threads) == (state, step, "gone", ())
        assert found.files == snapshot(tmp_path)
    assert (tmp_path / "summary.json").exists() == (state != "failed" and step > 0)


def test_a_stop_before_the_claim_calls_no_hook_of_a_run(tmp_path: Path) -> None:
    recorder = Recorder()
    stopped = train(brings_source(terminate), output_dir=tmp_path / "run", overrides=SOURCE, recorder=recorder)
    assert (stopped.result.status, stopped.result.reason, int(stopped.result.exit_code)) == ("stopped", "SIGTERM", 75)
    assert without_logs(recorder) == ["check_config", "on_close"]
    assert recorder.events("on_close")[0].ok is True
    assert not (tmp_path / "run").exists()


def test_a_stop_while_a_run_is_built_is_no_failure_of_it(tmp_path: Path) -> None:
    recorder = Recorder()
    stopped = train(does("on_model_built", terminate), output_dir=tmp_path, recorder=recorder)
    assert (stopped.result.status, int(stopped.result.exit_code)) == ("stopped", 75)
    assert without_logs(recorder) == ["check_config", "check_runtime", "on_close"]
    assert recorder.events("on_close")[0].ok is True
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "run.json").exists()


def test_a_finished_run_is_checked_and_closed_and_no_more(tmp_path: Path) -> None:
    train(output_dir=tmp_path)
    before = snapshot(tmp_path)
    recorder = Recorder()
    assert train(output_dir=tmp_path, recorder=recorder).result.exit_code == 0
    assert without_logs(recorder) == ["check_config", "check_runtime", "on_close"]
    assert recorder.events("on_close")[0].ok is True
    assert snapshot(tmp_path) == before


def test_a_failed_run_says_so_before_it_waits_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is written in the background arrives, and the directory is kept until then."""
    found: list[tuple[str, str]] = []
    real = Draft.add_tensors

    def add_tensors(self: Draft, stem: str, tensors: Any) -> None:
        deadline = time.monotonic() + 10
        while read_status(RunDir(tmp_path)).state != "failed" and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        found.append((read_status(RunDir(tmp_path)).state, owner_of(RunDir(tmp_path))[1]))
        real(self, stem, tensors)

    monkeypatch.setattr(Draft, "add_tensors", add_tensors)

    def fail(run: Any) -> None:
        raise ValueError("boom")

    watches = Watches()
    with pytest.raises(GptSimpleError, match="boom"):
        train(
            does("on_step_start", fail, 3),
            watches,
            output_dir=tmp_path,
            overrides={"training.background_save": True, "training.eval_steps": None},
        )
    assert found
    assert set(found) == {("failed", "holds")}
    assert [found.hook for found in watches.found] == ["on_run_error", "on_close"]
    for found in watches.found:
        assert (found.state, found.lock, found.threads) == ("failed", "gone", ())
        assert "checkpoints/step-00000002/MANIFEST.json" in found.files


class FullDisk(FileIO):
    """A file of metrics on a disk without room as long as ``full``."""

    full = False

    def write(self, data: Any) -> int:
        if FullDisk.full:
            raise OSError(28, "No space left on device")
        return super().write(data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> type[FullDisk]:
    monkeypatch.setattr(FullDisk, "full", False)
    monkeypatch.setattr("gpt_simple.plugins.metrics.FileIO", FullDisk)
    return FullDisk


def rows(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]


def test_rows_that_wait_are_written_before_the_run_fails(tmp_path: Path, disk: type[FullDisk]) -> None:
    """As soon as there is room, not only when there is another row."""

    class Fills(Plugin[NoConfig]):
        on_error = "abort"

        @hookimpl
        def on_step_start(self, run: Any, event: Any) -> None:
            disk.full = event.step == 2
            if event.step == 4:
                raise ValueError("boom")

    watches = Watches()
    with pytest.raises(GptSimpleError, match="boom"):
        train(Fills, watches, output_dir=tmp_path, max_steps=5, overrides={"training.logging_steps": 2})
    assert rows(tmp_path) == [2]
    assert watches.found[-1].files == snapshot(tmp_path)


def test_rows_that_still_wait_at_the_end_are_reported(
    tmp_path: Path, disk: type[FullDisk], capsys: pytest.CaptureFixture[str]
) -> None:
    """The directory may be another run's already, so they are not written then."""

    class Fills(Plugin[NoConfig]):
        on_error = "abort"

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            if event.step == 2:
                disk.full = True
            if event.step == 3:
                raise ValueError("boom")

        @hookimpl
        def on_run_error(self, run: Any, event: Any) -> None:
            disk.full = False

    watches = Watches()
    with pytest.raises(GptSimpleError, match="boom"):
        train(Fills, watches, output_dir=tmp_path, max_steps=5)
    assert rows(tmp_path) == [1]
    assert watches.found[-1].files == snapshot(tmp_path)
    assert "metrics.jsonl: the last rows could not be written" in capsys.readouterr().err
