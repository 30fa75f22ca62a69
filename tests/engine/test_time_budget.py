"""A time budget ends at the right moment, and its reserve is learned."""

from __future__ import annotations

import re
import time

import pytest
import torch
from attrs import evolve

from gpt_simple.config.schema import TrainingConfig
from gpt_simple.engine.time_budget import Deadline, TimeBudget
from gpt_simple.errors import ConfigError
from tests.tiny import TinyRun

NOW, CLOCK = 1_000.0, 1_800_000_000.0
PLAIN = TrainingConfig()


def launch(training: TrainingConfig = PLAIN, **environment: str) -> Deadline | None:
    """A launch that began 10 s ago."""
    return Deadline.of_launch(training, environment, started=NOW - 10, now=NOW, clock=CLOCK)


def test_without_a_budget_there_is_none() -> None:
    assert launch() is None


def test_the_budget_that_ends_first_counts() -> None:
    training = evolve(PLAIN, max_runtime_seconds=500.0)
    ends = CLOCK + 400
    for environment, expected, source in (
        ({}, 490, "training.max_runtime_seconds"),
        ({"GPT_SIMPLE_MAX_RUNTIME": "300"}, 290, "$GPT_SIMPLE_MAX_RUNTIME"),
        ({"SLURM_JOB_END_TIME": f"{ends:.0f}"}, 400, "$SLURM_JOB_END_TIME"),
        ({"SLURM_JOB_END_TIME": f"{ends:.0f}", "GPT_SIMPLE_MAX_RUNTIME": "9999"}, 400, "$SLURM_JOB_END_TIME"),
    ):
        found = launch(training, **environment)
        assert found is not None
        assert (found.ends - NOW, found.source) == (pytest.approx(expected), source)


def test_a_reserve_that_leaves_nothing_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"walltime_reserve_seconds 30 .* 20 s of \$GPT_SIMPLE_MAX_RUNTIME"):
        launch(GPT_SIMPLE_MAX_RUNTIME="20")
    job = {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": "1025"}
    with pytest.raises(ConfigError, match="25 s of the time limit of the SLURM job"):
        launch(**job)
    with pytest.raises(ConfigError, match="GPT_SIMPLE_MAX_RUNTIME is 'soon'"):
        launch(GPT_SIMPLE_MAX_RUNTIME="soon")


@pytest.mark.parametrize("value", ["soon", "nan", "-nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("name", ["GPT_SIMPLE_MAX_RUNTIME", "SLURM_JOB_END_TIME", "SLURM_JOB_START_TIME"])
def test_a_time_that_is_no_number_is_refused_by_name(name: str, value: str) -> None:
    environment = {"GPT_SIMPLE_MAX_RUNTIME": "600", "SLURM_JOB_END_TIME": f"{CLOCK + 540}", name: value}
    with pytest.raises(ConfigError, match=rf"\${name} is '{value}': expected a number of seconds"):
        launch(**environment)


@pytest.mark.parametrize(
    ("environment", "source"),
    [
        ({"GPT_SIMPLE_MAX_RUNTIME": "600"}, r"\$GPT_SIMPLE_MAX_RUNTIME"),
        ({"SLURM_JOB_START_TIME": f"{CLOCK - 60}", "SLURM_JOB_END_TIME": f"{CLOCK + 540}"}, r"\$SLURM_JOB_END_TIME"),
    ],
)
def test_a_checkpoint_that_leaves_nothing_is_refused_too(environment: dict[str, str], source: str) -> None:
    """Else every launch would stop, resumable, before its first step, and be started again."""
    found = launch(**environment)
    assert found is not None
    TimeBudget(found, first_save_bytes=30_000_000_000)
    with pytest.raises(ConfigError, match=rf"{source}: 750 s are kept for the first checkpoint, of 46.6 GiB.* 600 s"):
        TimeBudget(found, first_save_bytes=50_000_000_000)


def test_a_job_that_is_nearly_over_is_not_refused_but_stops() -> None:
    """The next job of the chain has its whole time again."""
    late = Deadline.of_launch(
        PLAIN,
        {"SLURM_JOB_START_TIME": f"{CLOCK - 3600}", "SLURM_JOB_END_TIME": f"{CLOCK + 5}"},
        started=time.monotonic(),
        now=time.monotonic(),
        clock=CLOCK,
    )
    assert late is not None
    assert "the time budget is used up ($SLURM_JOB_END_TIME" in late.reason_to_stop()


def test_the_reserve_follows_the_measured_saves_and_steps() -> None:
    deadline = Deadline(ends=NOW, source="a test", least_reserve=30)
    assert TimeBudget(deadline, first_save_bytes=0).reserve == 30
    budget = TimeBudget(deadline, first_save_bytes=10_000_000_000)
    assert budget.reserve == pytest.approx(150), "a first checkpoint is taken to be slow"
    budget.record_save(40)
    assert budget.reserve == pytest.approx(60)
    budget.record_save(4)
    assert budget.reserve == pytest.approx(60), "the longest save counts"
    for _ in range(3):
        budget.record_step(20)
    assert budget.reserve == pytest.approx(100), "another step may begin just before the end"
    for _ in range(200):
        budget.record_step(0.1)
    assert budget.reserve == pytest.approx(60.2), "a slow step is forgotten"


def test_the_reserve_grows_with_the_next_step() -> None:
    budget = TimeBudget(Deadline(ends=NOW, source="a test", least_reserve=1), first_save_bytes=0)
    budget.record_step(10, 1.0)
    assert budget.reserve == pytest.approx(20)
    budget.record_step(10, 4.0)
    assert budget.reserve == pytest.approx(80), "the next step has four times the tokens"
    budget.record_step(40, 0.5)
    assert budget.reserve == pytest.approx(40)


def test_the_reserve_has_the_steps_time_on_the_device() -> None:
    """On a GPU the host is done with a step before the device is; only a read tells how long it took."""
    budget = TimeBudget(Deadline(ends=NOW, source="a test", least_reserve=1), first_save_bytes=0)
    budget.record_lap(10)
    for _ in range(200):
        budget.record_step(0.1)
    assert budget.reserve == pytest.approx(20), "it does not fade until the device is read again"
    budget.record_step(0.1, 3.0)
    assert budget.reserve == pytest.approx(60), "the next step has three times the tokens"
    budget.record_lap(2)
    assert budget.reserve == pytest.approx(4)


def test_a_run_learns_the_time_of_a_queue_of_steps(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the device is as slow as the read of its results."""
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (time.sleep(1.5), real(self))[1])
    budget = {"training__max_runtime_seconds": 5, "training__walltime_reserve_seconds": 0}
    result = tiny(training__max_steps=10**6, training__logging_steps=2, **budget)
    kept = re.search(r"the time budget is used up \(.*; (\d+) s are kept for the last checkpoint\)", result.reason)
    assert kept is not None, result.reason
    assert int(kept[1]) >= 1, "two steps of 0.75 s"


def test_a_clock_that_jumps_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    deadline = Deadline.of_launch(
        evolve(PLAIN, max_runtime_seconds=3600.0), {}, started=begin, now=begin, clock=time.time()
    )
    assert deadline is not None
    monkeypatch.setattr(time, "time", lambda: CLOCK + 86_400 * 365)
    assert not deadline.reason_to_stop()
