"""Files and directories that appear complete, and survive a power cut from then on."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Self

from attrs import Factory, define

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
"""Flag of ``os.open``: a symbolic link is an error."""

_LEVELS, _MOST_DIRECTORIES, _MOST_NAMED = 3, 5000, 8
"""How deep and in how many directories ``holders_below`` searches, and how many it names."""


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


def write_whole(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a text file in one step: readers see the old or the new one, and an error leaves the old one.

    A symbolic link is replaced and not followed. ``durable`` also makes the file survive a power cut, which costs a few
    milliseconds.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a dead process that had the same pid
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[None]:
    """Create a directory with its parents. After an error those that are new are removed, unless they hold anything."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for directory in missing:
            remove_if_empty(directory)
        raise


def user_path(text: str) -> str:
    """``text`` with the home directory for a leading ``~``.

    ValueError if it is empty, if there is no such home, or if no file can have this name.
    """
    if not text:
        raise ValueError('expected a path, got ""; the current directory is "."')
    path = os.path.expanduser(text)
    if path.startswith("~"):
        name = text.partition("/")[0]
        raise ValueError(f"there is no home directory {name}; a file of this name in the current directory is ./{text}")
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"no file can have this name: {error.strerror}") from None
    return path


def remove_if_empty(directory: Path) -> None:
    """Remove a directory unless it holds anything, or is not there."""
    with contextlib.suppress(OSError):
        directory.rmdir()


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


def holders_below(root: Path, what: str, *names: str) -> str:
    """A hint with the directories below ``root`` that hold a file of these names; empty without any."""
    found: list[str] = []
    for path, directories, files in islice(os.walk(root), _MOST_DIRECTORIES):
        if not set(names).isdisjoint(files):
            found.append(str(path))
        is_deep = len(Path(path).relative_to(root).parts) >= _LEVELS
        # Nothing of a run is below its checkpoints.
        directories[:] = sorted(d for d in directories if not (is_deep or d.startswith(".") or d == "checkpoints"))
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return f"the {what} below it are {', '.join(found[:_MOST_NAMED])}{more}" if found else ""
