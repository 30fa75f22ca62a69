"""The errors that are shown to users, and the exit code of each.

An error carries its problems as data: the location, the key, what is wrong, and what to do. They become text where they
are shown, and no code reads that text again. Code that raises one of these errors has left the disk as it found it.
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

    ``location`` is a place in the user's terms (``config.toml:12``, ``--training.max_steps``, ``$WORLD_SIZE``), or None
    if that is unknown. ``key`` is a dotted key of the configuration, or empty. ``hint`` says what to do, or is empty.
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

    Raise it with a message, and with a location, a key and a hint if there are any: ``ConfigError("expected a number",
    key="plugins.csv.n", hint="write 5")``. Several problems are several ``Problem`` objects.
    """

    exit_code: int = ExitCode.FAILURE
    silent: bool = False
    """Whether this process exits without a message, because another process reports it."""

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
        """At least one problem, unless the error was raised without a message."""
        # The constructor of a subclass may leave other arguments in args.
        return tuple(p if isinstance(p, Problem) else Problem(None, "", str(p)) for p in self.args)

    def replace_problems(self, problems: Iterable[Problem]) -> Self:
        """Set the problems of this error, for example with locations or without secrets, and return the error."""
        self.args = tuple(problems)
        return self

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class ConfigError(GptSimpleError):
    """The command line or the configuration is wrong."""

    exit_code = ExitCode.CONFIG


class DataError(GptSimpleError):
    """The data are missing, damaged, or differ from what the configuration says."""

    exit_code = ExitCode.DATA


class CheckpointError(GptSimpleError):
    """A checkpoint or the run directory cannot be used as asked."""

    exit_code = ExitCode.CHECKPOINT


class PluginError(GptSimpleError):
    """A plugin is broken. The message names plugin, distribution, version, file, hook and step where known."""

    exit_code = ExitCode.PLUGIN
    blamed = False
    """Whether the message names the plugin and the hook that failed: such an error is not wrapped again."""


class RankFailed(GptSimpleError):
    """Another process failed. ``silent``: that process, or a third one, reports the failure.

    ``timed_out``: the other process did not reach a collective in time.
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


class OutOfMemory(GptSimpleError):
    """The memory of the device or of the host is used up. That is no code's defect, and the next launch resumes."""


class DeviceLost(GptSimpleError):
    """The device fails in every call from now on. The process must end without freeing what is on it."""


class Halted(GptSimpleError):
    """The run stopped itself because going on would be useless. A person must find the cause."""

    exit_code = ExitCode.HALTED


class Interruption(BaseException):
    """Base of what leaves a hook or method without being its failure. Not an Exception, so that no handler takes it."""


PASSING = (KeyboardInterrupt, Interruption)
"""The exceptions that no code of a plugin fails with; any other counts as its failure, also a BaseException."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'cosine'?)``, to follow an unknown name; empty if none of ``names`` is similar."""
    import difflib  # only after a mistake

    close = difflib.get_close_matches(name, [*names], 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def describe(error: BaseException) -> str:
    """``ValueError: message``; only the class if there is no message, or if the exception cannot show it."""
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def system_errors(kind: type[GptSimpleError], place: object = "", key: str = "") -> Iterator[None]:
    """Raise what the operating system refuses within as ``kind``: a path too long, a disk that may only be read.

    The message names the file, or ``place`` where the error has none.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the output has ended
    except OSError as error:
        raise kind(f"{error.filename or place} cannot be used: {error.strerror or error}", key=key) from error


@contextmanager
def collecting(errors: list[GptSimpleError]) -> Iterator[None]:
    """Append an error raised in the block to ``errors`` and go on, so that all errors are reported at once."""
    try:
        yield
    except GptSimpleError as error:
        errors.append(error)


def raise_all(errors: Sequence[GptSimpleError]) -> None:
    """Raise the worst of the errors (by exit code) with the problems of all of them; do nothing without errors."""
    if errors:
        worst = max(errors, key=lambda error: error.exit_code)
        raise worst.replace_problems(dict.fromkeys(problem for error in errors for problem in error.problems))
