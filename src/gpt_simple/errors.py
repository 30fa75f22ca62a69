"""Every failure that a user can cause or meet, and the exit code each one ends with.

An error is one sentence that names the thing, says what was expected and what to do next. Code that raises one of
these has left the disk as it found it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum


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


class GptSimpleError(Exception):
    """Base of all errors that are shown to the user as a sentence and not as a traceback."""

    exit_code: ExitCode = ExitCode.FAILURE
    silent: bool = False
    """Another process has the message: this one only leaves."""


class ConfigError(GptSimpleError):
    """Usage or configuration. The message may span several lines: one per mistake."""

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


class Halted(GptSimpleError):
    """The run stopped itself because going on would be useless; a person must look."""

    exit_code = ExitCode.HALTED


@contextmanager
def collecting(errors: list[GptSimpleError]) -> Iterator[None]:
    """Keep an error and go on behind the block, so that all of them are told at once."""
    try:
        yield
    except GptSimpleError as error:
        errors.append(error)


def raise_all(errors: Sequence[GptSimpleError]) -> None:
    """Raise the errors as one, of the type of the worst; nothing if there are none."""
    if errors:
        worst = max(errors, key=lambda error: error.exit_code)
        lines = dict.fromkeys(line for error in errors for line in str(error).splitlines())
        raise worst if len(errors) == 1 else type(worst)("\n".join(lines))
