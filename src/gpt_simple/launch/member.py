"""One process of several: what started it, how it ends with its launcher, and how it reports its end."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from typing import NoReturn

from attrs import evolve

from gpt_simple.errors import ConfigError, ExitCode, GptSimpleError, Problem, RankFailed
from gpt_simple.hardware import cores
from gpt_simple.launch.record import LAUNCHER, STARTED, Record, Records

GRACE_SECONDS = 30
"""How long a process may take for its last checkpoint after its launcher was killed."""

AGAIN = "start again with the same command, without --force: the run goes on from its last checkpoint, if it has one"
"""What to do after a crash."""

_ORDINARY = (ExitCode.COMPLETED, ExitCode.STOPPED, ExitCode.HALTED)
"""Ends that all processes agreed on: torchrun must not restart them."""


def under_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, or what sets the same variables, started this process, even as the only one."""
    return "TORCHELASTIC_RUN_ID" in environment or processes(environment) > 1


def processes_here(environment: Mapping[str, str]) -> int | None:
    """How many processes torchrun or srun started on this machine; None if neither did."""
    if under_torchrun(environment):
        return _count(environment, "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    if _count(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return int(re.split(r"\D", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    return None


def processes(environment: Mapping[str, str]) -> int:
    """How many processes the launch has, on all machines. Raises ConfigError."""
    return _count(environment, "WORLD_SIZE")


def _count(environment: Mapping[str, str], *names: str) -> int:
    """The number of processes in the first of the variables that is set; 1 if none is. Raises ConfigError."""
    for name in names:
        if text := environment.get(name):
            if not text.isdecimal():
                raise ConfigError(f"${name} is {text!r}: expected a number of processes, as torchrun sets it")
            return int(text)
    return 1


def is_member(environment: MutableMapping[str, str]) -> bool:
    """Whether this process is one of many that torchrun, or srun with several tasks, started.

    srun's variables are translated into those that torch reads.
    """
    here = processes_here(environment)
    if here is not None and not under_torchrun(environment):
        environment.update(_from_slurm(environment), LOCAL_WORLD_SIZE=str(here))
    return here is not None


def _from_slurm(environment: MutableMapping[str, str]) -> dict[str, str]:
    """torch's variables from srun's: the processes meet at the first machine of the step."""
    nodes = environment["SLURM_STEP_NODELIST"]
    # "node[003-006,9],login" stands for node003 and others.
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if first is None:
        raise ConfigError(f"$SLURM_STEP_NODELIST is {nodes!r}, which names no machine: start with torchrun instead")
    job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first[1] + (first[2] or "")),
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + job % 20000)),
    }


def share_compilers(environment: MutableMapping[str, str], here: int) -> None:
    """Divide the cores among the compilers of the ``here`` processes of this machine, unless the user does.

    Without it each process starts one for every core, up to 32. torch reads the variable while it is imported.
    """
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(32, cores() // here))))


def has_foreign_launcher(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several processes that our launcher, which gathers their messages, did not start."""
    return processes(environment) > 1 and Records.of_this_launch(environment) is None


def is_restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launched_at() -> float | None:
    """When our launcher began, a moment of ``time.monotonic``; None if it did not start this process."""
    started = os.environ.get(STARTED)
    return float(started) if started else None


def owns_run() -> None:
    """Record for restarted processes that this launch has begun its run."""
    if (records := Records.of_this_launch(os.environ)) is not None:
        records.owned()


def live(work: Callable[[], int]) -> NoReturn:
    """Do ``work``, which returns an exit code, as one of several processes, and end the process.

    Under our launcher an error goes into the record, and the launcher prints it once; elsewhere it is raised.
    """
    # Hides torch's stack traces of connections that a process closes by ending.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    share_compilers(os.environ, processes_here(os.environ) or 1)
    records = Records.of_this_launch(os.environ)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _never_outlive(int(os.environ.get(LAUNCHER, os.getppid())))
    if records is None:
        leave(work())
    record = records.begin(int(os.environ["RANK"]))
    if record is None:
        # Earlier processes may wait for this one until torchrun sees it fail and ends them.
        leave(ExitCode.COMPLETED if is_restarted() else ExitCode.STOPPED)
    try:
        code = work()
    except BaseException as error:
        failed = _failed(record, error)
        if failed.code != ExitCode.FAILURE and not failed.silent:
            # A restart would only repeat a mistake that a person must correct.
            records.no_more()
        records.end(failed)
        leave(failed.code or ExitCode.FAILURE)
    records.end(evolve(record, code=code, time=time.time()))
    # torchrun ends or restarts the processes if one of them does not return 0.
    leave(ExitCode.COMPLETED if code in _ORDINARY else code)


def leave(code: int) -> NoReturn:
    """End the process at once; everything is on disk.

    An orderly end could hang in a collective that never ends, or abort: in a thread of torch whose peer has ended, or
    where a tensor on a lost device is freed.
    """
    give_up_broken_output()
    os._exit(code)


def give_up_broken_output() -> None:
    """Drop what standard output and error cannot take, so that the run keeps its exit code.

    Python would try to write it once more at exit, fail, and exit with 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _failed(record: Record, error: BaseException) -> Record:
    now = time.time()
    if isinstance(error, GptSimpleError):
        record = evolve(record, code=int(error.exit_code), problems=error.problems, silent=error.silent, time=now)
        return evolve(record, silent=True, timed_out=error.timed_out) if isinstance(error, RankFailed) else record
    if isinstance(error, KeyboardInterrupt):
        return evolve(record, code=int(ExitCode.FORCED), silent=True, time=now)
    unexpected = Problem(None, "", "".join(traceback.format_exception(error)).rstrip())
    return evolve(record, code=int(ExitCode.FAILURE), problems=[unexpected], time=now)


def _never_outlive(launcher: int) -> None:
    """When the launcher is killed, stop as at a SIGTERM, and end after GRACE_SECONDS at the latest."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
