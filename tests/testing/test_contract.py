"""The contract suite finds what it is for, and every built-in plugin passes it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from gpt_simple import Finding, Metric, Plugin, Run, hookimpl
from gpt_simple.errors import ConfigError
from gpt_simple.hooks import NoConfig, Registry
from gpt_simple.plugin_host.discovery import ENABLED_BY, PluginRecord, installed
from gpt_simple.plugin_host.loading import load_record
from gpt_simple.testing import check_contract, train

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


def test_hooks_that_take_fewer_arguments_keep_the_contract() -> None:
    check_contract(Few)
    assert train(Few).failed == []


def test_the_contract_finds_a_read_tensor_without_the_event() -> None:
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


def test_text_on_stderr_is_no_failure() -> None:
    class Talks(Plugin[NoConfig]):
        @hookimpl
        def on_run_error(self, run: Run, event: Any) -> None:
            print("plugin talks about the error", file=sys.stderr)

    check_contract(Talks)


def test_the_contract_finds_what_fails_only_after_an_error() -> None:
    class Bad(Plugin[NoConfig]):
        @hookimpl
        def on_run_error(self, run: Run, event: Any) -> None:
            raise ValueError("too late")

    with pytest.raises(AssertionError, match=r"plugin bad .*failed in on_run_error at step 1: ValueError: too late"):
        check_contract(Bad)


def unfaithful(model: torch.nn.Module, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """Its rate grows with the steps of this process, which no checkpoint has."""

    class Growing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            steps.append(1)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=1e-2 * len(steps))

    steps: list[int] = []
    return Growing(model.parameters(), lr=1.0)


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no part today")


def refused(*_: Any, **__: Any) -> Any:
    raise ConfigError("this part needs data.files", key="data.files")


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("optimizer", unfaithful, 'with optimizer.name = "mine" a run that was stopped and resumed ends with other'),
        ("schedule", broken, 'with optimizer.schedule = "mine" a run fails: schedule .*no part today'),
        ("model", broken, 'with model.name = "mine" a run fails: model .*no part today'),
    ],
)
def test_the_contract_trains_every_component(kind: Any, target: Any, message: str) -> None:
    class Parts(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add(kind, "mine", target)

    with pytest.raises(AssertionError, match=message):
        check_contract(Parts)


def test_a_component_whose_configuration_is_refused_is_named() -> None:
    class Parts(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("source", "mine", refused)

    with pytest.warns(
        UserWarning, match="source 'mine' was not tried: .*this part needs data.files; give what it needs"
    ):
        check_contract(Parts)


def test_good_components_keep_the_contract() -> None:
    class Parts(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("optimizer", "plain", lambda model, *_: torch.optim.SGD(model.parameters(), lr=1.0))
            registry.add("schedule", "tenth", lambda *_: lambda step: 0.1)

    check_contract(Parts)


def test_the_contract_finds_a_set_of_weights_that_begins_anew() -> None:
    class Forgets(Plugin[NoConfig]):
        """Takes the weights of the start of a launch as its set, although it was restored."""

        ranks = "all"

        @hookimpl
        def on_model_built(self, run: Run, event: Any) -> None:
            self.kept = {name: parameter.detach().clone() for name, parameter in event.model.named_parameters()}

        @hookimpl
        def on_run_start(self, run: Run, event: Any) -> None:
            for name, parameter in run.model.named_parameters():
                self.kept[name].copy_(parameter.detach())

        def weight_sets(self) -> Any:
            return {"first": self.kept}

    with pytest.raises(AssertionError, match="stopped and resumed ends with other weights 'first'"):
        check_contract(Forgets)
