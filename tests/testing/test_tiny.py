"""The tiny run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen

from gpt_simple import Metric, Plugin, Run, hookimpl, read_metrics
from gpt_simple.errors import PluginError
from gpt_simple.hooks import Component, NoConfig
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


@frozen
class OneTable:
    """The section of a model with fields of its own."""

    name: str = "table"
    scale: float = 1.0


class Table(torch.nn.Module):
    def __init__(self, config: OneTable, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(vocab_size, vocab_size) * config.scale)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.logits[input_ids]
        if labels is None:
            return logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize(
    ("component", "overrides"),
    [
        (Component("model", "table", Table, OneTable), {"model.scale": 0.5}),
        (Component("schedule", "half", lambda config, max_steps: lambda step: config.learning_rate / 2), {}),
        (
            [
                Component("model", "table", Table, OneTable),
                Component("schedule", "half", lambda config, max_steps: lambda step: 0.1),
            ],
            {"optimizer.schedule": "constant"},
        ),
    ],
    ids=["its own section", "a schedule", "two of them"],
)
def test_a_component_is_trained_like_a_plugin(component: Any, overrides: dict[str, Any], tmp_path: Path) -> None:
    trained = train(component=component, overrides=overrides, output_dir=tmp_path)
    assert (trained.result.status, trained.failed) == ("completed", [])
    names = {part.name for part in (component if isinstance(component, list) else [component])}
    assert ("logits" in trained.weights) == ("table" in names)
    rates = {row["train/lr"] for row in read_metrics(tmp_path / "metrics.jsonl", "train")}
    assert (rates == {0.005}) == (names == {"half"})


def test_the_failure_of_a_component_under_test_names_it() -> None:
    def build(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no model today")

    with pytest.raises(PluginError, match=r"model 'bad' of the plugin components .*no model today"):
        train(component=Component("model", "bad", build))
