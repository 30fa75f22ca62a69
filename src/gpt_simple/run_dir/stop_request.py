"""Requests that the owner of a run stops: by a signal if it runs on this system, else by a file that it reads."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

from attrs import asdict, evolve

from gpt_simple._documents import read
from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir, write_json
from gpt_simple.run_dir.lock import Owner, RunLock, owner_of
from gpt_simple.run_dir.status import StatusFile, read_status

_DYING_SECONDS = 10.0
"""How long a killed process may take to give its memory back."""


def ask_to_stop(run_dir: RunDir, *, force: bool = False) -> str:
    """Ask the owner of a run to save a checkpoint and exit, or with ``force`` kill it. Returns what was done.

    No other process is ever signalled: a handle of the process is opened, then compared with the lock, then signalled.
    Raises CheckpointError if there is no run, or if ``force`` cannot reach it.
    """
    owner, liveness = owner_of(run_dir)
    if liveness == "gone" or owner is None:
        state = read_status(run_dir).state
        return f"nothing to stop: the run in {run_dir.root} is {state}"
    if _signal(owner, signal.SIGKILL if force else signal.SIGTERM):
        if force:
            record_kill(run_dir, f"gpt-simple stop --force on {socket.gethostname()}")
            return f"ended {owner}; the run goes on from its last checkpoint"
        return f"asked {owner} to stop: it saves a checkpoint and exits after its present step"
    if force:
        raise CheckpointError(f"{owner} cannot be reached from here: run this on {owner.host}, or leave out --force")
    try:
        write_json(run_dir.stop_request, {"by": socket.gethostname(), "time": time.time()})
    except OSError as error:
        raise CheckpointError(f"{run_dir.stop_request} cannot be written: {error.strerror}") from error
    return f"left a request for {owner}: it reads it after every step"


def record_kill(run_dir: RunDir, reason: str) -> None:
    """Record in the status why the owner of a run was killed just now.

    Nothing is written if the owner recorded its end itself, is still alive, or has a successor.
    """
    deadline = time.monotonic() + _DYING_SECONDS
    while owner_of(run_dir)[1] != "gone" and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(CheckpointError):
        status = read_status(run_dir)
        if status.state == "crashed":
            with RunLock(run_dir):
                reason = f"{reason}: the steps since the last checkpoint are lost"
                stopped = asdict(evolve(status, state="stopped", reason=reason, note=None))
                del stopped["time"]
                StatusFile(run_dir).update(force=True, **stopped)


def take_stop_request(run_dir: RunDir) -> str:
    """The reason of a stop request, once; empty if there is none."""
    try:
        by = read(run_dir.stop_request, {"by": str})["by"]
        run_dir.stop_request.unlink()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        by = "an unknown machine"
    return f"gpt-simple stop on {by}"


def _signal(owner: Owner, number: signal.Signals) -> bool:
    """Send a signal to the process that owns the run; False if it cannot be identified or reached."""
    if not hasattr(os, "pidfd_open"):
        if here := owner.is_here():
            os.kill(owner.pid, number)
        return here
    try:
        process = os.pidfd_open(owner.pid)
    except OSError:
        return False
    try:
        # Only now: while the handle is open, no other process can get the pid.
        if not owner.is_here():
            return False
        signal.pidfd_send_signal(process, number)
    except OSError:
        return False
    finally:
        os.close(process)
    return True
