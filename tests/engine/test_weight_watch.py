"""A plugin that fails while it has changed the weights by hand ends the run; one that put them back does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt_simple import Metric, Plugin, PluginError, hookimpl
from gpt_simple.engine.weights import WeightWatch
from gpt_simple.testing import check_contract, train

Weights = dict[str, Tensor]


def copy_data(model: nn.Module, weights: Weights) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])


def copy_(model: nn.Module, weights: Weights) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def set_data(model: nn.Module, weights: Weights) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].clone()


def load(model: nn.Module, weights: Weights) -> None:
    model.load_state_dict(weights, strict=False)


def from_vector(model: nn.Module, weights: Weights) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(weights.values()), model.parameters())


def foreach(model: nn.Module, weights: Weights) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), list(weights.values()))


def first_only(model: nn.Module, weights: Weights) -> None:
    next(iter(model.parameters())).data.add_(1.0)


Change = Callable[[nn.Module, Weights], None]
CHANGES: list[Change] = [copy_data, copy_, set_data, load, from_vector, foreach, first_only]


class Swaps(Plugin[Any]):
    """Changes the weights by hand in the hook ``at`` of step 2, and fails in the hook ``fails``."""

    def __init__(self, change: Change, at: str, fails: str, *, back: bool = False, keeps: bool = False) -> None:
        super().__init__(None)
        self.change, self.at, self.fails, self.back, self.keeps = change, at, fails, back, keeps
        self.model: nn.Module | None = None

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        if self.keeps:
            self.model = run.model

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self._act("on_step_end", run)

    @hookimpl
    def on_metrics(self, run: Any, event: Any) -> None:
        self._act("on_metrics", run)

    @hookimpl
    def on_checkpoint_saving(self, run: Any, event: Any) -> None:
        self._act("on_checkpoint_saving", run)

    @hookimpl
    def on_checkpoint_saved(self, run: Any, event: Any) -> None:
        self._act("on_checkpoint_saved", run)

    @hookimpl
    def evaluate(self, run: Any, event: Any) -> dict[str, Metric]:
        self._act("evaluate", run)
        return {}

    @hookimpl
    def on_eval_end(self, run: Any, event: Any) -> None:
        self._act("on_eval_end", run)

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        self._act("on_step_start", run)

    def _act(self, hook: str, run: Any) -> None:
        if run.step != 2:
            return
        if hook == self.at:
            model = self.model or run.model
            own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            self.change(model, {name: tensor + 1 for name, tensor in own.items()})
            if self.back:
                copy_data(model, own)
        if hook == self.fails:
            raise ValueError("in the middle")


HOOKS = ["on_step_end", "on_metrics", "on_checkpoint_saving", "on_checkpoint_saved", "evaluate", "on_eval_end"]


def ends(plugin: Plugin[Any]) -> str:
    with pytest.raises(PluginError) as caught:
        train(plugin)
    assert caught.value.exit_code == 5
    message = str(caught.value)
    assert "in the middle; the model's weights are changed and nobody can put them back" in message
    assert "change weights with run.weights" in message
    return message


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_any_means_ends_the_run_with_the_failure(change: Change) -> None:
    ends(Swaps(change, "on_eval_end", "on_eval_end"))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("hook", [*HOOKS, "on_step_start"])
def test_a_change_in_any_hook_ends_the_run(hook: str, keeps: bool) -> None:
    assert f"failed in {hook} at step" in ends(Swaps(copy_data, hook, hook, keeps=keeps))


@pytest.mark.parametrize("fails", ["evaluate", "on_eval_end", "on_step_start"])
def test_a_change_in_an_earlier_hook_counts_too(fails: str) -> None:
    ends(Swaps(copy_data, "on_step_end", fails))


@pytest.mark.parametrize("hook", [*HOOKS, "on_step_start"])
def test_weights_that_were_put_back_are_no_reason_to_end(hook: str) -> None:
    trained = train(Swaps(copy_data, hook, hook, back=True))
    assert trained.failed == ["swaps"]
    assert trained.result.status == "completed"


class SetsValues(Plugin[Any]):
    """Sets values when the run starts, which counts as the model's own, and fails later."""

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        first_only(event.model, {})

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        first_only(run.model, {})

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        raise ValueError


