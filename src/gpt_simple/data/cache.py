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
    try:
        return Path(os.environ.get(ROOT_VARIABLE) or "~/.cache/gpt-simple").expanduser()
    except RuntimeError as error:
        raise DataError(
            f"the cache of prepared data has no place: {error}",
            hint=f"set {ROOT_VARIABLE} to a directory that has room",
        ) from error


@contextmanager
def locked(directory: Path, name: str, log: Log) -> Iterator[None]:
    """Hold the lock ``name`` of a directory, which is made if need be; the end of the process releases it."""
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


def build_once(target: Path, fill: Callable[[Path], None], log: Log) -> None:
    """Make the directory ``target`` with ``fill``, unless it exists already.

    Of several processes one calls ``fill`` while the others wait. After an error nothing of the directory is left, nor
    of one that was begun by a process that was killed.
    """
    if target.exists():
        return
    with locked(target.parent, target.name, log):
        if not target.exists():
            with _writing(target.parent), AtomicDirectory(target.parent / f".{target.name}.tmp") as directory:
                fill(directory.path)
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
