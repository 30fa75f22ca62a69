"""A stop request reaches the owner of a run and no other process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve

from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lock import Owner, RunLock
from gpt_simple.run_dir.status import StatusFile
from gpt_simple.run_dir.stop_request import ask_to_stop, take_stop_request

from .test_lock import in_child, kill, leave_behind


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture
def owner(run_dir: RunDir) -> Iterator[int]:
    """Another process that owns the directory and ends at the first signal."""
    yield in_child(lambda: RunLock(run_dir).acquire())
    assert not run_dir.stop_request.exists()


def test_the_owner_gets_a_signal(run_dir: RunDir, owner: int) -> None:
    assert f"asked process {owner} on" in ask_to_stop(run_dir)
    assert os.waitstatus_to_exitcode(os.waitpid(owner, 0)[1]) == -signal.SIGTERM


def test_with_force_it_is_ended(run_dir: RunDir, owner: int) -> None:
    assert f"ended process {owner} on" in ask_to_stop(run_dir, force=True)
    assert os.waitstatus_to_exitcode(os.waitpid(owner, 0)[1]) == -signal.SIGKILL


def test_one_on_another_machine_finds_a_request_once(run_dir: RunDir) -> None:
    leave_behind(run_dir, evolve(Owner.this_process(), host="node17", boot="its own"))
    with pytest.raises(CheckpointError, match="cannot be reached from here: run this on node17"):
        ask_to_stop(run_dir, force=True)
    assert take_stop_request(run_dir) == ""
    assert "left a request for process" in ask_to_stop(run_dir)
    assert take_stop_request(run_dir).startswith("gpt-simple stop on ")
    assert take_stop_request(run_dir) == ""


def test_a_number_that_another_process_has_now_is_not_signalled(run_dir: RunDir) -> None:
    """The lock is held, by a process that this system counts otherwise: in a container, for instance."""
    with RunLock(run_dir):
        me = Owner.this_process()
        leave_behind(run_dir, evolve(me, ticks=me.ticks + 1))
        assert "left a request" in ask_to_stop(run_dir)
    assert take_stop_request(run_dir)


@pytest.mark.skipif(not hasattr(signal, "pidfd_send_signal"), reason="this system has no process handles")
@pytest.mark.parametrize("refusal", [PermissionError(1, "not permitted"), ProcessLookupError(3, "no such process")])
def test_a_run_that_no_signal_reaches_finds_a_request(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, refusal: OSError
) -> None:
    """The run of another user, or a process that ends in this moment."""

    def refuse(*_: object) -> None:
        raise refusal

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    child = in_child(lambda: RunLock(run_dir).acquire())
    assert f"left a request for process {child} on" in ask_to_stop(run_dir)
    with pytest.raises(CheckpointError, match="cannot be reached from here"):
        ask_to_stop(run_dir, force=True)
    assert take_stop_request(run_dir).startswith("gpt-simple stop on ")
    kill(child)


def test_a_run_that_has_ended_needs_nothing(run_dir: RunDir) -> None:
    with pytest.raises(CheckpointError, match="there is no run"):
        ask_to_stop(run_dir)
    StatusFile(run_dir).update(state="completed", force=True)
    assert ask_to_stop(run_dir) == f"nothing to stop: the run in {run_dir.root} is completed"
