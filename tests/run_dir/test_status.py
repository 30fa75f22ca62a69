"""The status is correct from any process and however the run ended."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from click.testing import CliRunner

from gpt_simple.cli.status import describe
from gpt_simple.cli.status import status as command
from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir import status as status_module
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lock import Owner, RunLock
from gpt_simple.run_dir.status import Status, StatusFile, read_status

from .test_lock import in_child, kill, leave_behind


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def test_a_live_run_is_running_and_a_killed_one_crashed(run_dir: RunDir) -> None:
    def work() -> None:
        RunLock(run_dir).acquire()
        StatusFile(run_dir).update(step=7, max_steps=10, loss=1.5)

    child = in_child(work)
    alive = read_status(run_dir)
    kill(child)
    dead = read_status(run_dir)
    assert (alive.state, alive.step, alive.pid, alive.note) == ("running", 7, child, None)
    assert (dead.state, dead.step, dead.loss) == ("crashed", 7, 1.5)
    assert f"process {child} " in str(dead.note)


@pytest.mark.parametrize("state", ["completed", "stopped", "halted", "failed"])
def test_an_end_that_was_written_down_stays(run_dir: RunDir, state: str) -> None:
    def work() -> None:
        RunLock(run_dir).acquire()
        StatusFile(run_dir).update(state=state, reason="why", error="what")

    kill(in_child(work))
    found = read_status(run_dir)
    assert (found.state, found.reason, found.error) == (state, "why", "what")


def test_a_run_killed_before_its_first_status_has_crashed(run_dir: RunDir) -> None:
    child = in_child(lambda: RunLock(run_dir).acquire())
    starting = read_status(run_dir)
    kill(child)
    assert (starting.state, starting.pid) == ("running", child)
    assert (read_status(run_dir).state, read_status(run_dir).pid) == ("crashed", child)


def test_a_crashed_run_reached_at_least_its_newest_checkpoint(run_dir: RunDir) -> None:
    (run_dir.checkpoints / "step-00000012").mkdir(parents=True)
    for no_checkpoint in (".step-00000013.tmp-1", "step-00000014.damaged", "step-00000014.damaged-2"):
        (run_dir.checkpoints / no_checkpoint).mkdir()
    StatusFile(run_dir).update(state="running", step=7, force=True)
    status = read_status(run_dir)
    assert (status.state, status.step) == ("crashed", 12)


def test_a_run_that_let_go_without_a_word_has_crashed(run_dir: RunDir) -> None:
    with RunLock(run_dir):
        StatusFile(run_dir).update(step=1)
    assert read_status(run_dir).state == "crashed"


def test_a_run_on_an_invisible_machine_is_not_called_dead(run_dir: RunDir) -> None:
    StatusFile(run_dir).update(step=1, host="node17", pid=42)
    leave_behind(run_dir, evolve(Owner.this_process(), host="node17", boot="its own", pid=42))
    found = read_status(run_dir)
    assert found.state == "running"
    assert "process 42 on node17 cannot be seen from here" in str(found.note)


@pytest.mark.parametrize("content", ["", '{"state": "runn', "[]", '{"step": 3}'])
def test_a_torn_status_is_not_believed(run_dir: RunDir, content: str) -> None:
    run_dir.status_json.write_text(content)
    with pytest.raises(CheckpointError, match="there is no run in"):
        read_status(run_dir)


def test_fields_of_a_newer_version_are_ignored(run_dir: RunDir) -> None:
    run_dir.status_json.write_text(json.dumps({"state": "completed", "step": 3, "mood": "good"}))
    assert read_status(run_dir) == Status("completed", step=3)


def test_writing_is_throttled_and_a_change_of_state_is_not(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[tuple[Any, bool]] = []
    monkeypatch.setattr(
        status_module, "write_json", lambda path, value, durable: writes.append((value["step"], durable))
    )
    file = StatusFile(run_dir)
    for step in range(1, 100):
        file.update(step=step)
    file.update(step=100, force=True)
    file.update(step=101)
    file.update(state="completed")
    assert writes == [(1, False), (100, True), (101, True)]


def test_after_a_full_disk_the_next_update_tries_again(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    file = StatusFile(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(status_module, "write_json", full)
        file.update(step=1)
    file.update(step=2)
    assert json.loads(run_dir.status_json.read_text())["step"] == 2


def test_the_end_is_written_where_no_second_file_fits(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    file = StatusFile(run_dir)
    file.update(step=1, max_steps=10_000_000, reason="long" * 20)
    monkeypatch.setattr(status_module, "write_json", full)
    file.update(state="failed", step=7, reason=None, error="no room", max_steps=8)
    assert (read_status(run_dir).state, read_status(run_dir).error) == ("failed", "no room")
    file.update(error="x" * 100_000, force=True)
    assert read_status(run_dir).error == "no room", "a text that does not fit must not tear the last one"


def test_a_loss_that_is_not_a_number_is_null(run_dir: RunDir) -> None:
    StatusFile(run_dir).update(loss=math.nan)
    assert json.loads(run_dir.status_json.read_text())["loss"] is None


def test_the_command_prints_text_and_json(run_dir: RunDir) -> None:
    with RunLock(run_dir):
        StatusFile(run_dir).update(step=120, max_steps=1000, loss=3.25, tokens_per_second=5120.4, eta_seconds=75)
        text = CliRunner().invoke(command, [str(run_dir.root)])
        data = CliRunner().invoke(command, [str(run_dir.root), "--json"])
    assert text.exit_code == 0
    assert text.output.startswith("running  step 120/1000  loss 3.2500  5,120 tokens/s  0:01:15 left\n")
    assert f"process {os.getpid()} on " in text.output
    assert {"state": "running", "step": 120, "loss": 3.25}.items() <= json.loads(data.output).items()


def test_the_text_of_an_ended_run_has_its_reason_and_no_forecast() -> None:
    failed = Status("failed", step=3, loss=2.0, tokens_per_second=9.0, eta_seconds=9.0, error="DataError: it is gone")
    assert describe(failed, now=0.0) == "failed  step 3  loss 2.0000\nDataError: it is gone"


def test_a_clock_that_was_set_back_gives_no_negative_age() -> None:
    status = Status("running", host="h", pid=1, time=1000.0)
    assert describe(status, now=10.0).endswith("updated 0:00:00 ago")


def test_asking_does_not_load_torch(run_dir: RunDir) -> None:
    code = (
        "import sys; from gpt_simple.cli.status import status;"
        "status.main([sys.argv[1]], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    StatusFile(run_dir).update(state="completed")
    subprocess.run([sys.executable, "-c", code, str(run_dir.root)], check=True)
