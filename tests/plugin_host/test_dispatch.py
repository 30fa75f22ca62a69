"""Calling plugins: order, results, attribution, the failure policy, and the price."""

from __future__ import annotations

import gc
import re
import time
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt_simple import Config, Finding, Metric, Plugin, hookimpl
from gpt_simple.errors import CheckpointError, PluginError
from gpt_simple.hooks import Close, CollectMetrics, MetricsReady, RunError, StepEnd
from gpt_simple.hooks.specs import HOOKS
from gpt_simple.plugin_host.dispatch import DISPATCHED, Calls, Guard
from gpt_simple.plugin_host.host import PluginHost

Activate = Callable[..., PluginHost]

RUN = SimpleNamespace()
METRICS = MetricsReady(7, 700, {"train/loss": 1.0})
COLLECT = CollectMetrics(7, 1, 1, 1, 1, 1, 1.0, 1.0, 0.0)


def started(host: PluginHost, *, is_main: bool = True, world_size: int = 1) -> tuple[Calls, list[str]]:
    """Calls of a host, and the names of plugins that were switched off."""
    off: list[str] = []
    host.instantiate(Config())
    return host.calls(is_main, lambda plugin, hook, error: off.append(plugin.name), world_size=world_size), off


def plugin(name: str, hook: str, action: Callable[[], Any], **declared: Any) -> type[Plugin]:
    """A plugin with one hook that does ``action``."""
    arguments = ", ".join(HOOKS[hook].arguments)
    space: dict[str, Any] = {"action": action}
    exec(f"def {hook}(self, {arguments}):\n    return action()", space)
    return type(name, (Plugin,), {hook: hookimpl(space[hook]), **declared})


