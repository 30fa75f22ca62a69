"""A stop at any moment: exit code 75, the right status, and a loadable checkpoint after the first step."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import Plugin, hookimpl
from gpt_simple.cli.main import BEGAN
from gpt_simple.errors import GptSimpleError
from gpt_simple.launch.signals import STOPPING, stop_on_signals
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import read_metrics
from gpt_simple.run_dir.lock import Owner
from gpt_simple.run_dir.status import read_status
from gpt_simple.run_dir.stop_request import ask_to_stop
from tests.children import At, At2, Ended, Everywhere, terminate_self, wait_until
from tests.conftest import Shell
from tests.tiny import TinyRun


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("on_model_built", 0, []),
        ("on_run_start", 0, []),
        ("on_step_start", 1, []),
        ("on_gradients", 1, []),
        ("on_step_end", 1, [1]),
        ("on_step_start", 2, [2]),
        ("on_checkpoint_saving", 2, [2, 3]),
        ("on_eval_end", 2, [2, 3]),
    ],
)
def test_a_stop_at_this_moment(apart: Callable[..., Ended], hook: str, step: int, saved: list[int]) -> None:
    options = {"training__save_steps": 2, "training__eval_steps": 2}
    ended = apart(plugins=[At(hook, step, terminate_self)], **options)
    assert (ended.code, ended.status.state, ended.status.reason) == (75, "stopped", "SIGTERM")
    assert (ended.steps, ended.status.step) == (saved, max(saved, default=0))
    again = apart(**options)
    assert (again.code, again.status.state) == (0, "completed")


def test_a_stop_in_the_last_step_finds_the_run_completed(apart: Callable[..., Ended]) -> None:
    ended = apart(plugins=[At("on_step_start", 6, terminate_self)])
    assert (ended.code, ended.status.state, ended.status.step, ended.steps) == (0, "completed", 6, [6])


def test_a_resumed_run_stopped_before_its_first_step_stays(apart: Callable[..., Ended]) -> None:
    assert apart(plugins=[At("on_step_end", 3, terminate_self)]).steps == [3]
    ended = apart(plugins=[At("on_step_start", 4, terminate_self)])
    assert (ended.code, ended.status.state, ended.status.step, ended.steps) == (75, "stopped", 3, [3])


def test_a_stop_during_data_preparation_changes_nothing(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        raise AssertionError("it went on")

    with monkeypatch.context() as patch:
        patch.setattr("gpt_simple.job.stages.prepare", prepare)
        result = tiny()
    assert (result.status, result.exit_code, result.reason, result.steps) == ("stopped", 75, "SIGTERM", 0)
    assert result.peak_memory_gib == pytest.approx(peak_gib(), rel=0.1)
    assert not (tmp_path / "run").exists()
    assert tiny().status == "completed"


def peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Evaluates(Plugin[Any]):
    """Stops the run after the third batch of an evaluation; ``batches`` counts."""

    ranks, on_error = "all", "abort"

    def __init__(self) -> None:
        super().__init__(None)
        self.batches = 0

    @hookimpl
    def evaluate(self, run: Any, event: Any) -> dict[str, Any]:
        for _ in run.val_batches():
            self.batches += 1
            if self.batches == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return {}


def test_a_stop_abandons_an_evaluation_between_batches(tiny: TinyRun) -> None:
    evaluates = Evaluates()
    result = tiny(plugins=[evaluates], training__eval_steps=2, training__save_steps=2, training__max_eval_batches=None)
    assert (result.status, result.exit_code, evaluates.batches) == ("stopped", 75, 3)
    assert result.checkpoint_path is not None
    events = [row["name"] for row in read_metrics(result.output_dir / "metrics.jsonl") if row["kind"] == "event"]
    assert "evaluation_abandoned" in events
    assert tiny().status == "completed"


def test_a_time_budget_abandons_an_evaluation_too(tiny: TinyRun) -> None:
    class Slow(Everywhere):
        @hookimpl
        def evaluate(self, run: Any, event: Any) -> dict[str, Any]:
            for _ in run.val_batches():
                time.sleep(0.5)
            return {}

    begin = time.monotonic()
    result = tiny(
        plugins=[Slow()],
        training__eval_steps=1,
        training__max_eval_batches=None,
        training__max_steps=1000,
        training__max_runtime_seconds=8,
        training__walltime_reserve_seconds=1,
    )
    assert result.status == "stopped"
    assert result.reason.startswith("the time budget is used up (training.max_runtime_seconds")
    assert time.monotonic() - begin < 30


def test_fifty_terminations_in_a_second_are_one(apart: Callable[..., Ended], tmp_path: Path) -> None:
    def storm(pid: int) -> None:
        wait_until(lambda: (tmp_path / "run/checkpoints/step-00000003").exists())
        for _ in range(50):
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.02)

    ended = apart(meanwhile=storm, plugins=[Lingers()], training__max_steps=100_000, training__save_steps=3)
    assert (ended.code, ended.status.state) == (75, "stopped")
    assert ended.steps[-1] == ended.status.step


def test_a_second_ctrl_c_is_named_in_the_status(apart: Callable[..., Ended]) -> None:
    def press_twice(run: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)

    ended = apart(plugins=[At("on_step_start", 4, press_twice)], training__save_steps=2)
    assert (ended.code, ended.steps) == (130, [2])
    assert (ended.status.state, ended.status.step) == ("stopped", 3)
    assert ended.status.reason == "second Ctrl-C: the steps since the last checkpoint are lost"


def test_a_budget_begins_with_the_program(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after the seconds that torch takes to load; and with several processes, with their launcher, whatever the
    clock says since.
    """
    began: list[float] = []

    def train(*_: Any, **options: Any) -> Any:
        began.append(options["started"])
        raise GptSimpleError("that is all")

    monkeypatch.setattr("gpt_simple.job.train.train", train)
    shell("run", "config.toml")
    monkeypatch.setenv("GPT_SIMPLE_LAUNCHED_AT", str(time.monotonic() - 100))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    shell("run", "config.toml")
    assert began[0] == BEGAN
    assert began[1] == pytest.approx(time.monotonic() - 100, abs=10)


