"""Which processes are launched or joined, and the outcome of a launch from the records of its processes."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt_simple.errors import ConfigError, GptSimpleError, Problem
from gpt_simple.launch import member
from gpt_simple.launch.member import is_member, owns_run
from gpt_simple.launch.record import DIRECTORY, Record, Records
from gpt_simple.launch.torchrun import Launch, _host_and_port, _outcome, _Signals
from tests.conftest import Shell


def test_nothing_is_launched_unless_it_is_asked_for() -> None:
    assert Launch.asked(None, None, None, None) is None
    assert Launch.asked("4", None, None, None) == Launch("4")
    assert Launch.asked(None, None, None, 2) == Launch("1", max_restarts=2)
    assert Launch.asked("auto", "2", "host:29500", None) == Launch("auto", "2", "host:29500")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("0", None, None, None), "--nproc_per_node 0"),
        (("many", None, None, None), "--nproc_per_node many"),
        (("2", "two", "h:1", None), "--nnodes two"),
        (("2", "2:3", "h:1", None), "--nnodes 2:3: expected a number of machines"),
        (("2", "2", None, None), "--rdzv_endpoint HOST:PORT"),
        (("2", None, "h:1", None), "--rdzv_endpoint h:1 is for several machines: add --nnodes"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_by_name(options: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Launch.asked(*options)


def test_options_may_be_spelled_with_dashes_as_for_torchrun(shell: Shell) -> None:
    Path("config.toml").write_text("")
    ended = shell("run", "config.toml", "--nproc-per-node", "2", "--max-restarts=1", "--rdzv-endpoint", "h:1")
    assert (ended.code, "--rdzv_endpoint h:1 is for several machines" in ended.err) == (2, True)
    assert "--nproc_per_node 0: expected" in shell("run", "config.toml", "--nproc-per-node=0").err
    assert "nproc-per-node" not in shell("run", "--help").out


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}


def test_processes_that_run_already_are_not_started_again() -> None:
    assert not Launch("4").joins({})
    assert not Launch("4").joins({"WORLD_SIZE": "1", "RANK": "0"})
    assert Launch("3").joins(TORCHRUN)
    assert Launch("auto").joins(TORCHRUN)
    assert Launch("4").joins(SRUN)
    assert Launch("4").joins({**TORCHRUN, DIRECTORY: "ours"})
    for environment, number in ((TORCHRUN, 3), (SRUN, 4)):
        with pytest.raises(ConfigError, match=rf"2, but {number} process"):
            Launch("2").joins(environment)


def test_one_srun_task_a_machine_starts_the_processes_there() -> None:
    environment = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert not Launch("4", "2", "node1:29500").joins(environment)


def test_one_process_is_no_member() -> None:
    assert not member.is_member({})
    assert not member.is_member({"WORLD_SIZE": "1"})
    assert not member.is_member({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert member.is_member({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[017-020,31]", "gpu017"), ("a100-3,a100-7", "a100-3"), ("login", "login"), ("n[5]", "n5")],
)
def test_tasks_of_srun_find_each_other(nodes: str, first: str) -> None:
    environment = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "0",
    }
    assert member.is_member(environment)
    found = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert environment["MASTER_ADDR"] == first
    assert 1024 < int(environment["MASTER_PORT"]) < 65536


def test_processes_that_come_too_late_keep_the_earlier_record(tmp_path: Path) -> None:
    records = Records(tmp_path)
    record = records.begin(1)
    assert record is not None
    records.end(Record(1, os.getpid(), 3, [Problem(None, "", "no data")]))
    records.no_more()
    assert records.begin(1) is None
    assert [(left.code, str(*left.problems)) for left in records.read()] == [(3, "no data")]


def test_a_process_whose_launcher_has_left_does_not_begin(tmp_path: Path) -> None:
    assert Records(tmp_path / "gone").begin(0) is None


def outcome(*records: Record, failures: dict[int, Any] | None = None, signals: list[Any] | None = None) -> int:
    return _outcome(records, failures or {}, _Signals(Records(Path("unused")), signals or []))


def failure(status: int, timestamp: float = 1.0) -> Any:
    return SimpleNamespace(exitcode=status, timestamp=timestamp)


def test_the_first_root_cause_is_reported() -> None:
    with pytest.raises(GptSimpleError, match=r"^process 2: no room$") as caught:
        outcome(
            Record(0, 1, 1, [Problem(None, "", "process 2 failed: no room")], silent=True, time=5.0),
            Record(1, 1, 5, [Problem(None, "", "broken too")], time=9.0),
            Record(2, 1, 4, [Problem(None, "", "no room")], time=7.0),
        )
    assert caught.value.exit_code == 4


def test_codes_of_ends_that_all_agreed_on() -> None:
    assert outcome(Record(0, 1, 0), Record(1, 1, 0)) == 0
    assert outcome(Record(0, 1, 75), Record(1, 1, 75)) == 75
    assert outcome(Record(0, 1, 76), Record(1, 1, 76)) == 76


def test_a_process_without_a_record_is_named_by_how_it_ended() -> None:
    secondary = Record(0, 1, 1, [Problem(None, "", "a process died in step 3")], silent=True)
    for status, how in ((-9, "SIGKILL"), (-11, "SIGSEGV"), (134, "status 134")):
        with pytest.raises(GptSimpleError, match=rf"^process 1 .*{how}"):
            outcome(secondary, Record(1, 2), failures={0: failure(1, 2.0), 1: failure(status)})


def test_a_process_that_left_as_if_all_were_done_is_named() -> None:
    secondary = Record(0, 1, 1, [Problem(None, "", "a process died in step 3")], silent=True)
    with pytest.raises(GptSimpleError, match=r"^process 1 left without a word; start again"):
        outcome(secondary, Record(1, 2), failures={0: failure(1)})


@pytest.mark.parametrize("endpoint", ["nohost.invalid:29500", "localhost:soon", "localhost:65536", ":29500"])
def test_a_meeting_point_that_cannot_be_is_refused_at_once(endpoint: str) -> None:
    launch = Launch.asked("1", "2", endpoint, None)
    assert launch is not None
    with pytest.raises(ConfigError, match=rf"--rdzv_endpoint {endpoint}: (expected HOST:PORT|the host .* cannot be)"):
        launch.run(["unused"])


def test_an_endpoint_without_a_port_has_that_of_torchrun() -> None:
    assert _host_and_port("node1") == _host_and_port("node1:") == ("node1", "29400")
    assert _host_and_port("[::1]:29500") == ("::1", "29500")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n"])
def test_a_meeting_point_where_something_else_listens_is_refused(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_simple.launch.torchrun._ANSWER_SECONDS", 1.0)
    kept = []

    def serve(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                kept.append(server.accept()[0])
                kept[-1].send(answer)

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        launch = Launch.asked("1", "2", f"127.0.0.1:{server.getsockname()[1]}", None)
        assert launch is not None
        with pytest.raises(ConfigError, match="something listens there that is no launcher; choose a free port"):
            launch.run(["unused"])


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\$WORLD_SIZE is 'many': expected a number of processes"):
        is_member({"WORLD_SIZE": "many"})


WAITED = [Problem(None, "", "process 1 did not come to the end of step 3: waited 600 s")]


@pytest.mark.parametrize("status", [-signal.SIGTERM, -signal.SIGKILL, -signal.SIGABRT])
def test_a_process_that_hung_is_named_by_those_that_waited(status: int) -> None:
    """The agent ends the one that hung; NCCL's watchdog may have ended another one that waited, earlier."""
    secondary = Record(0, 1, 1, WAITED, silent=True, timed_out=True)
    ended = {0: failure(1), 1: failure(-15, 2), 2: failure(status, 1)}
    with pytest.raises(GptSimpleError, match=r"^process 1 did not come"):
        outcome(secondary, Record(1, 2), Record(2, 3), failures=ended)