def failing(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def call(calls: Calls, hook: str, event: object) -> Any:
    return getattr(calls, hook)(RUN, event)


def test_a_hook_without_listeners_is_none(activate: Activate) -> None:
    calls, _ = started(activate())
    assert [getattr(calls, hook) for hook in DISPATCHED] == [None] * len(DISPATCHED)


def test_every_hook_reaches_its_plugin(activate: Activate) -> None:
    answers: dict[str, Any] = {"none": None, "metrics": {"a": Metric(1.0)}, "findings": [Finding("info", "c", "m")]}
    for hook in DISPATCHED:
        seen: list[str] = []
        answer = answers[HOOKS[hook].returns]

        def act(seen: list[str] = seen, answer: Any = answer) -> Any:
            seen.append("called")
            return answer

        calls, _ = started(activate(plugin("P", hook, act)))
        result = call(calls, hook, METRICS)
        assert seen == ["called"]
        assert result == ([] if HOOKS[hook].order == "reverse" else None if answer is None else [("p", answer)])


def test_an_implementation_gets_only_the_arguments_that_it_takes(activate: Activate) -> None:
    seen: list[Any] = []

    class Few(Plugin):
        @hookimpl
        def on_metrics(self, event):
            seen.append(event)

        @hookimpl
        def on_step_end(self):
            seen.append("nothing")

        @hookimpl
        def evaluate(self, event, run):
            seen.append((run, event))
            return {"a": Metric(1.0)}

        @hookimpl
        def collect_metrics(self, run):
            seen.append(run)
            return {"b": Metric(2.0)}

        @hookimpl
        def check_runtime(self):
            return []

        @hookimpl
        def on_close(self, run):
            raise ValueError("boom")

    calls, _ = started(activate(Few))
    assert calls.on_metrics(RUN, METRICS) is None
    assert calls.on_step_end(RUN, StepEnd(1, 1, 1, False)) is None
    assert calls.evaluate(RUN, METRICS) == [("few", {"a": Metric(1.0)})]
    assert calls.collect_metrics(RUN, COLLECT) == [("few", {"b": Metric(2.0)})]
    assert calls.check_runtime(RUN, None) == [("few", [])]
    assert [str(failure).rpartition(": ")[2] for failure in calls.on_close(RUN, Close(True))] == ["boom"]
    assert seen == [METRICS, "nothing", (RUN, METRICS), RUN]


def test_a_failure_has_its_step_without_the_event_argument(activate: Activate) -> None:
    class Bad(Plugin):
        on_error = "abort"

        @hookimpl
        def on_metrics(self):
            raise ValueError("boom")

        @hookimpl
        def collect_metrics(self, run):
            raise ValueError("boom")

    calls, _ = started(activate(Bad))
    for hook, event in (("on_metrics", METRICS), ("collect_metrics", COLLECT)):
        with pytest.raises(PluginError, match=rf"failed in {hook} at step 7: ValueError: boom"):
            call(calls, hook, event)


def test_order_is_before_and_after_and_then_by_name(activate: Activate) -> None:
    seen: list[str] = []

    def make(name: str, **declared: Any) -> type[Plugin]:
        return plugin(name, "on_metrics", lambda: seen.append(name.lower()), **declared)

    host = activate(
        make("D"), make("C", after=("d",)), make("B"), make("A", after=("b", "not_here")), make("E", before=("b",))
    )
    calls, _ = started(host)
    calls.on_metrics(RUN, METRICS)
    assert seen == [p.name for p in host.plugins] == ["d", "c", "e", "b", "a"]


def test_a_cycle_is_named(activate: Activate) -> None:
    one = plugin("One", "on_metrics", lambda: None, after=("two",))
    two = plugin("Two", "on_metrics", lambda: None, after=("one",))
    with pytest.raises(PluginError, match=r"contradict each other: one .*two"):
        activate(one, two)


@pytest.mark.parametrize("is_main", [True, False])
def test_ranks_decide_who_is_called_where(activate: Activate, is_main: bool) -> None:
    seen: list[str] = []
    host = activate(
        plugin("Onlymain", "on_step_end", lambda: seen.append("onlymain")),
        plugin("Everywhere", "on_step_end", lambda: seen.append("everywhere"), ranks="all"),
        plugin("Collects", "collect_metrics", dict),
        plugin("Logs", "on_metrics", lambda: None, ranks="all"),
    )
    calls, _ = started(host, is_main=is_main)
    calls.on_step_end(RUN, StepEnd(1, 1, 1, False))
    assert [name for name, _ in calls.collect_metrics(RUN, COLLECT)] == ["collects"]
    assert (calls.on_metrics is not None) == is_main
    assert seen == (["everywhere", "onlymain"] if is_main else ["everywhere"])


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), KeyError()])
def test_a_sink_that_fails_is_switched_off_and_the_others_go_on(activate: Activate, error: BaseException) -> None:
    seen: list[str] = []
    host = activate(
        plugin("Bad", "on_metrics", failing(error)),
        plugin("Good", "on_metrics", lambda: seen.append("good")),
    )
    calls, off = started(host)
    kept = calls.on_metrics
    for _ in range(3):
        kept(RUN, METRICS)
    assert off == ["bad"]
    assert seen == ["good"] * 3
    assert [p.failed for p in host.plugins] == [True, False]


def test_a_plugin_that_is_switched_off_is_closed_all_the_same(activate: Activate) -> None:
    closed: list[str] = []

    class Bad(Plugin):
        @hookimpl
        def on_metrics(self, run, event):
            raise ValueError

        @hookimpl
        def on_close(self, run, event):
            closed.append("bad")

    calls, _ = started(activate(Bad))
    calls.on_metrics(RUN, METRICS)
    assert calls.on_metrics is None
    calls.on_close(RUN, Close(True))
    calls.on_close(RUN, Close(True))
    assert closed == ["bad"]


def test_abort_names_plugin_file_hook_and_step(activate: Activate) -> None:
    cause = ValueError("boom")
    calls, off = started(activate(plugin("Bad", "on_metrics", failing(cause), on_error="abort")))
    with pytest.raises(PluginError, match=r"plugin bad .*failed in on_metrics at step 7: ValueError: boom") as caught:
        calls.on_metrics(RUN, METRICS)
    assert caught.value.__cause__ is cause
    assert off == []


def test_the_default_policy_follows_the_ranks(activate: Activate) -> None:
    calls, _ = started(activate(plugin("Bad", "on_step_end", failing(ValueError()), ranks="all")))
    with pytest.raises(PluginError):
        calls.on_step_end(RUN, StepEnd(1, 1, 1, False))


def test_strict_ends_the_run_for_any_failure(activate: Activate) -> None:
    calls, _ = started(activate(plugin("Bad", "on_metrics", failing(ValueError())), strict=True))
    with pytest.raises(PluginError):
        calls.on_metrics(RUN, METRICS)


