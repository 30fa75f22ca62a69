"""Asking the owner of a run to stop: with a signal if it runs on this system, else with a file that it looks for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time

from attrs import asdict, evolve

from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir, write_json
from gpt_simple.run_dir.lock import Owner, RunLock, owner_of
from gpt_simple.run_dir.status import StatusFile, read_status

_DYING_SECONDS = 10.0
"""How long a killed process may take to give its memory back."""


def ask_to_stop(run_dir: RunDir, *, force: bool = False) -> str:
    """Ask the owner of a run to save a checkpoint and leave, or with ``force`` end it at once. Says what was done.

    Nobody else is ever met: the process is held, then compared with what the lock says of it, then signalled. Raises
    CheckpointError if there is no run, or if ``force`` cannot reach it.
    """
    owner, liveness = owner_of(run_dir)
    if liveness == "gone" or owner is None:
        state = read_status(run_dir).state
        return f"nothing to stop: the run in {run_dir.root} is {state}"
    if _signal(owner, signal.SIGKILL if force else signal.SIGTERM):
        if force:
            tell_forced(run_dir, f"gpt-simple stop --force on {socket.gethostname()}")
            return f"ended {owner}; the run goes on from its last checkpoint"
        return f"asked {owner} to stop: it saves a checkpoint and leaves after the step it is in"
    if force:
        raise CheckpointError(f"{owner} cannot be reached from here: run this on {owner.host}, or leave out --force")
    write_json(run_dir.stop_request, {"by": socket.gethostname(), "time": time.time()})
    return f"left a request for {owner}: it looks for one after every step"


def tell_forced(run_dir: RunDir, reason: str) -> None:
    """Write down why the owner of a run, which was killed on purpose just now, is gone.

    Nothing is written if it said so itself, lives on, or was followed by another.
    """
    deadline = time.monotonic() + _DYING_SECONDS
    while owner_of(run_dir)[1] != "gone" and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(CheckpointError):
        left = read_status(run_dir)
        if left.state == "crashed":
            with RunLock(run_dir):
                reason = f"{reason}: the steps since the last checkpoint are lost"
                told = asdict(evolve(left, state="stopped", reason=reason, note=None))
                del told["time"]
                StatusFile(run_dir).update(force=True, **told)


def take_stop_request(run_dir: RunDir) -> str:
    """The reason to stop that somebody left, once; empty if there is none."""
    try:
        by = json.loads(run_dir.stop_request.read_text(encoding="utf-8"))["by"]
        run_dir.stop_request.unlink()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        by = "somebody"
    return f"gpt-simple stop on {by}"


def _signal(owner: Owner, number: signal.Signals) -> bool:
    """Send a signal to the very process that owns the run; False if it cannot be told apart or reached."""
    if not hasattr(os, "pidfd_open"):
        if here := owner.is_here():
            os.kill(owner.pid, number)
        return here
    try:
        process = os.pidfd_open(owner.pid)
    except OSError:
        return False
    try:
        # Only now: a process that is held cannot hand its number on.
        if not owner.is_here():
            return False
        signal.pidfd_send_signal(process, number)
    except OSError:
        return False
    finally:
        os.close(process)
    return True
