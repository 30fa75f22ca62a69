"""Directories that appear complete, and survive a power cut from then on."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from attrs import Factory, define


@define
class AtomicDirectory:
    """A directory that is filled under the temporary name ``path``. Leaving the context removes what has that name.

    Threads write files to disk while the next ones are made.
    """

    path: Path
    _disk: ThreadPoolExecutor = Factory(lambda: ThreadPoolExecutor(4))
    _syncing: dict[Path, Future[None]] = Factory(dict)

    def __enter__(self) -> Self:
        remove_tree(self.path)
        self.path.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.shutdown(cancel_futures=True)
        remove_tree(self.path)

    def sync(self, path: Path) -> None:
        """Start to make a complete file or directory durable, in a thread."""
        if path not in self._syncing:
            self._syncing[path] = self._disk.submit(fsync, path)

    def rename(self, target: Path, *, aside: Path | None = None) -> None:
        """Make everything in the directory durable, then rename it to ``target``.

        An existing ``target`` is renamed to ``aside`` first, and removed once its successor is durable.
        """
        for path in self.path.rglob("*"):
            self.sync(path)
        for durable in self._syncing.values():
            durable.result()
        fsync(self.path)
        if aside is not None and target.exists():
            remove_tree(aside)
            target.rename(aside)
        self.path.rename(target)
        fsync(target.parent)
        if aside is not None:
            remove_tree(aside)


def fsync(path: Path) -> None:
    """Make a file's content, or a directory's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a directory as far as possible."""
    shutil.rmtree(path, ignore_errors=True)


def nearest_existing(path: Path) -> Path:
    """``path``, or the closest of its parents that exists."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())
