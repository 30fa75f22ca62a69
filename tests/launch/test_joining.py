"""How processes meet: one needs nobody, what is missing is named, and a signal ends the wait for another process."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from gpt_simple.distributed import process_group
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.distributed.start_up import StartUp
from gpt_simple.errors import ConfigError
from gpt_simple.job import stages
from gpt_simple.job.train import train as train_spec
from gpt_simple.launch.signals import stop_on_signals
from gpt_simple.spec import resolve_spec
from tests.launch.conftest import Ranks
from tests.tiny import TINY, TinyRun

T = TypeVar("T")

OF_TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_one_process_meets_nobody(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {**OF_TWO, "WORLD_SIZE": "1", "MASTER_ADDR": "no.such.host"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    assert tiny().status == "completed"
    assert {name: os.environ[name] for name in alone} == alone


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({name: None}, rf"\${name} is not set") for name in OF_TWO if name != "WORLD_SIZE"),
        (
            dict.fromkeys(name for name in OF_TWO if name != "WORLD_SIZE"),
            r"\$RANK, \$LOCAL_RANK, \$MASTER_ADDR, \$MASTER_PORT are not",
        ),
        ({"RANK": "x"}, r"\$RANK is 'x': expected a number below \$WORLD_SIZE"),
        ({"RANK": "2"}, r"\$RANK is '2'"),
        ({"LOCAL_RANK": "-1"}, r"\$LOCAL_RANK is '-1'"),
        ({"MASTER_PORT": "http"}, r"\$MASTER_PORT is 'http'"),
    ],
    ids=str,
)
def test_a_missing_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], message: str
) -> None:
    for name in OF_TWO:
        monkeypatch.delenv(name, raising=False)
    for name, value in (OF_TWO | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        ProcessGroup.join(1.0)


def test_an_address_that_is_not_found_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (OF_TWO | {"MASTER_ADDR": "no.such.host.invalid"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "_NAME_SECONDS", 0.1)
    with pytest.raises(ConfigError, match=r"\$MASTER_ADDR is 'no.such.host.invalid', a host that cannot be found"):
        ProcessGroup.join(600.0)


ELSEWHERE = OF_TWO | {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.99.7.1"}
ADDRESSES = {"node7": "127.0.1.1", "node8": "10.99.7.8"}


class Met(Exception):
    """The process went on to meet the others."""


@pytest.mark.parametrize(
    ("name", "changed", "refused"),
    [
        ("node7", {}, True),
        ("unknown", {}, True),
        ("node8", {}, False),
        ("node7", {"GLOO_SOCKET_IFNAME": "eth0"}, False),
        ("node7", {"LOCAL_WORLD_SIZE": "2"}, False),
        ("node7", {"MASTER_ADDR": "127.0.0.1"}, False),
    ],
    ids=str,
)
def test_a_machine_that_others_cannot_reach_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, changed: dict[str, str], refused: bool
) -> None:
    """gloo would offer them the address of the machine's own name, and they would wait for minutes."""

    def look_up(host: str, port: int | None, **options: Any) -> list[Any]:
        if host == "unknown":
            raise socket.gaierror("Name or service not known")
        return [(0, 0, 0, "", (ADDRESSES.get(host, host), port))]

    def meet(*arguments: object, **options: object) -> None:
        raise Met

    for variable, value in (ELSEWHERE | changed).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("socket.gethostname", lambda: name)
    monkeypatch.setattr("socket.getaddrinfo", look_up)
    monkeypatch.setattr("accelerate.PartialState", meet)
    with pytest.raises(ConfigError if refused else Met) as caught:
        ProcessGroup.join(600.0)
    if refused:
        assert f"{name}, the name of this machine, is no address for other machines" in str(caught.value)
        assert "$GLOO_SOCKET_IFNAME and $NCCL_SOCKET_IFNAME" in str(caught.value)


GLOO = "Gloo connectFullMesh failed with [/__w/pair.cc:152] timed out connecting: SO_ERROR: Connection refused"


