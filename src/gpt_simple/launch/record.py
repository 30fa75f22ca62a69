"""The files that the processes of a launch leave for their launcher: who they are, and how each of them ended.

An exit status holds too little for that. torchrun turns every status into 0 or 1, and restarts processes whose status
is not 0, also those that ended on purpose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, field, frozen

from gpt_simple._files import write_whole
from gpt_simple.errors import Problem

DIRECTORY = "GPT_SIMPLE_LAUNCH"
"""Environment variable: the directory of the records. Our launcher sets it for the processes that it starts."""

LAUNCHER = "GPT_SIMPLE_LAUNCHER"
"""Environment variable: the launcher's process id. A child that starts late cannot ask for it: its parent is gone."""

STARTED = "GPT_SIMPLE_LAUNCHED_AT"
"""Environment variable: when the launcher began, a moment of ``time.monotonic``, which no setting of a clock moves."""

_NO_MORE = "no-more"
_OWNED = "owned"


def _problems(rows: Iterable[Iterable[Any]]) -> tuple[Problem, ...]:
    return tuple(Problem(*row) for row in rows)


@frozen
class Record:
    """One process. ``code`` is None until it has ended by itself.

    ``silent``: its failure is a secondary one, and the root cause is in another record. ``timed_out``: it gave up
    waiting for another process.
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
    """The records of the processes on this machine. The directory is gone once the launcher is."""

    directory: Path

    @classmethod
    def of_this_launch(cls, environment: Mapping[str, str]) -> Records | None:
        """Where this process leaves its record; None if no launcher of ours started it."""
        directory = environment.get(DIRECTORY)
        return cls(Path(directory)) if directory else None

    def begin(self, rank: int) -> Record | None:
        """Write the record of this process. None: the launch is ending, and an earlier record stays as it is."""
        record = Record(rank, os.getpid())
        earlier = self._read(self._path(rank))
        # Write first, then check: a launcher that is stopping sees this record, or this process sees its mark.
        try:
            self._write(record)
        except FileNotFoundError:
            return None  # the launcher has left
        if (self.directory / _NO_MORE).exists():
            self._write(evolve(earlier, pid=record.pid) if earlier else record)
            return None
        return record

    def end(self, record: Record) -> None:
        """Write how the process ended."""
        if self.directory.exists():
            self._write(record)

    def no_more(self) -> None:
        """From now on processes that start leave at once: the launch is ending."""
        self._mark(_NO_MORE)

    def owned(self) -> None:
        """From now on the run directory holds this launch's run: a restarted process must not discard it."""
        self._mark(_OWNED)

    def has_owned(self) -> bool:
        """Whether a process of this launch called ``owned``."""
        return (self.directory / _OWNED).exists()

    def read(self) -> list[Record]:
        """All records, by rank."""
        found = [self._read(path) for path in self.directory.glob("rank-*.json")]
        return sorted((record for record in found if record is not None), key=lambda record: record.rank)

    def _mark(self, name: str) -> None:
        if self.directory.exists():
            (self.directory / name).touch()

    def _path(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.json"

    def _write(self, record: Record) -> None:
        write_whole(self._path(record.rank), json.dumps(asdict(record, recurse=False)), durable=False)

    def _read(self, path: Path) -> Record | None:
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
