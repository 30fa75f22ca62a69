"""Learning rates are pure functions of the step."""

from __future__ import annotations

import pytest

from gpt_simple.config.schema import OptimizerConfig
from gpt_simple.engine import schedules


def rates(name: str, steps: range, max_steps: int = 100, **fields: object) -> list[float]:
    config = OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 10, "min_lr_ratio": 0.1, **fields})
    rate = getattr(schedules, name)(config, max_steps)
    return [rate(step) for step in steps]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step(name: str) -> None:
    assert rates(name, range(1, 11)) == pytest.approx([step / 10 for step in range(1, 11)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_floor_is_reached_at_the_last_step_and_holds(name: str) -> None:
    assert rates(name, range(100, 1000, 50)) == pytest.approx([0.1] * 18)


def test_cosine_is_half_way_in_the_middle_of_the_decay() -> None:
    assert rates("cosine", range(55, 56)) == pytest.approx([0.55])


def test_decay_steps_is_the_length_of_the_decay() -> None:
    assert rates("linear", range(10, 31, 5), decay_steps=20) == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1])


def test_wsd_stays_at_the_peak_until_the_last_fifth() -> None:
    assert rates("wsd", range(10, 81, 10)) == [1.0] * 8
    assert rates("wsd", range(90, 91)) == pytest.approx([0.55])


def test_constant_never_decays() -> None:
    assert rates("constant", range(10, 2000, 100)) == [1.0] * 20


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates("constant", range(1, 2), warmup_steps=0) == [1.0]


def test_a_warm_up_longer_than_the_run_only_warms_up() -> None:
    assert rates("cosine", range(1, 6), max_steps=5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
