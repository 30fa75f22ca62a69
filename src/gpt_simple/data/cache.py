"""Directories that are built once: by one process while others wait, and visible only when they are whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_simple._files import AtomicDirectory
from gpt_simple.errors import DataError

ROOT_VARIABLE = "GPT_SIMPLE_CACHE"

Log = Callable[[str], None]


def cache_root() -> Path:
    """``$GPT_SIMPLE_CACHE``, by default ``~/.cache/gpt-simple``."""
    return Path(os.environ.get(ROOT_VARIABLE) or "~/.cache/gpt-simple").expanduser()


@contextmanager
def locked(directory: Path, name: str, log: Log) -> Iterator[None]:
    """Hold the lock ``name`` of a directory, which is made if need be; the lock dies with its process."""
    from filelock import FileLock, Timeout  # only where something is written: importing it takes a while

    lock, waits = FileLock(directory / f".{name}.lock"), False
    with _writing(directory):
        while not lock.is_locked:
            directory.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=waits)
            except Timeout:
                waits = True
                log(f"waiting for another process that prepares {directory / name}")
            except FileNotFoundError:
                pass  # the process that held the lock was done and removed the directory
    try:
        yield
    finally:
        lock.release()


@contextmanager
def building(target: Path, log: Log) -> Iterator[Path | None]:
    """A directory to fill that becomes ``target`` at the end, or None if another process made it meanwhile.

    After an error nothing of it is left, nor of what a process that was killed had begun.
    """
    with locked(target.parent, target.name, log):
        if target.exists():
            yield None
            return
        with _writing(target.parent), AtomicDirectory(target.parent / f".{target.name}.tmp") as directory:
            yield directory.path
            directory.rename(target)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{directory}: cannot be written ({error})",
            hint=f"prepared data are kept there, set {ROOT_VARIABLE} to a directory that has room",
        ) from error
