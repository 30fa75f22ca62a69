"""``gpt-simple run --nproc_per_node``: one command, one message, one exit code, and no process left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gpt_simple.launch.member import GRACE_SECONDS
from tests.conftest import CONFIG

PROGRAM = [sys.executable, "-P", "-m", "gpt_simple"]
LONG = ("--training.max_steps", "1000000", "--training.logging_steps", "1", "--training.eval_steps", "0")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


def gpt_simple(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, "run", "config.toml", *options], capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def started(*options: str, until: str = "step=3 ") -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launch that has come as far as a line that begins with ``until``, and the processes that it started."""
    command = [*PROGRAM, "run", "config.toml", "--nproc_per_node", "2", *LONG, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if line.startswith(until):
                break
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        try:
            yield launcher, [int(child) for child in children]
        finally:
            for pid in (*map(int, children), launcher.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def gone(processes: list[int], within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in processes):
            return True
        time.sleep(0.05)
    return False


def free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def status(here: Path) -> dict[str, object]:
    document: dict[str, object] = json.loads((here / "out/status.json").read_text())
    return document


def test_two_processes_train_like_one_and_one_of_them_prints(here: Path) -> None:
    with socket.socket() as taken:
        # A script for several machines that got one: the endpoint is not used, and its port may be taken.
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        two = gpt_simple("--nproc_per_node", "2", "--nnodes", "1", "--rdzv_endpoint", endpoint)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("step=4 tokens=512 loss=") == 1
    assert "2 processes" in two.stdout
    assert not [line for line in two.stderr.splitlines() if not line.startswith("warning:")], two.stderr


def test_a_mistake_in_the_configuration_costs_no_process(here: Path) -> None:
    begin = time.monotonic()
    ended = gpt_simple("--nproc_per_node", "2", "--model.n_embed", "5")
    assert ended.returncode == 2
    assert ended.stderr.count("n_embed") == 1
    assert time.monotonic() - begin < 5
    assert not (here / "out").exists()


def test_a_mistake_of_the_processes_is_reported_once(here: Path) -> None:
    """With its exit code, and no restart repeats it."""
    options = ("--nproc_per_node", "2", "--data.source", "files", "--data.path", "missing", "--data.format", "text")
    ended = gpt_simple(*options, "--max_restarts", "2")
    assert ended.returncode == 3
    assert ended.stderr.count("error:") == 1
    assert ended.stderr.count("missing") == 1
    assert "Traceback" not in ended.stderr
    assert "torch" not in ended.stderr


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_in_a_checkpoint_and_75(here: Path, number: signal.Signals) -> None:
    with started() as (launcher, processes):
        assert len(processes) == 2
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=60)
        assert launcher.returncode == 75, err
    assert f"stopped: {number.name}" in out
    assert status(here)["state"] == "stopped"
    assert (here / f"out/checkpoints/step-{status(here)['step']:08d}/MANIFEST.json").exists()
    assert gone(processes, 0.1)
    assert "error" not in err


@pytest.mark.slow
def test_two_presses_of_ctrl_c_leave_at_once(here: Path) -> None:
    (here / "slow.py").write_text(
        "import time\n"
        "from gpt_simple import Plugin, hookimpl\n"
        "class Slow(Plugin):\n"
        "    @hookimpl\n"
        "    def on_step_start(self, run, event):\n"
        "        print('sleeping', flush=True)\n"
        "        time.sleep(60)\n"
    )
    with started("-p", "./slow.py", until="sleeping") as (launcher, processes):
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.6)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(20) == 130
    assert gone(processes, 0.1)
    assert (status(here)["state"], status(here)["reason"][:14]) == ("stopped", "second Ctrl-C:")


def test_processes_save_and_leave_when_their_launcher_is_killed(here: Path) -> None:
    with started() as (launcher, processes):
        launcher.kill()
        launcher.wait()
        assert gone(processes, 20)
    assert status(here)["state"] == "stopped"
    assert (here / f"out/checkpoints/step-{status(here)['step']:08d}/MANIFEST.json").exists()


