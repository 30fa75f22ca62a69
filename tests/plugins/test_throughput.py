"""Speed, checked by a clock of the test's own: what counts as training, and that no time is lost."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import Plugin, hookimpl, read_metrics
from gpt_simple.engine.metrics import MetricBuffer
from tests.tiny import TinyRun

STEP_TOKENS = 2 * 2 * 32


class Takes(Plugin[Any]):
    """Lets a hook take so many seconds, and reads the clock before the first step and at each logging boundary."""

    ranks = "all"
    on_error = "abort"

    def __init__(self, **seconds: float) -> None:
        super().__init__(None)
        self.seconds = seconds
        self.laps: list[float] = []

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.laps.append(time.perf_counter())

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        time.sleep(self.seconds.get("step", 0.0))

    @hookimpl
    def collect_metrics(self, run: Any, event: Any) -> dict[str, Any]:
        self.laps.append(time.perf_counter())
        return {}

    @hookimpl
    def on_metrics(self, run: Any, event: Any) -> None:
        time.sleep(self.seconds.get("logging", 0.0))

    @hookimpl
    def on_eval_end(self, run: Any, event: Any) -> None:
        time.sleep(self.seconds.get("evaluation", 0.0))

    @hookimpl
    def on_checkpoint_saved(self, run: Any, event: Any) -> None:
        time.sleep(self.seconds.get("checkpoint", 0.0))


def rows(directory: Path) -> list[dict[str, Any]]:
    found = [row for row in read_metrics(directory / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in found] == [2, 4, 6]
    return found


def test_the_wall_rate_has_all_time_and_the_other_only_training(tiny: TinyRun) -> None:
    takes = Takes(step=0.05, logging=0.3, evaluation=0.6, checkpoint=0.6)
    result = tiny(plugins=[takes], training__eval_steps=2, training__save_steps=2)
    first, *others = rows(result.output_dir)
    wall = [2 * STEP_TOKENS / row["perf/wall_tokens_per_second"] for row in (first, *others)]
    begun, *laps = takes.laps
    assert sum(wall) == pytest.approx(laps[-1] - begun, abs=0.1)
    assert wall[1:] == pytest.approx([after - before for before, after in pairwise(laps)], abs=0.1)
    assert len(others) == 2
    for row in others:
        training = 2 * STEP_TOKENS / row["perf/tokens_per_second"]
        assert 0.4 <= training < 0.9, "two steps and what logging took; not the 1.2 s of evaluation and checkpoint"
        assert row["perf/step_ms"] == pytest.approx(1e3 * training / 2)
    assert first["perf/step_ms"] < 250, "the first step of a process is left out"


def test_steps_that_a_device_makes_later_take_their_time(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is given work and returns at once; only whoever reads a result waits for it."""
    read = MetricBuffer.read

    def waits(self: MetricBuffer, *arguments: Any) -> Any:
        time.sleep(0.5)
        return read(self, *arguments)

    monkeypatch.setattr(MetricBuffer, "read", waits)
    for row in rows(tiny().output_dir):
        assert 2 * STEP_TOKENS / row["perf/wall_tokens_per_second"] >= 0.5
        steps = 1 if row["step"] == 2 else 2
        assert row["perf/step_ms"] >= 500 / steps


def test_without_data_training_waits_and_that_is_told(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt_simple.data.loader import Loader

    next_step = Loader.next_step

    def slow(self: Loader) -> Any:
        time.sleep(0.1)
        self.wait_seconds += 0.1
        return next_step(self)

    monkeypatch.setattr(Loader, "next_step", slow)
    for row in rows(tiny().output_dir):
        waited = row["perf/data_wait"] * 2 * STEP_TOKENS / row["perf/wall_tokens_per_second"]
        assert waited == pytest.approx(0.2, abs=0.1)
        assert 0 <= row["perf/data_wait"] <= 1


def test_a_device_without_a_known_peak_has_no_mfu(tiny: TinyRun) -> None:
    assert all("perf/mfu" not in row for row in rows(tiny().output_dir))


def test_mfu_is_the_share_of_the_peak_that_the_tokens_took(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_simple.job.build.peak_flops", lambda *_: 1e12)
    flops: list[float] = []

    class Asks(Plugin[Any]):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            flops.append(run.facts()["flops_per_token"])

    for row in rows(tiny(plugins=[Asks]).output_dir):
        assert row["perf/mfu"] == pytest.approx(row["perf/tokens_per_second"] * flops[0] / 1e12)


def test_the_peak_can_be_configured(tiny: TinyRun) -> None:
    class Asks(Plugin[Any]):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            assert run.facts()["peak_flops"] == 2e12
            flops.append(run.facts()["flops_per_token"])

    flops: list[float] = []
    for row in rows(tiny(plugins=[Asks], training__peak_flops=2e12).output_dir):
        assert row["perf/mfu"] == pytest.approx(row["perf/tokens_per_second"] * flops[0] / 2e12)


def test_mfu_has_the_flops_of_the_length_of_rows(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of each length is left out: it compiles."""
    monkeypatch.setattr("gpt_simple.job.build.peak_flops", lambda *_: 1e12)
    flops: dict[int, float] = {}

    class Asks(Plugin[Any]):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            flops.update({length: run.model.flops_per_token(length) for length in (8, 32)})

    stages = [{"steps": 3, "length": 8}]
    first, second, third = rows(tiny(plugins=[Asks], training__warmup_stages=stages).output_dir)
    assert flops[8] < flops[32]
    for row, length in ((first, 8), (second, 8), (third, 32)):
        assert row["perf/mfu"] == pytest.approx(row["perf/tokens_per_second"] * flops[length] / 1e12)
