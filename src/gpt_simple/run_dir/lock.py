"""One owner for a run directory, which locks it before anything in it changes.

The lock is an flock, which the kernel frees however its owner dies. The file's content names the owner, for messages
and for file systems whose locks do not reach other machines.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from attrs import asdict, define, field, frozen

from gpt_simple._documents import COUNT, PID, check, parse
from gpt_simple._files import NO_FOLLOW
from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir

Liveness = Literal["holds", "gone", "unknown"]

_PATIENCE = 0.3
"""Seconds to wait for the lock: ``gpt-simple status`` holds it for a moment."""

BEAT_SECONDS = 15.0
"""How often an owner touches its lock, by which other machines see that it is alive."""

SILENCE_SECONDS = 120.0
"""An owner on another machine counts as dead once its lock has not been touched for so long."""

_SHAPE = {"host": str, "pid": PID, "boot": str, "ticks": COUNT, "since": str, "command": str}


@frozen
class Owner:
    """A process, distinct from any other with the same pid before or after it.

    ``boot`` is the id of its machine's boot and ``ticks`` its start in clock ticks since then; they are empty and 0
    where the system does not provide them.
    """

    host: str
    pid: int
    boot: str
    ticks: int
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Owner:
        from gpt_simple.config.load import redacted_arguments  # only here: other commands start faster without it

        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            boot=_boot_id(),
            ticks=_start_ticks(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S%z"),
            command=" ".join(redacted_arguments(sys.argv))[:500],
        )

    def may_live(self) -> bool:
        """Whether the process may still be running, given that its flock is free.

        On this kernel a free flock proves that it ended; if the file system has no flock, pid and start decide.
        Another boot of its host ended it too. About other machines nothing is known.
        """
        if self.boot and self.boot == _boot_id():
            return self.is_here()
        return self.host != socket.gethostname()

    def is_here(self) -> bool:
        """Whether it is a process of this system, which can be sent a signal."""
        return self.boot == _boot_id() and self.ticks != 0 and self.ticks == _start_ticks(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"


@define
class RunLock:
    """Ownership of a run directory; also a context manager."""

    run_dir: RunDir
    log: Callable[[str], None] = lambda message: None
    """Called with a message before a long wait."""
    _descriptor: int | None = field(default=None, init=False)
    _me: Owner | None = field(default=None, init=False)
    _released: threading.Event = field(factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def acquire(self) -> None:
        """Become the owner, or change nothing and raise CheckpointError that names the present one.

        An owner on another machine, which is invisible from here, gets time to touch its lock.
        """
        path = self.run_dir.lock
        try:
            descriptor, is_locked = _lock(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            owner = _owner(descriptor)
            if not is_locked or (owner is not None and self._is_alive(owner, descriptor)):
                raise in_use(self.run_dir, owner)
            me = Owner.this_process()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(me), indent=1).encode() + b"\n", 0)
            os.fsync(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._me = descriptor, me
        self._released.clear()
        self._thread = threading.Thread(target=self._beat, name="lock-beat", daemon=True)
        self._thread.start()

    def is_held(self) -> bool:
        """Whether this process owns the directory: it has acquired the lock, which nothing deleted or took since."""
        return self._descriptor is not None and not self.is_lost()

    def is_lost(self) -> bool:
        """Whether the lock was acquired, and then deleted or taken by another process."""
        if self._descriptor is None:
            return False
        try:
            return _parse(self.run_dir.lock.read_bytes()) != self._me
        except OSError as error:
            # The lock is not lost while the file system does not answer.
            return isinstance(error, (FileNotFoundError, NotADirectoryError))

    def renew(self) -> None:
        """Acquire it again after it was lost. CheckpointError names the process that owns the directory now."""
        self._forget()
        self.acquire()

    def release(self) -> None:
        """Give the directory up; the file stays, empty. Does nothing if the lock is not held."""
        if self._descriptor is not None and not self.is_lost():
            with contextlib.suppress(OSError):  # the disk may only be read now: the kernel frees the lock
                os.ftruncate(self._descriptor, 0)
        self._forget()

    def _forget(self) -> None:
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _beat(self) -> None:
        """Touch the lock until it is released, unless it became another process's after a silence of this one."""
        while not self._released.wait(BEAT_SECONDS):
            if self.is_held():
                with contextlib.suppress(OSError):
                    os.utime(self.run_dir.lock)

    def _is_alive(self, owner: Owner, descriptor: int) -> bool:
        """Whether an owner that holds no flock here is alive: on another machine, if it touches its lock in time.

        Times of the lock are compared with each other alone: the machines' clocks may differ.
        """
        if not owner.may_live():
            return False
        if owner.is_here():
            return True
        self.log(f"{owner} cannot be seen from here: waiting {SILENCE_SECONDS:.0f} s for a sign of life")
        before, deadline = os.fstat(descriptor).st_mtime_ns, time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENCE_SECONDS / 10))
            # The path: an attribute that a remote file system has cached for an open file may be old.
            if os.stat(self.run_dir.lock).st_mtime_ns != before:
                return True
        return False

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def in_use(run_dir: RunDir, owner: Owner | None) -> CheckpointError:
    """The error of a launch in a directory that another process owns."""
    return CheckpointError(
        f"{run_dir.root} is in use by {owner or 'another process'}: stop it (gpt-simple stop {run_dir.root}), or choose"
        " another training.output_dir"
    )


def owner_of(run_dir: RunDir) -> tuple[Owner | None, Liveness]:
    """The last owner of a run directory, and whether it holds it now. Changes nothing."""
    try:
        descriptor = os.open(run_dir.lock, os.O_RDONLY)
    except OSError:
        return None, "gone"
    try:
        owner = _owner(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return owner, "holds"
        except OSError:
            pass  # this file system has no flock
        if owner is None or not owner.may_live():
            return owner, "gone"
        return owner, "unknown"
    finally:
        os.close(descriptor)


def _lock(path: Path) -> tuple[int, bool]:
    """A descriptor of the file now at ``path``, and whether it holds the lock; False if another process does."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor, True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return descriptor, False
            time.sleep(0.02)
        except OSError:
            return descriptor, True  # this file system has no flock
        os.close(descriptor)


def _owner(descriptor: int) -> Owner | None:
    """The owner that a lock file names; None if it is empty, torn, foreign or cannot be read."""
    try:
        return _parse(os.pread(descriptor, 65536, 0))
    except OSError:
        return None


def _parse(text: bytes) -> Owner | None:
    try:
        values: dict[str, Any] = parse(text)
        check(values, _SHAPE)
        return Owner(**values)
    except (ValueError, TypeError):
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> int:
    """When a process started, in clock ticks; 0 if there is none, or only one that has ended (a zombie)."""
    try:
        # The command, in parentheses, may hold spaces; the start time is the 20th field after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0
