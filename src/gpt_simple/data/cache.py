"""Directories that are built once: by one process while others wait, and visible only when they are whole.

What is kept in a cache is derived from other data. So a directory that cannot be verified is built again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from gpt_simple._files import AtomicDirectory, remove_tree
from gpt_simple.errors import DataError

ROOT_VARIABLE = "GPT_SIMPLE_CACHE"

Log = Callable[[str], None]

_HINT = f"prepared data are kept there, set {ROOT_VARIABLE} to a directory that has room"

T = TypeVar("T")


class NotWritable(DataError):
    """A directory cannot be written: the disk is full, or it may only be read."""


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
def locked(directory: Path, name: str, log: Log, hint: str = _HINT) -> Iterator[None]:
    """Hold the lock ``name`` of a directory, which is made if need be; the end of the process releases it.

    Raises NotWritable with ``hint``.
    """
    from filelock import FileLock, Timeout  # only where something is written: importing it takes a while

    lock, waits = FileLock(directory / f".{name}.lock"), False
    with writing(directory, hint):
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


def build_once(
    target: Path,
    fill: Callable[[Path], None],
    log: Log,
    opened: Callable[[], T] = lambda: None,  # type: ignore[assignment, return-value]
    hint: str = _HINT,
) -> T:
    """Make the directory ``target`` with ``fill``, unless it exists already; return what ``opened`` returns.

    ``opened`` verifies the directory: after a DataError of it the directory is made again. Of several processes one
    calls ``fill`` while the others wait. After an error nothing of a new directory is left, nor of one that was begun
    by a process that was killed. Raises NotWritable with ``hint``.
    """
    if target.exists():
        with suppress(DataError):
            return opened()
    with locked(target.parent, target.name, log, hint):
        if os.path.lexists(target):
            try:
                return opened()
            except DataError as error:
                log(f"{error.problems[0].message}; it is made again")
        with writing(target.parent, hint), AtomicDirectory(target.parent / f".{target.name}.tmp") as directory:
            fill(directory.path)
            remove(target)
            directory.rename(target)
    return opened()


def remove(path: Path) -> None:
    """Remove what has this name. A link is removed and not followed."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise DataError for an error of the system, but not for a pipe whose reader has ended."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read ({error.strerror or error})",
            hint="give this user the permission, or repair it",
        ) from error


@contextmanager
def writing(directory: Path, hint: str = _HINT) -> Iterator[None]:
    """Raise NotWritable for an error of the system, but not for a pipe whose reader has ended."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NotWritable(f"{directory}: cannot be written ({error})", hint=hint) from error
