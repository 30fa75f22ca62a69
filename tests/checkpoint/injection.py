"""Processes that die, and operations that fail, at a chosen moment.

A forked child stands for a real process here and starts in milliseconds, because torch is loaded already. File
operations are seen through the interpreter's audit events, so every one of them can be chosen, also those in libraries
written in Python.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

FINISHED, KILLED = 0, -signal.SIGKILL

_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
_ELSEWHERE = ("/proc", sys.prefix, sys.base_prefix)
"""Modules that are imported late and pseudo files are not the work under test."""


def start(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def outcome(pid: int) -> int:
    """How a child ended: its exit code, or the signal that ended it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_operation(number: int, fault: Literal["kill", "fail"], error: int) -> Callable[[], bool]:
    """From now on, in this process, die at (or fail) the file operation of that number, counted from 0.

    Reading counts as an operation that can fail; to die before it is to die after what was done last. Returns a
    function that returns whether that happened.
    """
    seen = -1

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(error, os.strerror(error))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or str(arguments[0]).startswith(_ELSEWHERE):
            return
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (reads and fault == "kill"):
            count()

    real = os.fsync

    def fsync(descriptor: int) -> None:
        count()
        real(descriptor)

    os.fsync = fsync
    sys.addaudithook(audit)
    return lambda: seen >= number


def refuse(path: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file ``path`` be there but fail to open, as for a user without permission (root has all)."""
    real = Path.open

    def open_(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.absolute() == path.absolute():
            raise OSError(error, os.strerror(error), str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_)
