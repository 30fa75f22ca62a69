"""Runs torchrun's agent in this process. The agent starts the others, watches them, and restarts them if configured.

Added is what torchrun lacks: signals reach the processes unchanged and no process is killed while it saves; one
message; and the exit code that a single process would have given.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from attrs import define, field, frozen

from gpt_simple.errors import ConfigError, ExitCode, GptSimpleError, Problem
from gpt_simple.hardware import cores, why_no_gpu
from gpt_simple.launch.member import AGAIN, processes_here, share_compilers, under_torchrun
from gpt_simple.launch.numa import numa_options
from gpt_simple.launch.record import DIRECTORY, LAUNCHER, STARTED, Record, Records
from gpt_simple.launch.signals import ONE_PRESS_SECONDS, handling

_DEFAULT_PORT = "29400"  # torchrun's

_ANSWER_SECONDS = 15.0
"""How long a launcher that listens at the rendezvous endpoint may take to answer."""


class _Leave(BaseException):
    """A signal arrived before there was a process to forward it to."""


@frozen
class Launch:
    """How many processes are started, where they meet, and how often they are restarted."""

    nproc_per_node: str
    nnodes: str = "1"
    rdzv_endpoint: str = ""
    max_restarts: int = 0

    @classmethod
    def asked(
        cls, nproc_per_node: str | None, nnodes: str | None, rdzv_endpoint: str | None, max_restarts: int | None
    ) -> Launch | None:
        """The launch of these options, None if all are None. Raises ConfigError for one that cannot be."""
        if (nproc_per_node, nnodes, rdzv_endpoint, max_restarts) == (None, None, None, None):
            return None
        if nproc_per_node not in (None, "auto") and not re.fullmatch(r"[1-9]\d*", str(nproc_per_node)):
            raise ConfigError('expected a number of processes or "auto"', location=f"--nproc_per_node {nproc_per_node}")
        if nnodes is not None and not re.fullmatch(r"[1-9]\d*", nnodes):
            raise ConfigError(
                "expected a number of machines, which stays the same for the launch", location=f"--nnodes {nnodes}"
            )
        if nnodes not in (None, "1") and not rdzv_endpoint:
            raise ConfigError(f"--nnodes {nnodes} needs --rdzv_endpoint HOST:PORT, the same on every machine")
        if nnodes is None and rdzv_endpoint:
            raise ConfigError(f"--rdzv_endpoint {rdzv_endpoint} is for several machines: add --nnodes N on each one")
        return cls(nproc_per_node or "1", nnodes or "1", rdzv_endpoint or "", max_restarts or 0)

    def joins(self, environment: Mapping[str, str]) -> bool:
        """Whether this process is already one of the launch, because torchrun or srun started it.

        A single task of srun on each machine is not: it starts the processes there. Raises ConfigError if another
        number of processes was started.
        """
        if Records.of_this_launch(environment) is not None:
            return True
        here = processes_here(environment)
        if here is None or (here == 1 and not under_torchrun(environment)):
            return False
        if self.nproc_per_node not in ("auto", str(here)):
            raise ConfigError(
                f"--nproc_per_node {self.nproc_per_node}, but {here} process(es) were already started on this machine"
                " (by torchrun or srun): leave the option out"
            )
        return True

    def run(self, command: Sequence[str], pending_signals: Sequence[str] = ()) -> int:
        """Start ``command`` as all processes of this machine, wait for them, and return the exit code.

        ``pending_signals`` arrived before: with one nothing is started. Raises the error that is the root cause if a
        process failed.
        """
        if self.rdzv_endpoint:
            _check_endpoint(self.rdzv_endpoint)
        with tempfile.TemporaryDirectory(prefix="gpt-simple-launch-", ignore_cleanup_errors=True) as directory:
            records = Records(Path(directory))
            signals, failures = _Signals(records), {}
            # The processes end by themselves, and the agent waits for them.
            with handling(signals), suppress(_Leave):
                for name in pending_signals:
                    signals(signal.Signals[name], None)
                failures = self._agent(command, directory)
            return _outcome(records.read(), failures, signals)

    def _processes(self, gpus: int, torch_version: str, cuda: str | None) -> int:
        """How many processes this machine gets. Raises ConfigError if they have not one of ``gpus`` each.

        Without a GPU that is any number, and one for ``auto``, unless there is one that torch cannot use.
        """
        where = f"--nproc_per_node {self.nproc_per_node}"
        if self.nproc_per_node != "auto":
            if 0 < gpus < int(self.nproc_per_node):
                counted = "one GPU" if gpus == 1 else f"{gpus} GPUs"
                message = f"torch sees {counted} here, and every process needs its own"
                raise ConfigError(message, location=where, hint="--nproc_per_node auto takes all of them")
            return int(self.nproc_per_node)
        why, remedy = ("", "") if gpus else why_no_gpu(torch_version, cuda)
        if why:
            raise ConfigError(why, location=where, hint=f"{remedy}; --nproc_per_node 1 trains on the CPU")
        return max(1, gpus)

    def _agent(self, command: Sequence[str], directory: str) -> dict[int, Any]:
        """Run torchrun's agent to its end. Returns its ``ProcessFailure`` of each rank that failed."""
        # Hides stack traces of a rendezvous that fails. torch reads it on import; the processes set their own.
        level = os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        import torch

        if level == "FATAL":
            del os.environ["TORCH_CPP_LOG_LEVEL"]
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        # The launcher prints one message itself.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        gpus = torch.cuda.device_count()
        count = self._processes(gpus, torch.__version__, torch.version.cuda)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
        share_compilers(os.environ, count)
        os.environ |= {DIRECTORY: directory, LAUNCHER: str(os.getpid()), STARTED: str(time.monotonic())}
        if self.max_restarts:
            # A shared store would give restarted processes the addresses of those before them.
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        alone = self.nnodes == "1"  # any free port will do, and a given endpoint is not used
        if not alone:
            _check_answer(self.rdzv_endpoint)
            print(f"waiting at {self.rdzv_endpoint} until all {self.nnodes} machines are there", file=sys.stderr)
        config = LaunchConfig(
            min_nodes=int(self.nnodes),
            max_nodes=int(self.nnodes),
            nproc_per_node=count,
            run_id=uuid.uuid4().hex if alone else "gpt-simple",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0" if alone else self.rdzv_endpoint,
            local_addr="localhost" if alone else None,
            max_restarts=self.max_restarts,
            # No handlers of its own: they would end processes that are still saving.
            signals_to_handle="",
            logs_specs=DefaultLogsSpecs(log_dir=directory),
            numa_options=numa_options(gpus),
        )
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            return error.failures
        except (RendezvousError, RuntimeError, OSError) as error:
            where = self.rdzv_endpoint or "this machine"
            raise GptSimpleError(f"the processes could not meet at {where}: {str(error).splitlines()[0]}") from error
        finally:
            for name in (DIRECTORY, LAUNCHER, STARTED, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
                os.environ.pop(name, None)
        return {}


def _host_and_port(endpoint: str) -> tuple[str, str]:
    host, _, port = endpoint.rpartition(":") if ":" in endpoint else (endpoint, "", "")
    return host.strip("[]"), port or _DEFAULT_PORT


def _check_endpoint(endpoint: str) -> None:
    """Refuse at once what torch would try to reach for minutes."""
    host, port = _host_and_port(endpoint)
    if not host or not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError("expected HOST:PORT, the same on every machine", location=f"--rdzv_endpoint {endpoint}")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"the host {host} cannot be found ({error})", location=f"--rdzv_endpoint {endpoint}"
        ) from None


