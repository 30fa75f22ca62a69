"""The numbers of a run, from its files."""

from __future__ import annotations

import math

from gpt_simple.report.history import read_history, thin
from tests.report.conftest import Make, train


def test_pauses_and_lost_steps_are_no_time(make: Make) -> None:
    history = read_history(make("a"), "a")
    assert history.elapsed(train(50)["time"]) == 50
    assert history.elapsed(train(60)["time"]) == 60
    assert history.points("train/loss", 100).x["tokens"][-1] == 6400


def test_thinning_keeps_peaks_gaps_ends_and_order() -> None:
    values = [math.sin(index / 500) for index in range(50_000)]
    values[31_337] = 9.0
    values[7] = -9.0
    values[20_000] = math.nan
    kept = thin(values, 600)
    assert len(kept) <= 603
    assert {0, 7, 20_000, 31_337, 49_999} <= set(kept)
    assert kept == sorted(kept)