def test_who_names_the_missing_process_is_heard_first() -> None:
    lost = Record(2, 3, 1, [Problem(None, "", "a process died in step 3")], time=1.0)
    waited = Record(0, 1, 1, WAITED, timed_out=True, time=2.0)
    with pytest.raises(GptSimpleError, match=r"^process 1 did not come"):
        outcome(waited, lost, failures={0: failure(1), 1: failure(-15), 2: failure(1)})


def test_on_another_machine_a_secondary_failure_is_reported() -> None:
    with pytest.raises(GptSimpleError, match="process 5 failed: no room") as caught:
        outcome(
            Record(0, 1, 4, [Problem(None, "", "process 5 failed: no room")], silent=True), failures={0: failure(4)}
        )
    assert caught.value.exit_code == 4


def test_a_stop_before_the_first_step_is_a_stop() -> None:
    early = [(signal.SIGTERM, 1.0)]
    assert outcome(signals=early) == 75
    assert outcome(Record(0, 1), Record(1, 1), failures={0: failure(-15), 1: failure(-15)}, signals=early) == 75


def test_a_second_press_is_forced() -> None:
    assert outcome(Record(0, 1), signals=[(signal.SIGINT, 1.0), (signal.SIGINT, 1.1)]) == 75
    assert outcome(Record(0, 1), signals=[(signal.SIGINT, 1.0), (signal.SIGINT, 2.0)]) == 130


@pytest.mark.parametrize("begun", [False, True])
def test_a_restart_discards_what_it_found_and_never_what_it_made(
    shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Of a launch with ``--force``. A clock that is set back meanwhile makes its work no older."""
    forced: list[bool] = []

    def train(*_: Any, force: bool, **__: Any) -> Any:
        forced.append(force)
        raise GptSimpleError("that is all")

    (here / "out").mkdir()
    (here / "out/run.json").write_text('{"run_id": "a", "lineage": [{"time": 0.0}], "facts": {}}')
    monkeypatch.setattr("gpt_simple.job.train.train", train)
    monkeypatch.setenv("GPT_SIMPLE_LAUNCH", str(here))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if begun:
        owns_run()
    shell("run", "config.toml", "--force")
    assert forced == [not begun]


def test_a_signal_before_the_launch_starts_nothing() -> None:
    assert Launch("2").run(["/no/such/program"], ["SIGTERM"]) == 75


@pytest.mark.parametrize(
    ("here", "users", "expected"), [(1, None, 24), (2, None, 12), (100, None, 1), (2, "7", 7)], ids=str
)
def test_processes_share_the_cores_for_compilers(
    monkeypatch: pytest.MonkeyPatch, here: int, users: str | None, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(24)))
    environment = {} if users is None else {"TORCHINDUCTOR_COMPILE_THREADS": users}
    member.share_compilers(environment, here)
    assert environment == {"TORCHINDUCTOR_COMPILE_THREADS": str(expected)}
