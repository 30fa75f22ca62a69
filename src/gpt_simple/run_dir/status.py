"""status.json: what a run is doing, written cheaply while it runs and reported correctly after it died."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from attrs import asdict, define, evolve, field, fields, frozen

from gpt_simple._documents import COUNT, PID, TIME, read
from gpt_simple._files import NO_FOLLOW
from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir, finite, no_run, write_json
from gpt_simple.run_dir.lock import owner_of

State = Literal["running", "completed", "stopped", "halted", "failed", "crashed"]

_TEXT, _NUMBER, _SECONDS = (None, str), (None, float), (None, TIME)
_SHAPE = {
    "state": str,
    "step?": COUNT,
    "max_steps?": (None, COUNT),
    "loss?": _NUMBER,
    "tokens_per_second?": _NUMBER,
    "eta_seconds?": _SECONDS,
    "reason?": _TEXT,
    "error?": _TEXT,
    "host?": _TEXT,
    "pid?": (None, PID),
    "time?": _SECONDS,
    "note?": _TEXT,
}

_INTERVAL = 1.0
"""Seconds between two writes, unless a write is forced."""


@frozen
class Status:
    """What a run is doing (``running``), how it ended, or that it died without recording an end (``crashed``).

    ``time`` is that of the last update, in seconds since the epoch; ``eta_seconds`` is what is left of the run.
    """

    state: State
    step: int = 0
    max_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    reason: str | None = None
    error: str | None = None
    host: str | None = None
    pid: int | None = None
    time: float | None = None
    note: str | None = None


@define
class StatusFile:
    """Writes the status of the run that this process owns. A write that fails is tried again later."""

    run_dir: RunDir
    may_write: Callable[[], bool] = lambda: True
    """Whether this process still owns the directory."""
    # Fields of Status, which is made only where it is written: most updates never are.
    _fields: dict[str, Any] = field(
        factory=lambda: {"state": "running", "host": socket.gethostname(), "pid": os.getpid()}, init=False
    )
    _written: float = field(default=float("-inf"), init=False)

    def update(self, *, force: bool = False, **changes: Any) -> None:
        """Change fields of the status and write it, at most once a second unless forced or the state changes.

        Call it where values are on the host already: it reads no device.
        """
        force = force or changes.get("state", self._fields["state"]) != self._fields["state"]
        self._fields |= changes
        now = time.monotonic()
        if (not force and now - self._written < _INTERVAL) or not self.may_write():
            return
        try:
            document = asdict(Status(**self._fields, time=time.time()))
            write_json(self.run_dir.status_json, document, durable=force)
        except OSError:
            if force:
                _overwrite(self.run_dir.status_json, document)
            return
        self._written = now


def _overwrite(path: Path, document: Mapping[str, Any]) -> None:
    """Write into the file itself: a full disk has no room for a second one, but the first keeps its blocks."""
    text = json.dumps(finite(document), indent=1).encode() + b"\n"
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDWR | NO_FOLLOW), "r+b") as file:
        if len(text) <= os.fstat(file.fileno()).st_blocks * 512:
            file.write(text)
            file.truncate()


def read_status(run_dir: RunDir) -> Status:
    """The status of a run from any process, however the run ended; CheckpointError if there is no run.

    A run whose file says running is ``crashed`` if the lock shows that its owner is gone. Its step is then the last one
    that it wrote or saved: the file is up to a second old, which may be many steps.
    """
    status = _read(run_dir.status_json)
    owner, liveness = owner_of(run_dir)
    if status is None:
        if owner is None and liveness == "gone":
            if run_dir.status_json.exists():
                message = f"there is no run in {run_dir.root}: expected a training.output_dir of a run"
                raise CheckpointError(message, hint=f"{run_dir.status_json} is damaged")
            raise no_run(run_dir.root)
        status = Status("running")
    if owner is not None and status.pid is None:
        status = evolve(status, host=owner.host, pid=owner.pid)
    if status.state != "running" or liveness == "holds":
        return status
    process = f"process {status.pid} on {status.host}"
    if liveness == "unknown":
        return evolve(status, note=f"{process} cannot be seen from here: it may have ended since the last update")
    names = (path.name.removeprefix("step-") for path in run_dir.checkpoints.glob("step-*"))
    step = max([status.step, *(int(name) for name in names if name.isdecimal())])
    return evolve(status, state="crashed", step=step, note=f"{process} ended without saying how")


def _read(path: Path) -> Status | None:
    try:
        values: dict[str, Any] = read(path, _SHAPE)
    except (OSError, ValueError):
        return None
    known = {item.name for item in fields(Status)}
    found = Status(**{name: value for name, value in values.items() if name in known})
    return found if found.state in get_args(State) else None
