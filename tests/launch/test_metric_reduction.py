"""Metrics of several processes in one collective."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch

from gpt_simple import Metric
from gpt_simple.distributed import metric_reduction
from gpt_simple.distributed.process_group import ProcessGroup
from tests.launch.conftest import Ranks


@pytest.mark.parametrize("torch_has_it", [True, False], ids=["newest torch", "torch before 2.13"])
def test_metrics_are_gathered_by_either_name_of_the_collective(ranks: Ranks, torch_has_it: bool) -> None:
    def work(rank: int) -> dict[str, float]:
        if not torch_has_it:
            torch.distributed.__dict__.pop("all_gather_single", None)
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 calls the former name deprecated
        module = importlib.reload(metric_reduction)
        reducer = module.MetricReducer(ProcessGroup.join(20.0))
        return reducer.reduce({"mean": Metric(float(rank), weight=1.0 + rank), "sum": Metric(2.0, reduce="sum")})

    expected = {"mean": pytest.approx(2 / 3), "sum": 4.0}
    assert ranks(2, work) == [expected, expected]