@pytest.mark.slow
def test_processes_whose_launcher_dies_as_they_begin_do_not_stay(here: Path) -> None:
    command = [*PROGRAM, "run", "config.toml", "--nproc_per_node", "2", *LONG]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        deadline = time.monotonic() + 60
        while len(processes := children.read_text().split()) < 2:
            assert time.monotonic() < deadline
        launcher.kill()
        launcher.wait()
    assert gone([int(pid) for pid in processes], GRACE_SECONDS + 15)


def test_a_process_that_is_killed_is_named(here: Path) -> None:
    with started() as (launcher, processes):
        os.kill(processes[1], signal.SIGKILL)
        _, err = launcher.communicate(timeout=60)
        assert launcher.returncode == 1
        assert gone(processes, 0.1)
    message = "error: process 1 was killed (SIGKILL: the system does that when memory runs out); start again"
    assert next(line for line in err.splitlines() if not line.startswith("warning")).startswith(message)
    assert err.count("error") == 1


@pytest.mark.slow
def test_a_restart_after_a_crash_resumes_even_with_force(here: Path) -> None:
    assert gpt_simple("--training.max_steps", "3").returncode == 0
    options = ("--max_restarts", "1", "--force", "--training.max_steps", "150", "--training.save_steps", "4")
    with started(*options, until="step=9 ") as (launcher, processes):
        os.kill(processes[0], signal.SIGKILL)
        out, err = launcher.communicate(timeout=100)
        assert launcher.returncode == 0, err
    assert re.search(r"resumed from step (8|\d\d+)", out)
    assert "completed: finished all 150 steps" in out


@pytest.mark.slow
def test_under_torchrun_it_joins(here: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "gpt_simple", "run", "config.toml"]
    joined = subprocess.run([*command, "--nproc_per_node", "2"], capture_output=True, text=True, check=False)
    assert joined.returncode == 0, joined.stderr
    assert joined.stdout.count("step=4 tokens=512 loss=") == 1
    other = subprocess.run([*command, "--nproc_per_node", "4"], capture_output=True, text=True, check=False)
    assert "--nproc_per_node 4, but 2 process(es) were already started" in other.stderr


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_ended(here: Path) -> None:
    (here / "hang.py").write_text(
        "import time\n"
        "from gpt_simple import Plugin, hookimpl\n"
        "class Hang(Plugin):\n"
        "    ranks = 'all'\n"
        "    @hookimpl\n"
        "    def on_step_start(self, run, event):\n"
        "        if run.rank == 1 and event.step == 4:\n"
        "            time.sleep(100)\n"
    )
    with started("-p", "./hang.py", "--training.peer_timeout_seconds", "5") as (launcher, processes):
        _, err = launcher.communicate(timeout=80)
        assert launcher.returncode == 1
        assert gone(processes, 0.1)
    assert "error: process 1 did not come to the end of step 4: waited 5 s" in err
    assert err.count("error") == 1


def test_a_launcher_that_waits_says_where_and_can_be_stopped(here: Path) -> None:
    endpoint = free_endpoint()
    options = ("--nproc-per-node", "1", "--nnodes", "3", "--rdzv-endpoint", endpoint)
    with subprocess.Popen([*PROGRAM, "run", "config.toml", *options], stderr=subprocess.PIPE, text=True) as launcher:
        try:
            assert launcher.stderr is not None
            assert f"waiting at {endpoint} until all 3 machines are there" in launcher.stderr.readline()
            launcher.terminate()
            assert launcher.wait(60) == 75
        finally:
            launcher.kill()
    assert not (here / "out").exists()


@pytest.mark.slow
def test_two_launchers_meet_and_a_signal_to_one_stops_both(here: Path) -> None:
    options = ("--nproc_per_node", "1", "--nnodes", "2", "--rdzv_endpoint", free_endpoint(), *LONG)
    command = [*PROGRAM, "run", "config.toml", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        subprocess.Popen(command, text=True, **pipes) as one,  # type: ignore[call-overload]
        (here / "other.txt").open("w") as other_output,
        subprocess.Popen(command, text=True, stdout=other_output, stderr=other_output) as other,
    ):
        try:
            deadline = time.monotonic() + 60
            metrics = here / "out/metrics.jsonl"
            while not (metrics.exists() and '"step": 3' in metrics.read_text()):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            other.terminate()
            assert (one.wait(60), other.wait(60)) == (75, 75)
        finally:
            one.kill()
            other.kill()
    assert status(here)["reason"] == "SIGTERM"
