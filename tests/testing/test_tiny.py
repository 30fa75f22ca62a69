"""The tiny run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gpt_simple import Metric, Plugin, Run, hookimpl, read_metrics
from gpt_simple.hooks import NoConfig
from gpt_simple.testing import train


def test_a_tiny_run_has_one_thread_and_restores_the_number() -> None:
    seen: list[int] = []

    class Looks(Plugin[NoConfig]):
        @hookimpl
        def on_step_end(self, run: Run, event: Any) -> None:
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(Looks)
        assert (set(seen), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_no_plugin_takes_a_metric_of_the_engine_or_a_built_in(tmp_path: Path) -> None:
    class Aaa(Plugin[NoConfig]):
        @hookimpl
        def collect_metrics(self, run: Run, event: Any) -> dict[str, Metric]:
            return {"train/loss": Metric(-1.0)}

        @hookimpl
        def evaluate(self, run: Run, event: Any) -> dict[str, Metric]:
            return {"eval/loss": Metric(-1.0)}

    trained = train(Aaa, output_dir=tmp_path)
    assert trained.result.final_loss > 0
    assert trained.result.best_val_loss > 0
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    for name in ("train/loss", "eval/loss"):
        assert all(row[name] >= 0 for row in rows if name in row)
        assert {row[f"{name}@aaa"] for row in rows if name in row} == {-1.0}


def test_collectives_of_the_run_refuse_where_they_would_hang() -> None:
    class Waits(Plugin[NoConfig]):
        @hookimpl
        def on_metrics(self, run: Run, event: Any) -> None:
            run.comm.barrier()

    assert train(Waits).failed == ["waits"]