def _check_answer(endpoint: str) -> None:
    """Refuse a port at which something else listens: torch would wait for its answer for ever, deaf to signals."""
    from torch._C._distributed_c10d import TCPStore

    host, port = _host_and_port(endpoint)
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return  # nothing listens yet: torch will, here or on another machine
    answered = threading.Event()

    def ask() -> None:
        with suppress(RuntimeError):
            TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_ANSWER_SECONDS))
            answered.set()

    threading.Thread(target=ask, name="ask-endpoint", daemon=True).start()
    if not answered.wait(_ANSWER_SECONDS):
        raise ConfigError(
            "something listens there that is no launcher",
            location=f"--rdzv_endpoint {endpoint}",
            hint="choose a free port",
        )


@define
class _Signals:
    """The handler that forwards signals to the processes, and the signals that arrived."""

    _records: Records
    received: list[tuple[signal.Signals, float]] = field(factory=list)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.append((signal.Signals(number), time.monotonic()))
        self._records.no_more()
        records = self._records.read()
        for record in records:
            with suppress(ProcessLookupError):
                # SIGKILL: a process that waits in a collective would not notice the second Ctrl-C.
                os.kill(record.pid, signal.SIGKILL if self.forced else number)
        if not records:
            raise _Leave

    @property
    def forced(self) -> bool:
        """Whether Ctrl-C was pressed twice."""
        presses = [at for number, at in self.received if number == signal.SIGINT]
        return bool(presses) and presses[-1] - presses[0] > ONE_PRESS_SECONDS


def _outcome(records: Sequence[Record], failures: Mapping[int, Any], signals: _Signals) -> int:
    """The exit code of the launch. Raises the root cause of a failure."""
    if signals.forced:
        return ExitCode.FORCED
    ended = [record for record in records if record.code is not None]
    # One that waited names the process that is missing; one whose connection it closed then has lost somebody.
    errors = sorted((r for r in ended if r.problems), key=lambda r: (r.silent, not r.timed_out, r.time))
    if errors and not errors[0].silent:
        raise _error(errors[0], len(records))
    if signals.received and len(ended) < max(1, len(records)):
        # The signal came before the first step: there is nothing to save.
        return ExitCode.STOPPED
    if lost := [rank for rank in failures if rank not in {record.rank for record in ended}]:
        raise GptSimpleError(*_death(lost, failures, errors))
    if errors:
        if unfinished := [record.rank for record in records if record.code is None]:
            raise GptSimpleError(f"process {unfinished[0]} left without a word", hint=AGAIN)
        raise _error(errors[0], len(records))
    return max((record.code or 0 for record in ended), default=ExitCode.FAILURE)


def _error(record: Record, processes: int) -> GptSimpleError:
    named = processes > 1 and record.rank > 0
    problems = (each.within(f"process {record.rank}") if named else each for each in record.problems)
    return GptSimpleError(*problems, exit_code=record.code or ExitCode.FAILURE)


def _death(ranks: Sequence[int], failures: Mapping[int, Any], errors: Sequence[Record]) -> tuple[Problem, ...]:
    """The problem of processes that did not write how they ended: of the one that ended first."""
    first = min(ranks, key=lambda rank: float(failures[rank].timestamp))
    status = int(failures[first].exitcode)
    waited = [record for record in errors if record.timed_out]
    if waited and status in (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGABRT):
        # One hung. The agent ended this one when the others had given up, or NCCL's watchdog ended it while it waited.
        return waited[0].problems
    if status == -signal.SIGKILL:
        how = "was killed (SIGKILL: the system does that when memory runs out)"
    elif status < 0:
        how = f"was ended by {signal.Signals(-status).name} and left no word"
    else:
        how = f"ended with status {status} and left no word"
    return (Problem(None, "", f"process {first} {how}", AGAIN),)
