"""One owner for a run directory, claimed before anything in it is changed.

The lock is an flock, which the kernel frees however its owner dies. What is written in the file says who the
owner is, for people and for file systems whose locks do not reach other machines.
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
from types import TracebackType
from typing import Any, Literal, Self

from attrs import asdict, define, field, frozen

from gpt_simple.errors import CheckpointError
from gpt_simple.run_dir.layout import RunDir

Liveness = Literal["holds", "gone", "unknown"]

_PATIENCE = 0.3
"""Seconds to wait for the lock: somebody who asks for the status holds it for a moment."""

BEAT_SECONDS = 15.0
"""How often an owner touches its lock, so that other machines see that it lives."""

SILENCE_SECONDS = 120.0
"""An owner elsewhere whose lock nobody touched for so long is taken for dead, with its machine."""


@frozen
class Owner:
    """A process, told apart from any other that had or will have its number.

    ``boot`` names the boot of its machine and ``ticks`` its start in clock ticks since then; they are empty
    and 0 where the system does not tell.
    """

    host: str
    pid: int
    boot: str
    ticks: int
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            boot=_boot_id(),
            ticks=_start_ticks(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S%z"),
            command=" ".join(sys.argv)[:500],
        )

    def may_live(self) -> bool:
        """Whether the process may still be running, given that its flock is free.

        On the kernel that we run on, a free flock proves that it ended or, if the file system has none, its
        number and start tell. Another boot of its host ended it too. Of other machines nothing is known.
        """
        if self.boot and self.boot == _boot_id():
            return self.is_here()
        return self.host != socket.gethostname()

    def is_here(self) -> bool:
        """Whether its number is that very process's on this system, where it can be sent a signal."""
        return self.boot == _boot_id() and self.ticks != 0 and self.ticks == _start_ticks(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"


@define
class RunLock:
    """Ownership of a run directory; also a context manager."""

    run_dir: RunDir
    tell: Callable[[str], None] = lambda message: None
    """Called with a line for people before a long wait."""
    _descriptor: int | None = field(default=None, init=False)
    _me: Owner | None = field(default=None, init=False)
    _released: threading.Event = field(factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def acquire(self) -> None:
        """Become the owner, or change nothing and raise CheckpointError that names the present one.

        An owner on another machine, which nothing here can see, is given time to show that it lives.
        """
        try:
            descriptor = _lock(self.run_dir.lock)
        except OSError as error:
            raise CheckpointError(f"{self.run_dir.lock} cannot be opened: {error.strerror}") from error
        owner = _owner(descriptor or self.run_dir.lock)
        if descriptor is None:
            who = owner or "another process"
            raise CheckpointError(
                f"{self.run_dir.root} is in use by {who}: stop it, or choose another training.output_dir"
            )
        if owner is not None and owner.may_live() and (owner.is_here() or self._beats(descriptor, owner)):
            os.close(descriptor)
            raise CheckpointError(
                f"{self.run_dir.root} is in use by {owner}: stop it (gpt-simple stop {self.run_dir.root}), or choose"
                " another training.output_dir"
            )
        me = Owner.this_process()
        content = json.dumps(asdict(me), indent=1).encode() + b"\n"
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
            os.fsync(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise CheckpointError(f"{self.run_dir.lock} cannot be written: {error.strerror}") from error
        self._descriptor, self._me = descriptor, me
        self._released.clear()
        self._thread = threading.Thread(target=self._beat, name="lock-beat", daemon=True)
        self._thread.start()

    def is_held(self) -> bool:
        """Whether the directory is this process's: it was acquired, and nobody has deleted or taken the lock since."""
        return self._descriptor is not None and not self.is_lost()

    def is_lost(self) -> bool:
        """Whether the lock was acquired, and then deleted or taken by another process."""
        if self._descriptor is None:
            return False
        try:
            return _parse(self.run_dir.lock.read_bytes()) != self._me
        except OSError as error:
            # A file system that does not answer for a while has not lost anything.
            return isinstance(error, (FileNotFoundError, NotADirectoryError))

    def renew(self) -> None:
        """Acquire it again after it was lost. CheckpointError names the process that owns the directory now."""
        self._forget()
        self.acquire()

    def release(self) -> None:
        """Give the directory up; the file stays, empty. Does nothing if the lock is not held."""
        if self._descriptor is not None:
            if self.is_held():
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
        """Touch the lock until it is released, or somebody else's because this process was silent for too long."""
        while not self._released.wait(BEAT_SECONDS):
            if self.is_held():
                with contextlib.suppress(OSError):
                    os.utime(self.run_dir.lock)

    def _beats(self, descriptor: int, owner: Owner) -> bool:
        """Whether somebody touches the lock within ``SILENCE_SECONDS``. Compares no clocks: theirs may differ."""
        self.tell(f"{owner} cannot be seen from here: waiting {SILENCE_SECONDS:.0f} s for a sign of life")
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def owner_of(run_dir: RunDir) -> tuple[Owner | None, Liveness]:
    """Who owns a run directory, or did when it died, and whether it holds it now. Changes nothing."""
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


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of the file now at ``path``, or None if another process holds it."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(0.02)
        except OSError:
            return descriptor  # this file system has no flock
        os.close(descriptor)


def _owner(source: int | Path) -> Owner | None:
    """The owner written in the file; None if it is empty, torn, not ours or cannot be read."""
    try:
        return _parse(os.pread(source, 65536, 0) if isinstance(source, int) else source.read_bytes())
    except OSError:
        return None


def _parse(text: bytes) -> Owner | None:
    try:
        values: dict[str, Any] = json.loads(text)
        return Owner(**values)
    except (ValueError, TypeError):
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> int:
    """When a process started, in clock ticks; 0 if there is none, or only what its parent has not taken notice of."""
    try:
        # The command, in parentheses, may hold spaces; the start time is the 20th field after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0
