"""Requests become one decision of all ranks, and a request to leave is final."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.control import Control, Decision, Requests, throttled
from gpt_simple.errors import PluginError


def alone(requests: Requests, *conditions: Any) -> Control:
    """On the only rank, which has no group for a collective."""
    return Control(ProcessGroup(0, 1, torch.device("cpu")), requests, conditions)


def test_without_a_request_nothing_is_decided() -> None:
    assert alone(Requests()).decide() == Decision()


def test_the_first_reason_counts_and_is_used_once() -> None:
    control = alone(requests := Requests())
    requests.save("first")
    requests.save("second")
    assert control.decide().save == "first"
    assert control.decide().save == ""


@pytest.mark.parametrize("kind", ["stop", "halt", "finish"])
def test_a_request_that_ends_the_run_stays(kind: str) -> None:
    control = alone(requests := Requests())
    getattr(requests, kind)("why")
    decisions = [control.decide(), control.decide()]
    assert [getattr(decision, kind) for decision in decisions] == ["why", "why"]
    assert all(decision.should_stop for decision in decisions)
    assert [decision.interrupts for decision in decisions] == [kind != "finish"] * 2


def test_a_stop_condition_that_was_met_stays_met() -> None:
    reasons = iter(["", "the time budget is used up", ""])
    control = alone(Requests(), lambda: next(reasons))
    stops = [control.decide().stop for _ in range(4)]
    assert stops == ["", *["the time budget is used up"] * 3]


def test_a_throttled_condition_is_evaluated_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: moments[-1])
    condition = throttled(lambda: "stop")
    assert condition() == ""
    moments.append(101.5)
    assert [condition(), condition()] == ["stop", ""]


@pytest.mark.parametrize("flag", ["yes", 1, True, torch.ones(()), torch.tensor([True]), torch.ones((), device="meta")])
def test_a_skip_flag_of_another_type_is_refused(flag: Any) -> None:
    requests = Requests()
    with pytest.raises(PluginError, match=r"skip_step was given a .*; expected a 0-d bool tensor"):
        requests.allow_skips("a", requests.skip_step)(flag)
    assert requests.take_skips() == {}


def test_skip_flags_are_combined_by_plugin_and_taken_once() -> None:
    requests = Requests()
    for plugin, flag in (("a", False), ("b", False), ("a", True), ("b", False)):
        requests.allow_skips(plugin, requests.skip_step)(torch.tensor(flag))
    assert {plugin: bool(flag) for plugin, flag in requests.take_skips().items()} == {"a": True, "b": False}
    assert requests.take_skips() == {}


def test_a_skip_is_requested_by_a_plugin_only() -> None:
    requests = Requests()
    requests.allow_skips("a", lambda: None)()
    with pytest.raises(PluginError, match=r"skip_step was used outside of on_gradients"):
        requests.skip_step(torch.tensor(True))


@pytest.mark.parametrize("request_", ["save", "evaluate", "stop", "halt", "finish", "rebuild_optimizer"])
@pytest.mark.parametrize("reason", [None, "", 3, True])
def test_a_request_without_a_reason_is_refused(request_: str, reason: Any) -> None:
    requests = Requests()
    with pytest.raises(PluginError, match="as a reason; expected text that says why"):
        getattr(requests, request_)(reason)
    assert alone(requests).decide() == Decision()


class Others:
    """Two ranks, of which the other one wants to stop and has seen a plugin fail."""

    size = 2

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def all_reduce_max(self, flags: Any) -> list[int]:
        self.seen.append([int(flag) for flag in flags])
        return [1, 0, 0, 1, 0, 0, 0, 1]

    def gather(self, value: Any) -> list[Any]:
        return [value, ["", "", "", "SIGTERM", "", ""]]


def test_another_rank_can_decide_and_says_why() -> None:
    others: Any = Others()
    requests = Requests()
    control = Control(others, requests, (), ("console", "wandb"))
    requests.save("mine")
    requests.disable("console")
    decision = control.decide()
    assert others.seen == [[1, 0, 0, 0, 0, 0, 1, 0]]
    assert (decision.save, decision.stop, decision.should_stop) == ("mine", "SIGTERM", True)
    assert decision.disabled_plugins == ("wandb",)