class Lingers(Everywhere):
    """Keeps the process there until the storm is over."""

    @hookimpl
    def on_run_end(self, run: Any, event: Any) -> None:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            time.sleep(0.01)


def test_a_stop_request_from_another_machine_is_found(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_simple.engine.control._THROTTLE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "is_here", lambda owner: False)
        result = tiny(plugins=[At("on_step_end", 2, lambda run: ask_to_stop(RunDir(run.output_dir)))])
    assert (result.status, result.steps) == ("stopped", 2)
    assert result.reason.startswith("gpt-simple stop on ")
    assert tiny().status == "completed"


def test_a_stop_request_for_a_dead_process_is_ignored(tiny: TinyRun, tmp_path: Path) -> None:
    tiny()
    (tmp_path / "run/.stop").write_text('{"by": "a user"}')
    assert tiny(training__max_steps=8).status == "completed"


PROGRAM = [sys.executable, "-m", "gpt_simple"]


@pytest.mark.parametrize("force", [False, True])
def test_the_command_stops_a_run(here: Path, shell: Shell, force: bool) -> None:
    command = [*PROGRAM, "run", "config.toml", "--training.max_steps", "100000", "--training.logging_steps", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        assert run.stdout is not None
        next(line for line in run.stdout if line.startswith("step=3 "))
        ended = shell("stop", "out", *(["--force"] if force else []))
        assert ended.code == 0
        assert f"process {run.pid} on" in ended.out
        run.stdout.read()
        assert run.wait(60) == (-9 if force else 75)
    assert json.loads(shell("status", "out", "--json").out)["state"] == "stopped"
    if force:
        assert "gpt-simple stop --force on" in shell("status", "out").out
    assert "nothing to stop" in shell("stop", "out").out


@pytest.mark.slow
@pytest.mark.parametrize("progress", ["live", "lines"])
def test_closing_the_terminal_is_a_stop_like_any_other(here: Path, shell: Shell, progress: str) -> None:
    """Nothing can be printed any more, and that must not count."""
    options = ["--training.max_steps", "1000000", "--training.logging_steps", "1", "--progress", progress]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*PROGRAM, "run", "config.toml", *options])
    draining = threading.Thread(target=drain, args=(terminal,))
    draining.start()
    wait_until(lambda: (here / "out/status.json").exists() and read_status(RunDir(here / "out")).step >= 3)
    os.kill(pid, signal.SIGSTOP)
    os.close(terminal)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    draining.join()
    status = read_status(RunDir(here / "out"))
    assert (status.state, status.reason) == ("stopped", "SIGHUP")
    assert (here / f"out/checkpoints/step-{status.step:08d}/MANIFEST.json").exists()


def drain(terminal: int) -> None:
    """Reads what a program shows, until the terminal is closed."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 65536):
            pass


def test_a_hang_up_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(pytest.fail):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_program_loads_is_a_stop(here: Path) -> None:
    """torch takes seconds to load; until then there is nothing that could be lost."""
    script = (
        "import sys, importlib.abc, os, signal\n"
        "class Sends(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'gpt_simple.job.train':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Sends())\n"
        "from gpt_simple.cli.main import main; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "run", "config.toml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert "stopped: SIGTERM, before the first step" in done.stdout
    assert not (here / "out").exists()


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_that_the_parent_process_blocked_is_heard(number: signal.Signals) -> None:
    received: list[str] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        with stop_on_signals(received.append):
            os.kill(os.getpid(), number)
        assert received == [number.name]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {*before, *STOPPING}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_run_with_a_blocked_sigterm_stops(apart: Callable[..., Ended]) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        ended = apart(plugins=[At("on_step_end", 2, terminate_self)])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert (ended.code, ended.status.state, ended.status.reason) == (75, "stopped", "SIGTERM")


class Listens(At):
    """A plugin of somebody else, which wants to hear signals itself."""

    on_error = "disable"

    def __init__(self, hook: str, number: signal.Signals) -> None:
        super().__init__(hook, {"on_model_built": 0, "on_run_start": 0}.get(hook, 1), self.install)
        self.number = number

    def install(self, run: Any) -> None:
        signal.signal(self.number, signal.SIG_IGN)


@pytest.mark.parametrize("hook", ["on_model_built", "on_run_start", "on_step_start", "on_gradients", "on_step_end"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_plugin_cannot_disarm_a_signal(apart: Callable[..., Ended], hook: str, number: signal.Signals) -> None:
    def kill(run: Any) -> None:
        os.kill(os.getpid(), number)

    ended = apart(plugins=[Listens(hook, number), At2("on_step_end", 3, kill)])
    assert (ended.code, ended.status.state, ended.status.reason) == (75, "stopped", number.name)


def test_a_plugin_that_replaces_a_handler_is_named(tiny: TinyRun) -> None:
    result = tiny(plugins=[Listens("on_step_start", signal.SIGTERM)])
    (row,) = [row for row in read_metrics(result.output_dir / "metrics.jsonl") if row.get("name") == "plugin_failed"]
    assert (row["plugin"], row["hook"]) == ("listens", "on_step_start")
    assert "the process was left with other handlers of SIGTERM: put back what is changed" in row["message"]
