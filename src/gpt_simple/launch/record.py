"""What the processes of a launch tell their launcher, in files: who they are, and how each of them ended.

An exit status holds too little for that: torchrun turns every one of them into 0 or 1, and restarts processes whose
status is not 0, also those that ended on purpose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, field, frozen

from gpt_simple.errors import Problem

DIRECTORY = "GPT_SIMPLE_LAUNCH"
"""Environment variable: the directory of the records, set by our own launcher for the processes that it starts."""

LAUNCHER = "GPT_SIMPLE_LAUNCHER"
"""Environment variable: the launcher's process, which may be gone by the time that one which it started asks."""

STARTED = "GPT_SIMPLE_LAUNCHED_AT"
"""Environment variable: when the launcher began, a moment of ``time.monotonic``, which no setting of a clock moves."""

_NO_MORE = "no-more"
_OWNED = "owned"


def _problems(told: Iterable[Iterable[Any]]) -> tuple[Problem, ...]:
    return tuple(Problem(*problem) for problem in told)


@frozen
class Record:
    """One process. ``code`` is None until it has ended by itself.

    ``silent``: the failure follows from another process's, which has more to say. ``timed_out``: the process gave up
    waiting for another one.
    """

    rank: int
    pid: int
    code: int | None = None
    problems: tuple[Problem, ...] = field(default=(), converter=_problems)
    silent: bool = False
    time: float = 0.0
    timed_out: bool = False


@frozen
class Records:
    """The records of the processes on this machine."""

    directory: Path

    @classmethod
    def of_this_launch(cls, environment: Mapping[str, str]) -> Records | None:
        """Where this process leaves its record; None if no launcher of ours started it."""
        directory = environment.get(DIRECTORY)
        return cls(Path(directory)) if directory else None

    def begin(self, rank: int) -> Record | None:
        """Sign in. None: nothing is to be started any more, and what was left here stays as it is."""
        record = Record(rank, os.getpid())
        # Signed in first and asked afterwards: so a launcher that is stopping meets either the process or its question.
        earlier = self._read(self._path(rank))
        try:
            self._write(record)
        except FileNotFoundError:
            return None  # the launcher was stopped before it knew of this process, and has left
        if (self.directory / _NO_MORE).exists():
            self._write(evolve(earlier, pid=record.pid) if earlier else record)
            return None
        return record

    def end(self, record: Record) -> None:
        """Leave word of how the process ended. A launcher that is gone does not read it."""
        if self.directory.exists():
            self._write(record)

    def no_more(self) -> None:
        """From now on processes that start leave at once: the end is decided."""
        if self.directory.exists():
            (self.directory / _NO_MORE).touch()

    def owned(self) -> None:
        """From now on the run in its directory is this launch's: what it began with must not begin it again."""
        if self.directory.exists():
            (self.directory / _OWNED).touch()

    def has_owned(self) -> bool:
        """Whether a process of this launch has come as far as that."""
        return (self.directory / _OWNED).exists()

    def read(self) -> list[Record]:
        """All records, by rank."""
        found = [self._read(path) for path in self.directory.glob("rank-*.json")]
        return sorted((record for record in found if record is not None), key=lambda record: record.rank)

    def _path(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.json"

    def _write(self, record: Record) -> None:
        path = self._path(record.rank)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(record, recurse=False)), encoding="utf-8")
        temporary.replace(path)

    def _read(self, path: Path) -> Record | None:
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