def test_a_gpt_simple_error_keeps_its_class(activate: Activate) -> None:
    calls, _ = started(activate(plugin("Bad", "on_metrics", failing(CheckpointError("full disk")), on_error="abort")))
    with pytest.raises(CheckpointError, match="full disk"):
        calls.on_metrics(RUN, METRICS)


def test_a_fatal_failure_is_attributed_to_one_plugin_only(activate: Activate) -> None:
    holder: list[Calls] = []
    fatal = plugin("Fatal", "on_log", failing(ValueError("boom")), on_error="abort")
    talks = plugin("Talks", "on_metrics", lambda: holder[0].on_log(RUN, METRICS))
    calls, off = started(activate(fatal, talks))
    holder.append(calls)
    with pytest.raises(PluginError, match=r"^plugin fatal .*failed in on_log at step 7: ValueError: boom$"):
        calls.on_metrics(RUN, METRICS)
    assert off == []


def test_a_plugin_error_of_the_engine_gets_the_plugins_name(activate: Activate) -> None:
    error = PluginError("run.comm was used where it would hang")
    calls, _ = started(activate(plugin("Bad", "on_metrics", failing(error), on_error="abort")))
    with pytest.raises(PluginError, match=r"^plugin bad .*failed in on_metrics at step 7: run.comm was used"):
        calls.on_metrics(RUN, METRICS)


def test_control_c_is_not_a_failure_of_a_plugin(activate: Activate) -> None:
    calls, off = started(activate(plugin("Any", "on_metrics", failing(KeyboardInterrupt()))))
    with pytest.raises(KeyboardInterrupt):
        calls.on_metrics(RUN, METRICS)
    assert off == []


@pytest.mark.parametrize(
    ("hook", "garbage"),
    [
        ("on_metrics", 3),
        ("collect_metrics", None),
        ("collect_metrics", {"a": 1.0}),
        ("collect_metrics", {1: Metric(1.0)}),
        ("collect_metrics", [("a", Metric(1.0))]),
        ("evaluate", "text"),
        ("check_runtime", None),
        ("check_runtime", ["text"]),
        ("check_runtime", Finding("info", "c", "m")),
    ],
)
def test_garbage_is_a_failure_of_the_plugin(activate: Activate, hook: str, garbage: object) -> None:
    calls, _ = started(activate(plugin("Bad", hook, lambda: garbage, on_error="abort")))
    with pytest.raises(PluginError, match=rf"plugin bad .*failed in {hook}.*: it returned .*expected"):
        call(calls, hook, COLLECT)


def test_no_process_drops_out_of_a_hook_of_all_processes(activate: Activate) -> None:
    calls, _ = started(activate(plugin("Bad", "collect_metrics", failing(ValueError()))), world_size=2)
    with pytest.raises(PluginError):
        calls.collect_metrics(RUN, COLLECT)


def test_a_failed_plugin_stays_in_hooks_of_all_until_agreed(activate: Activate) -> None:
    class Bad(Plugin):
        @hookimpl
        def on_metrics(self, run, event):
            raise ValueError

        @hookimpl
        def on_step_end(self, run, event):
            pass

        @hookimpl
        def collect_metrics(self, run, event):
            return {"bad": Metric(1.0)}

    calls, off = started(activate(Bad), world_size=2)
    calls.on_metrics(RUN, METRICS)
    assert off == ["bad"]
    assert calls.on_metrics is calls.on_step_end is None
    assert [name for name, _ in calls.collect_metrics(RUN, COLLECT)] == ["bad"]
    calls.disable("bad")
    assert calls.collect_metrics is None


def test_last_hooks_run_in_reverse_and_collect_failures(activate: Activate) -> None:
    for hook, event in (("on_run_error", RunError(ValueError("x"), 3)), ("on_close", Close(False))):
        seen: list[str] = []
        host = activate(
            plugin("A", hook, lambda seen=seen: seen.append("a"), on_error="abort"),
            plugin("B", hook, failing(ValueError("boom")), on_error="abort"),
            plugin("C", hook, lambda seen=seen: seen.append("c")),
        )
        calls, _ = started(host)
        failures = getattr(calls, hook)(RUN, event)
        assert seen == ["c", "a"]
        assert [type(failure) for failure in failures] == [PluginError]
        assert re.search(rf"plugin b .*failed in {hook}", str(failures[0]))


