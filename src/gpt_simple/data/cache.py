"""Directories that are built once: by one process while others wait, and visible only when they are whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_simple.errors import DataError

ROOT_VARIABLE = "GPT_SIMPLE_CACHE"

Log = Callable[[str], None]


def cache_root() -> Path:
    """``$GPT_SIMPLE_CACHE``, by default ``~/.cache/gpt-simple``."""
    return Path(os.environ.get(ROOT_VARIABLE) or "~/.cache/gpt-simple").expanduser()


@contextmanager
def locked(directory: Path, name: str, log: Log) -> Iterator[None]:
    """Hold the lock ``name`` of a directory, which is made if need be; the lock dies with its process."""
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / f".{name}.lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that prepares {directory / name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def building(target: Path, log: Log) -> Iterator[Path | None]:
    """A directory to fill that becomes ``target`` at the end, or None if another process made it meanwhile.

    After an error nothing of it is left, nor of what a process that was killed had begun.
    """
    with locked(target.parent, target.name, log):
        if target.exists():
            yield None
            return
        temporary = target.parent / f".{target.name}.tmp"
        try:
            with _writing(target.parent):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                yield temporary
                for path in (*temporary.rglob("*"), temporary):
                    sync(path)
                temporary.rename(target)
                sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{directory}: cannot be written ({error})",
            hint=f"prepared data are kept there, set {ROOT_VARIABLE} to a directory that has room",
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
