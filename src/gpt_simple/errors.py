"""Every failure that a user can cause or meet, and the exit code each one ends with.

An error carries its problems as data: where, which key, what is wrong, and what to do. They become text where they are
shown, and no code reads that text again. Code that raises one of these errors has left the disk as it found it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple, Self


class ExitCode(IntEnum):
    """What ``gpt-simple`` exits with; the same under one process and many."""

    COMPLETED = 0
    FAILURE = 1
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    PLUGIN = 5
    STOPPED = 75
    HALTED = 76
    FORCED = 130


class Problem(NamedTuple):
    """One thing that is wrong.

    ``location`` is where, as the user knows it: ``config.toml:12``, ``--training.max_steps``, ``$WORLD_SIZE``; None if
    that is unknown. ``key`` is a dotted key of the configuration, or empty. ``hint`` says what to do, or is empty.
    """

    location: str | None
    key: str
    message: str
    hint: str = ""

    @property
    def place(self) -> str:
        """Location and key in one: ``config.toml:12 (training.seed)``."""
        key = "" if self.location == f"--{self.key}" else self.key
        return f"{self.location} ({key})" if self.location and key else self.location or key

    def within(self, place: str) -> Problem:
        """The same problem at a wider location, which goes before its own: ``process 2: config.toml:12``."""
        return self._replace(location=f"{place}: {self.location}" if self.location else place)

    def __str__(self) -> str:
        key = "" if self.location == f"--{self.key}" else self.key
        text = ": ".join(part for part in (self.location, key, self.message) if part)
        return f"{text}; {self.hint}" if self.hint else text


class GptSimpleError(Exception):
    """Base of all errors that are shown to the user as sentences and not as a traceback.

    Raise it with a message, and with what is known beside it: ``ConfigError("expected a number", key="plugins.csv.n",
    hint="write 5")``. Several problems are several ``Problem`` objects.
    """

    exit_code: int = ExitCode.FAILURE
    silent: bool = False
    """Another process has the message: this one only leaves."""

    def __init__(
        self,
        *problems: object,
        location: str | None = None,
        key: str = "",
        hint: str = "",
        exit_code: int | None = None,
    ) -> None:
        super().__init__(*(p if isinstance(p, Problem) else Problem(location, key, str(p), hint) for p in problems))
        if exit_code is not None:
            self.exit_code = exit_code

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong, at least one thing unless the error was raised without a message."""
        # A subclass may have passed other arguments by the constructor.
        return tuple(p if isinstance(p, Problem) else Problem(None, "", str(p)) for p in self.args)

    def replace_problems(self, problems: Iterable[Problem]) -> Self:
        """Give this error other problems: located ones, without secrets, or those of further errors. Returns it."""
        self.args = tuple(problems)
        return self

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class ConfigError(GptSimpleError):
    """Usage or configuration."""

    exit_code = ExitCode.CONFIG


class DataError(GptSimpleError):
    """The data are missing, damaged, or not what the configuration says."""

    exit_code = ExitCode.DATA


class CheckpointError(GptSimpleError):
    """A checkpoint or the run directory cannot be used as asked."""

    exit_code = ExitCode.CHECKPOINT


class PluginError(GptSimpleError):
    """A plugin is broken. The message names plugin, distribution, version, file, hook and step where known."""

    exit_code = ExitCode.PLUGIN
    blamed = False
    """Whether the message says whose failure in which hook it is. Such an error ends the run through any other hook."""


class RankFailed(GptSimpleError):
    """Another process failed. ``silent`` where that process, or a third one, reports it.

    A launcher that knows how the other process ended knows more. ``timed_out``: the other one did not come in time.
    """

    def __init__(
        self,
        *problems: object,
        hint: str = "",
        exit_code: int = ExitCode.FAILURE,
        silent: bool = True,
        timed_out: bool = False,
    ) -> None:
        super().__init__(*problems, hint=hint, exit_code=exit_code)
        self.silent = silent
        self.timed_out = timed_out


class Halted(GptSimpleError):
    """The run stopped itself because going on would be useless; a person must look."""

    exit_code = ExitCode.HALTED


@contextmanager
def collecting(errors: list[GptSimpleError]) -> Iterator[None]:
    """Keep an error and go on behind the block, so that all of them are reported at once."""
    try:
        yield
    except GptSimpleError as error:
        errors.append(error)


def raise_all(errors: Sequence[GptSimpleError]) -> None:
    """Raise the worst of the errors with the problems of all of them; nothing if there are none."""
    if errors:
        worst = max(errors, key=lambda error: error.exit_code)
        raise worst.replace_problems(dict.fromkeys(problem for error in errors for problem in error.problems))
