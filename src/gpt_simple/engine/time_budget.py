"""The time that a launch may take, and the reserve in it for the last step and checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress

from attrs import define, field, frozen

from gpt_simple.config.schema import TrainingConfig
from gpt_simple.errors import ConfigError

MAX_RUNTIME = "GPT_SIMPLE_MAX_RUNTIME"
"""Environment variable: seconds that a launch may take, for launchers that cannot change its configuration."""

_FIRST_GUESS_BYTES_PER_SECOND = 100e6
"""The assumed speed of the first save. A low guess: a checkpoint that is late is lost."""

_SPREAD = 1.5
"""The last save may take this many times the longest one so far."""

_FADING = 0.95
"""A slow step counts less with every one after it."""

_KEY = "training.max_runtime_seconds"


@frozen
class Deadline:
    """When the process must have ended. ``ends`` is of ``time.monotonic``, which no change of the clock moves."""

    ends: float
    source: str
    least_reserve: float
    budget: float = math.inf
    """Seconds from the beginning of the launch, or of its job, to ``ends``."""

    @classmethod
    def of_launch(
        cls, training: TrainingConfig, environment: Mapping[str, str], *, started: float, now: float, clock: float
    ) -> Deadline | None:
        """The budget that ends first; None if there is none.

        ``started`` and ``now`` are of ``time.monotonic``, ``clock`` is ``time.time`` at ``now``. Raises ConfigError
        for a variable that is not a number, and for a budget that is not longer than the reserve.
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

    def reason_to_stop(self, reserve: float | None = None) -> str:
        """Why no step may begin now; empty while there is time. ``reserve`` is ``least_reserve`` if it is not known."""
        reserve = self.least_reserve if reserve is None else reserve
        if time.monotonic() + reserve < self.ends:
            return ""
        return f"the time budget is used up ({self.source}; {reserve:.0f} s are kept for the last checkpoint)"


@define(eq=False)
class TimeBudget:
    """A deadline, with the reserve learned from the steps and saves so far.

    ``first_save_bytes``: about the size of a checkpoint. Raises ConfigError if the reserve for the first save is not
    shorter than the budget: every launch would stop before its first step.
    """

    deadline: Deadline
    first_save_bytes: int
    _longest_save: float | None = field(default=None, init=False)
    _step: float = field(default=0.0, init=False)
    _lap: float = field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        if self.reserve >= self.deadline.budget:
            size, source = self.first_save_bytes / 2**30, self.deadline.source
            raise ConfigError(
                f"{self.reserve:.0f} s are kept for the first checkpoint, of {size:.1f} GiB, and the budget has"
                f" {self.deadline.budget:.0f} s: raise it",
                key=_KEY if source == _KEY else "",
                location=None if source == _KEY else source,
            )

    @property
    def reserve(self) -> float:
        """Seconds before the deadline at which no further step may begin."""
        guess = self.first_save_bytes / _FIRST_GUESS_BYTES_PER_SECOND
        save = guess if self._longest_save is None else self._longest_save
        return max(self.deadline.least_reserve, _SPREAD * save + 2 * max(self._step, self._lap))

    def record_save(self, seconds: float) -> None:
        """Learn from a checkpoint: seconds from the end of its step until it was durable."""
        self._longest_save = max(seconds, self._longest_save or 0.0)

    def record_step(self, seconds: float, growth: float = 1.0) -> None:
        """Learn from the host's time of a step. A slow one counts less with each that follows.

        ``growth``: the tokens of the next step, divided by those of this one.
        """
        self._step = max(seconds, _FADING * self._step) * growth
        self._lap *= growth

    def record_lap(self, seconds: float) -> None:
        """Learn the mean step between two reads of the device, whose queue lets the host run ahead."""
        self._lap = seconds

    def reason_to_stop(self) -> str:
        """Why no further step may begin; empty while there is time."""
        return self.deadline.reason_to_stop(self.reserve)


def _number(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name)
    if not text:
        return None
    with suppress(ValueError):
        # A comparison with NaN is always false: no deadline would ever be reached.
        if math.isfinite(number := float(text)):
            return number
    raise ConfigError(f"${name} is {text!r}: expected a number of seconds", hint="unset it for no limit")


def _refuse_reserve(reserve: float, budget: float, name: str) -> None:
    if reserve >= budget:
        raise ConfigError(
            f"training.walltime_reserve_seconds {reserve:g} leaves nothing of the {budget:g} s of {name}:"
            " lower the one or raise the other"
        )