def test_a_failure_in_a_nested_hook_skips_no_other_plugin(activate: Activate) -> None:
    seen: list[str] = []
    holder: list[Calls] = []

    class A(Plugin):
        @hookimpl
        def on_step_end(self, run, event):
            holder[0].on_metrics(RUN, METRICS)

        @hookimpl
        def on_metrics(self, run, event):
            raise ValueError

    later = plugin("B", "on_step_end", lambda: seen.append("b"))
    calls, off = started(activate(A, later))
    holder.append(calls)
    for _ in range(2):
        calls.on_step_end(RUN, StepEnd(1, 1, 1, False))
    assert seen == ["b", "b"]
    assert off == ["a"]


@pytest.mark.parametrize("hook", ["on_metrics", "evaluate", "on_run_error", "on_close"])
def test_time_is_charged_to_who_spends_it(activate: Activate, hook: str) -> None:
    answer: Any = {"none": None, "metrics": {}}[HOOKS[hook].returns]

    def slow() -> Any:
        time.sleep(0.02)
        return answer

    host = activate(plugin("Slow", hook, slow), plugin("Fast", hook, lambda: answer))
    calls, _ = started(host)
    call(calls, hook, METRICS)
    seconds = {p.name: p.seconds for p in host.plugins}
    assert 0.02 <= seconds["slow"] < 10
    assert 0 <= seconds["fast"] < 0.01


def test_a_wrapper_goes_around_every_implementation(activate: Activate) -> None:
    def wrap(implementation: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            implementation(*arguments)
            raise RuntimeError("left something behind")

        return guarded

    host = activate(plugin("P", "on_metrics", lambda: None))
    host.wrap = wrap
    calls, off = started(host)
    calls.on_metrics(RUN, METRICS)
    assert off == ["p"]


@pytest.mark.parametrize("hook", ["on_step_end", "collect_metrics", "on_close"])
def test_changed_state_is_restored_before_the_next_listener(activate: Activate, hook: str) -> None:
    state, seen = ["clean"], []

    def restore(run: object, before: str) -> str:
        left, state[0] = state[0], before
        return left

    def leaves() -> object:
        seen.append(state[0])
        state[0] = "dirt"
        return {} if hook == "collect_metrics" else None

    def raises() -> None:
        leaves()
        raise RuntimeError("bang")

    listeners = [plugin(name, hook, body) for name, body in (("A", leaves), ("B", raises), ("C", leaves))]
    host = activate(*listeners)
    host.guard = Guard(lambda run: state[0], restore)
    calls, off = started(host)
    call(calls, hook, METRICS)
    assert (seen, state) == (["clean"] * 3, ["clean"])
    assert hook == "on_close" or off == ["a", "b", "c"]


@pytest.mark.parametrize(
    "metric",
    [
        Metric("abc"),
        Metric(None),
        Metric(1.0, weight="abc"),
        Metric(1.0, reduce="median"),
        Metric(torch.ones(3)),
        Metric(torch.ones((), device="meta")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("hook", ["collect_metrics", "evaluate"])
def test_a_metric_that_is_no_number_is_its_plugins_failure(activate: Activate, metric: Metric, hook: str) -> None:
    bad = plugin("Bad", hook, lambda: {"x": metric})
    calls, off = started(activate(bad, plugin("Good", hook, lambda: {"y": Metric(torch.ones(()), 2)})))
    ((name, _),) = call(calls, hook, COLLECT)
    assert (name, off) == ("good", ["bad"])


@pytest.mark.parametrize("listeners", [1, 10])
def test_a_call_costs_less_than_one_of_pluggy(activate: Activate, listeners: int) -> None:
    host = activate(*(plugin(f"P{index}", "on_metrics", lambda: None) for index in range(listeners)))
    calls, _ = started(host)
    relay = host._manager.hook.on_metrics
    gc.disable()
    try:
        ours = min(timeit.repeat(lambda: calls.on_metrics(RUN, METRICS), number=2000, repeat=7))
        pluggys = min(timeit.repeat(lambda: relay(run=RUN, event=METRICS), number=2000, repeat=7))
    finally:
        gc.enable()
    assert ours < pluggys
