"""Ticks and ranges of a chart."""

from __future__ import annotations

import pytest

from gpt_simple.report.chart import Line, Range, vertical_range


def test_ticks_are_round_and_inside() -> None:
    assert Range(0.0, 103.0, 0, 1).ticks() == [0, 20, 40, 60, 80, 100]
    assert Range(0.2, 0.31, 0, 1).ticks() == pytest.approx([0.2, 0.22, 0.24, 0.26, 0.28, 0.3])
    assert Range(0.004, 70.0, 0, 1, log=True).ticks() == pytest.approx([0.01, 0.1, 1, 10])
    assert Range(0.9, 12.0, 0, 1, log=True).ticks() == pytest.approx([1, 2, 5, 10])
    assert Range(2.1, 4.9, 0, 1, log=True).ticks() == pytest.approx([2.5, 3, 3.5, 4, 4.5])


def test_the_start_of_a_loss_may_run_off_the_top() -> None:
    """So that the rest can be read."""
    line = Line("loss", {}, [100.0, 50.0, *[2.0 + 1 / index for index in range(1, 99)]], 0)
    settled = vertical_range([line], settles=True)
    assert settled.low < 2.01
    assert settled.high < 3
    assert vertical_range([line]).high > 100
