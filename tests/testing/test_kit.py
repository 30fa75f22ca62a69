"""The test kit finds what it is for, and every built-in plugin passes it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import Finding, Metric, Plugin, Run, hookimpl, read_metrics
from gpt_simple.hooks import HOOKS, NoConfig
from gpt_simple.plugin_host.discovery import ENABLED_BY, PluginRecord, installed
from gpt_simple.plugin_host.loading import load_record
from gpt_simple.testing import Hang, HostSync, check_contract, no_host_sync, train, train_on_ranks

# One that is switched on by a field of the configuration needs more than its name: its own tests have it.
BUILT_IN = [record for record in installed() if record.origin == "builtin" and record.name not in ENABLED_BY]


@pytest.mark.parametrize("record", BUILT_IN, ids=lambda record: record.name)
def test_built_in_plugins_keep_the_contract(record: PluginRecord) -> None:
    check_contract(load_record(record), enable=(record.name,), observes=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["console", "metrics", "throughput", "evaluate", "checkpoint", "sample"])
def test_a_built_in_that_observes_leaves_the_weights_as_they_are(name: str) -> None:
    with_it = train(enable=("console", "sample")).weights
    without = train(overrides={"plugins.disable": [name]}).weights
    assert all(torch.equal(value, without[key]) for key, value in with_it.items())


def test_the_contract_lists_everything_that_is_broken() -> None:
    class Bad(Plugin[NoConfig]):
        @hookimpl
        def on_run_start(self, run: Run, event: Any) -> None:
            self.file = open(run.output_dir / "left.txt", "w")  # noqa: SIM115

        @hookimpl
        def on_step_end(self, run: Run, event: Any) -> None:
            next(run.model.parameters()).sum().item()

        @hookimpl
        def on_gradients(self, run: Run, event: Any) -> None:
            for parameter in run.model.parameters():
                assert parameter.grad is not None
                if self.first:
                    parameter.grad.zero_()
            self.first = False

        @hookimpl
        def on_eval_end(self, run: Run, event: Any) -> None:
            raise ValueError("boom")

        @hookimpl
        def on_close(self, run: Run, event: Any) -> None:
            raise ValueError("too late")

        first = True

    with pytest.raises(AssertionError) as caught:
        check_contract(Bad)
    text = str(caught.value)
    for part in (
        "failed in on_eval_end at step 2: ValueError: boom",
        "on_step_end makes the device wait",
        "left.txt is still open",
        "stopped and resumed ends with other weights",
        "failed in on_close: ValueError: too late",
        "differ from those of a run without it",
    ):
        assert part in text


class Few(Plugin[NoConfig]):
    """Takes of each hook only what it needs."""

    def __init__(self, config: NoConfig) -> None:
        super().__init__(config)
        self.steps = 0

    @hookimpl
    def check_config(self) -> list[Finding]:
        return []

    @hookimpl
    def on_step_end(self) -> None:
        self.steps += 1

    @hookimpl
    def on_metrics(self, event: Any) -> None:
        assert event.metrics["train/loss"] > 0

    @hookimpl
    def collect_metrics(self, run: Run) -> dict[str, Metric]:
        return {"few/steps": Metric(self.steps if run.is_main else 0, reduce="sum")}

    @hookimpl
    def evaluate(self, event: Any) -> dict[str, Metric]:
        return {"few/at": Metric(event.step)}


def test_a_plugin_whose_hooks_take_fewer_arguments_keeps_the_contract() -> None:
    check_contract(Few)
    assert train(Few).failed == []


def test_the_contract_finds_a_read_tensor_where_the_event_is_not_taken() -> None:
    class Bad(Few):
        @hookimpl
        def on_step_end(self) -> None:
            torch.ones(()).item()

    with pytest.raises(AssertionError, match="on_step_end makes the device wait"):
        check_contract(Bad)


@pytest.mark.parametrize(
    ("method", "answer"),
    [("describe", ["x"]), ("describe", {"x": object()}), ("state_dict", [1]), ("state_dict", None)],
)
def test_the_contract_tries_plain_methods_too(method: str, answer: Any) -> None:
    bad = type("Bad", (Plugin,), {method: lambda self: answer})
    with pytest.raises(AssertionError, match=rf"failed in {method}: .*(expected a mapping|not JSON serializable)"):
        check_contract(bad)


def test_the_contract_begins_with_the_lint() -> None:
    class Bad(Plugin[NoConfig]):
        @hookimpl
        def on_metrcs(self, run: Run, event: Any) -> None:
            pass

    with pytest.raises(AssertionError, match="did you mean on_metrics"):
        check_contract(Bad)


@pytest.mark.parametrize(
    "read", [lambda t: t.item(), float, int, bool, lambda t: t.tolist(), lambda t: t.numpy(), lambda t: 1 if t else 0]
)
def test_reading_a_tensor_is_found_however_it_is_done(read: Any) -> None:
    tensor = torch.ones(())
    with pytest.raises(HostSync), no_host_sync():
        read(tensor)
    with no_host_sync():
        (tensor + 1).detach()
    read(tensor)


def test_a_tiny_run_has_one_thread_and_the_test_as_many_as_before() -> None:
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


def test_processes_can_be_forked_after_the_test_itself_has_worked_with_several_threads() -> None:
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
            told = {"x/b": Metric(100.0), "x/a": Metric(2.0 * run.rank)}
            return told if run.rank else dict(reversed(told.items()))

    outcomes = train_on_ranks(Both, output_dir=tmp_path, overrides={"training.logging_steps": 1})
    assert [outcome.error for outcome in outcomes] == ["", ""]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "x/a" in row]
    assert {(row["x/a"], row["x/b"]) for row in rows} == {(1.0, 100.0)}


def test_metrics_that_not_every_process_tells_are_reduced_over_those_that_do(tmp_path: Path) -> None:
    class Uneven(Plugin[NoConfig]):
        """More than fit at once on the second process, and a name that the first one leaves to its neighbour."""

        ranks = "all"

        def told(self, run: Run) -> dict[str, Metric]:
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
            return self.told(run)

        @hookimpl
        def evaluate(self, run: Run, event: Any) -> dict[str, Metric]:
            return self.told(run)

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


def test_nobody_takes_a_metric_from_the_engine_or_from_a_built_in(tmp_path: Path) -> None:
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


def test_the_engines_own_collectives_refuse_where_they_would_hang() -> None:
    class Waits(Plugin[NoConfig]):
        @hookimpl
        def on_metrics(self, run: Run, event: Any) -> None:
            run.comm.barrier()

    assert train(Waits).failed == ["waits"]


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