class Exchanges(Plugin[Any]):
    """Fails inside ``run.weights``, which puts all back."""

    @hookimpl
    def on_eval_end(self, run: Any, event: Any) -> None:
        with run.weights({name: torch.ones_like(p) for name, p in run.model.named_parameters()}):
            raise ValueError


class LogsInside(Plugin[Any]):
    """A logger that fails while another plugin has other weights in the model."""

    @hookimpl
    def on_eval_end(self, run: Any, event: Any) -> None:
        with run.weights({name: torch.ones_like(p) for name, p in run.model.named_parameters()}):
            run.log.info("inside", name="inside")


class FailsWhenLogged(Plugin[Any]):
    @hookimpl
    def on_metrics(self, run: Any, event: Any) -> None:
        self.model = run.model

    @hookimpl
    def on_log(self, run: Any, event: Any) -> None:
        if event.name == "inside":
            raise ValueError


@pytest.mark.parametrize(
    ("plugins", "failed"),
    [
        ([SetsValues], ["setsvalues"]),
        ([Exchanges], ["exchanges"]),
        ([LogsInside, FailsWhenLogged], ["failswhenlogged"]),
    ],
    ids=["set at the start", "exchanged", "inside an exchange of another"],
)
def test_what_is_no_change_by_hand_only_switches_off(plugins: list[type[Plugin[Any]]], failed: list[str]) -> None:
    trained = train(*plugins)
    assert trained.failed == failed
    assert trained.result.status == "completed"


class SwapsAndIsLeft(Plugin[Any]):
    """Its evaluation is abandoned because of a stop, with or without weights that it has changed by hand."""

    ranks = "all"

    def __init__(self, *, back: bool) -> None:
        super().__init__(None)
        self.back = back

    @hookimpl
    def evaluate(self, run: Any, event: Any) -> dict[str, Metric]:
        own = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        copy_data(run.model, {name: tensor + 1 for name, tensor in own.items()})
        run.control.stop("for a test")
        try:
            for batch in run.val_batches(1):
                run.loss(batch)
        finally:
            if self.back:
                copy_data(run.model, own)
        return {}


def test_an_abandoned_evaluation_does_not_leave_other_weights() -> None:
    with pytest.raises(
        PluginError, match=r"evaluation was abandoned, .* while a plugin had changed the model's weights"
    ):
        train(SwapsAndIsLeft(back=False))
    assert train(SwapsAndIsLeft(back=True), max_steps=5).result.status == "stopped"


def test_a_plugin_without_the_model_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(Plugin[Any]):
        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            if run.step == 2:
                raise ValueError

    marked: list[str] = []
    monkeypatch.setattr(WeightWatch, "mark", lambda watch: marked.append(watch.caller.name))
    train(Idle)
    assert set(marked) == {"recorder"}  # it implements on_model_built


def test_the_watch_does_not_wait_for_the_device() -> None:
    class Norms(Plugin[Any]):
        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            self.norm = next(iter(run.model.parameters())).detach().norm()

    check_contract(Norms)


def test_parameters_of_several_types_are_compared() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Parameter(torch.full((3, 2), torch.nan))
            self.narrow = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
            self.empty = nn.Parameter(torch.zeros(0))

    model, watch = Mixed(), WeightWatch()
    run: Any = type("Run", (), {"raw": model, "step": 1})
    watch.start(run)
    watch.mark()
    assert not watch.changed()  # also where a weight is NaN
    model.narrow.data.add_(1)
    assert watch.changed()
    run.step = 2
    assert not watch.changed()  # an update came between