@pytest.mark.parametrize("where", ["init_process_group", "new_group"])
@pytest.mark.parametrize("message", [GLOO, "CUDA error: out of memory"])
def test_processes_that_do_not_connect_name_the_interface(ranks: Ranks, where: str, message: str) -> None:
    def work(rank: int) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise RuntimeError(message)

        setattr(torch.distributed, where, fail)
        ProcessGroup.join(20.0)

    for answer in ranks(2, work):
        if message is GLOO:
            assert (answer["error"], answer["code"]) == ("GptSimpleError", 1)
            assert f"within 20 s (training.peer_timeout_seconds is 20): {GLOO}; on a machine" in answer["text"]
            assert "set $GLOO_SOCKET_IFNAME and $NCCL_SOCKET_IFNAME" in answer["text"]
        else:
            assert (answer["error"], answer["text"]) == ("RuntimeError", message)


def launch(directory: Path) -> list[Any]:
    """A launch as the program makes it: its outcome, and what it writes to standard error."""
    pending: list[str] = []
    sys.stderr = io.StringIO()
    with stop_on_signals(pending.append):
        training = {**TINY["training"], "output_dir": str(directory)}
        spec = resolve_spec(None, sections={**TINY, "training": training})
        result = train_spec(spec, pending_signals=pending)
    return [result.status, result.reason, int(result.exit_code), sys.stderr.getvalue().splitlines()]


def soon(number: int, until: Callable[[], object], then: Path) -> None:
    """Send this process a signal when it waits, and record the seconds that it takes to end."""

    def send() -> None:
        while not until():
            time.sleep(0.05)
        time.sleep(0.5)
        then.write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


# Process 1 comes to this many of the collectives of the start: to none; to the group; to the second group; to the
# comparison of the configurations; to the search for a checkpoint; to the data; to the claim of the run directory.
@pytest.mark.parametrize(
    ("number", "meetings"),
    [*((signal.SIGTERM, count) for count in (0, 1, 2, 4, 10, 12, 20)), (signal.SIGINT, 0), (signal.SIGINT, 2)],
)
def test_a_signal_ends_the_wait_for_another(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, meetings: int
) -> None:
    wait, hung, sent, left = StartUp.wait, tmp_path / "hung", tmp_path / "sent", tmp_path / "left"
    met = 0

    def counted(self: StartUp, collective: Callable[[], T]) -> T:
        nonlocal met
        met += 1
        if os.environ["RANK"] == "1" and met > meetings:
            hung.touch()
            while not left.exists():
                time.sleep(0.05)
            os._exit(0)
        return wait(self, collective)

    monkeypatch.setattr(StartUp, "wait", counted)

    def work(rank: int) -> list[Any]:
        if rank == 0:
            soon(number, hung.exists, sent)
        try:
            return [*launch(tmp_path / "run"), time.monotonic() - float(sent.read_text())]
        finally:
            left.touch()

    (status, reason, code, lines, seconds), _ = ranks(2, work)
    assert (status, reason, code) == ("stopped", number.name, 75)
    assert lines == [f"stopped: {number.name}, while the processes met; the same command goes on"][: meetings < 6]
    assert seconds < 2.5
    assert not (tmp_path / "run/run.json").exists()


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_stop_before_the_first_step_stops_all(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled: int
) -> None:
    """Process 0 prepares the data meanwhile: a signal to it ends that, and one to process 1 is heard afterwards."""
    prepare, sent = stages._prepare, tmp_path / "sent"

    def slow(job: Any) -> Any:
        deadline = time.monotonic() + (60 if signalled == 0 else 3)
        (tmp_path / "preparing").touch()
        while time.monotonic() < deadline:
            time.sleep(0.05)
        return prepare(job)

    monkeypatch.setattr(stages, "_prepare", slow)

    def work(rank: int) -> list[Any]:
        if rank == signalled:
            soon(signal.SIGTERM, (tmp_path / "preparing").exists, sent)
        return launch(tmp_path / "run")

    reasons = ["another process was asked to stop"] * 2
    reasons[signalled] = "SIGTERM"
    assert [answer[:3] for answer in ranks(2, work, 20.0)] == [["stopped", reason, 75] for reason in reasons]
    assert not (tmp_path / "run").exists()
