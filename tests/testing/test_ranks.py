"""Training on several processes in a test, with their metrics and failures."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import Metric, Plugin, Run, hookimpl, read_metrics
from gpt_simple.hooks import HOOKS, NoConfig
from gpt_simple.testing import Hang, train_on_ranks


def test_processes_can_be_forked_after_work_with_threads() -> None:
    program = (
        "from gpt_simple.testing import train, train_on_ranks; import torch; torch.set_num_threads(2);"
        "torch.ones(2000, 2000) @ torch.ones(2000, 2000); train(max_steps=2);"
        "print([outcome.error for outcome in train_on_ranks(timeout=30.0)])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["['', '']"], done.stdout + done.stderr


def test_metrics_of_two_processes_meet_by_name(tmp_path: Path) -> None:
    class Both(Plugin[NoConfig]):
        ranks = "all"

        @hookimpl
        def collect_metrics(self, run: Run, event: Any) -> dict[str, Metric]:
            metrics = {"x/b": Metric(100.0), "x/a": Metric(2.0 * run.rank)}
            return metrics if run.rank else dict(reversed(metrics.items()))

    outcomes = train_on_ranks(Both, output_dir=tmp_path, overrides={"training.logging_steps": 1})
    assert [outcome.error for outcome in outcomes] == ["", ""]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "x/a" in row]
    assert {(row["x/a"], row["x/b"]) for row in rows} == {(1.0, 100.0)}


def test_metrics_of_some_processes_are_reduced_over_those(tmp_path: Path) -> None:
    class Uneven(Plugin[NoConfig]):
        """More than fit at once on the second process, and a name that the first one does not return."""

        ranks = "all"

        def values(self, run: Run) -> dict[str, Metric]:
            if run.is_main:
                return {"x/all": Metric(1.0, reduce="sum"), "x/first": Metric(torch.tensor(3.0))}
            many = {f"y/{index}": Metric(1.0 * index) for index in range(100)}
            return {
                "x/all": Metric(2.0, reduce="sum"),
                "x/last": Metric(5.0, reduce="last"),
                "x/shared": Metric(7),
                **many,
            }

        @hookimpl
        def collect_metrics(self, run: Run, event: Any) -> dict[str, Metric]:
            return self.values(run)

        @hookimpl
        def evaluate(self, run: Run, event: Any) -> dict[str, Metric]:
            return self.values(run)

    class Zealous(Plugin[NoConfig]):
        @hookimpl
        def collect_metrics(self, run: Run, event: Any) -> dict[str, Metric]:
            return {"x/shared": Metric(11.0)}

    outcomes = train_on_ranks(Uneven, Zealous, output_dir=tmp_path, timeout=30)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    for row in (row for row in rows if row["kind"] in ("train", "eval")):
        assert (row["x/all"], row["x/first"], row["x/last"], row["y/99"]) == (3.0, 3.0, 5.0, 99.0)
        assert row["x/shared"] == 7
        assert row.get("x/shared@zealous", 11) == 11
    assert {row["kind"] for row in rows} >= {"train", "eval"}


def test_two_processes_train_one_model() -> None:
    class Sums(Plugin[NoConfig]):
        ranks = "all"

        @hookimpl
        def collect_metrics(self, run: Run, event: Any) -> dict[str, Metric]:
            return {"ranks": Metric(run.comm.sum(torch.ones(())), reduce="max")}

    first, second = train_on_ranks(Sums)
    assert first.error == second.error == ""
    assert first.weights == second.weights
    only_on_main = set(first.hooks) - set(second.hooks)
    assert {"check_config", "on_log", "on_metrics"} <= only_on_main
    assert not only_on_main & {hook for hook, info in HOOKS.items() if info.ranks == "all"}


def test_a_barrier_on_one_rank_is_found_with_the_place() -> None:
    class Waits(Plugin[NoConfig]):
        ranks = "all"

        @hookimpl
        def on_step_end(self, run: Run, event: Any) -> None:
            if run.is_main:
                torch.distributed.barrier()

    with pytest.raises(Hang, match="on_step_end"):
        train_on_ranks(Waits, timeout=8.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_fails_does_not_leave_the_other_waiting(rank: int) -> None:
    class FailsThere(Plugin[NoConfig]):
        ranks = "all"

        @hookimpl
        def on_gradients(self, run: Run, event: Any) -> None:
            if run.rank == rank:
                raise ValueError("boom")

    start = time.monotonic()
    outcomes = train_on_ranks(FailsThere, timeout=60)
    assert time.monotonic() - start < 30
    assert "failed in on_gradients at step 1: ValueError: boom" in outcomes[rank].error
    assert outcomes[1 - rank].error


def test_a_sink_that_fails_on_one_rank_does_not_stop_the_others() -> None:
    class FailsOnMain(Plugin[NoConfig]):
        @hookimpl
        def on_metrics(self, run: Run, event: Any) -> None:
            raise ValueError("boom")

        @hookimpl
        def collect_metrics(self, run: Run, event: Any) -> dict[str, Metric]:
            return {"own": Metric(1.0)}

    assert [outcome.error for outcome in train_on_ranks(FailsOnMain)] == ["", ""]
