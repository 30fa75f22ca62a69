"""What ends a launch from outside: the clock of a time budget, a request left in the run directory, a signal.

A run that is asked to stop ends after the step it is in, with a checkpoint. Before the first step of a launch there is
nothing to save, so a stop then unwinds at once, from wherever the launch is: ``StopNow``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from attrs import define, field

from gpt_simple.config.schema import TrainingConfig
from gpt_simple.errors import ConfigError

MAX_RUNTIME = "GPT_SIMPLE_MAX_RUNTIME"
"""Environment variable: seconds that a launch may take, for whoever starts one and cannot change its configuration."""

_FIRST_GUESS_BYTES_PER_SECOND = 100e6
"""How fast a checkpoint is taken to be written until one was: slow, because a first one that is late is lost."""

_SPREAD = 1.5
"""How much longer than the longest one so far the last save may take."""

_FADING = 0.95
"""A slow step counts less with every one after it."""

_KEY = "training.max_runtime_seconds"
_LOOK_SECONDS = 1.0
"""How often the run directory is looked at: a remote file system answers slowly."""


class StopNow(BaseException):
    """A stop before this launch made a step. No Exception: nobody on the way may take it for a failure."""


@define
class Walltime:
    """A time budget, and the reserve that the last step and checkpoint need of it, learned from those before.

    ``ends`` is the moment of ``time.monotonic`` at which the process must be gone: a clock that jumps moves nothing.
    """

    ends: float
    source: str
    least_reserve: float
    budget: float = math.inf
    """Seconds from the beginning of the launch, or of its job, to ``ends``."""
    _longest_save: float = 0.0
    _measured: bool = False
    _step: float = 0.0

    @classmethod
    def of_launch(
        cls, training: TrainingConfig, environment: Mapping[str, str], *, started: float, now: float, clock: float
    ) -> Walltime | None:
        """The budget that ends first; None if there is none.

        ``started`` and ``now`` are of ``time.monotonic``, ``clock`` is ``time.time`` at ``now``. Raises ConfigError
        for a variable that is no number, and for a budget that the reserve uses up.
        """
        least, budgets = training.walltime_reserve_seconds, []
        if training.max_runtime_seconds is not None:
            most = training.max_runtime_seconds
            budgets.append((started + most, _KEY, most))
        if (seconds := _number(environment, MAX_RUNTIME)) is not None:
            _refuse_reserve(least, seconds, f"${MAX_RUNTIME}")
            budgets.append((started + seconds, f"${MAX_RUNTIME}", seconds))
        if (end := _number(environment, "SLURM_JOB_END_TIME")) is not None:
            limit = math.inf
            if (begin := _number(environment, "SLURM_JOB_START_TIME")) is not None:
                limit = end - begin
                _refuse_reserve(least, limit, "the time limit of the SLURM job")
            budgets.append((now + end - clock, "$SLURM_JOB_END_TIME", limit))
        if not budgets:
            return None
        ends, source, budget = min(budgets)
        return cls(ends, source, least, budget)

    @property
    def reserve(self) -> float:
        """Seconds before ``ends`` at which no further step may begin."""
        return max(self.least_reserve, _SPREAD * self._longest_save + 2 * self._step)

    def expect_save_of(self, size: int) -> None:
        """A checkpoint will have about so many bytes. ConfigError if no launch could ever make a step before it."""
        self._longest_save = size / _FIRST_GUESS_BYTES_PER_SECOND
        if self.reserve >= self.budget:
            raise ConfigError(
                f"{self.reserve:.0f} s are kept for the first checkpoint, of {size / 2**30:.1f} GiB, and the budget has"
                f" {self.budget:.0f} s: raise it",
                location=None if self.source == _KEY else self.source,
                key=_KEY if self.source == _KEY else "",
            )

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long, from the end of its step to being durable."""
        self._longest_save = max(seconds, self._longest_save) if self._measured else seconds
        self._measured = True

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        self._step = max(seconds, _FADING * self._step)

    def is_up(self) -> bool:
        """Whether the run must stop now to be gone in time."""
        return time.monotonic() + self.reserve >= self.ends

    def __str__(self) -> str:
        return f"the time budget is used up ({self.source}; {self.reserve:.0f} s are kept for the last checkpoint)"


@define
class Outside:
    """Asked at every step and between the batches of an evaluation: a reason to stop, or nothing.

    ``asked`` looks at the run directory, which on a remote file system takes a while.
    """

    walltime: Walltime | None
    asked: Callable[[], str]
    _looked: float = field(factory=time.monotonic)

    def __call__(self) -> str:
        if self.walltime is not None and self.walltime.is_up():
            return str(self.walltime)
        if (now := time.monotonic()) - self._looked < _LOOK_SECONDS:
            return ""
        self._looked = now
        return self.asked()


def _number(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"${name} is {text!r}: expected a number of seconds") from None


def _refuse_reserve(reserve: float, budget: float, name: str) -> None:
    if reserve >= budget:
        raise ConfigError(
            f"training.walltime_reserve_seconds {reserve:g} leaves nothing of the {budget:g} s of {name}:"
            " lower the one or raise the other"
        )
