"""The optimizer as plugins meet it: the hook, the rates of its groups, and what a checkpoint keeps of both."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from gpt_simple import PluginError, TrainResult, hookimpl
from gpt_simple.run_dir.lineage import read_metrics
from gpt_simple.testing import train_on_ranks
from tests.checkpoint.optimizers import SAVED, InOwnEntries
from tests.children import Everywhere, stops_at
from tests.tiny import TinyRun, state_bytes


class ScalesVectors(Everywhere):
    """The rate of gains and biases is multiplied by ``scale``, and by ``later`` after step ``at``."""

    def __init__(self, scale: object, at: int = 0, later: float = 1.0) -> None:
        super().__init__()
        self.scale, self.at, self.later = scale, at, later
        self.rates: list[list[float]] = []
        self.steps: list[int] = []

    @hookimpl
    def on_optimizer_built(self, run: Any, event: Any) -> None:
        assert run.optimizer is event.optimizer
        event.optimizer.param_groups[1]["lr_scale"] = self.scale
        self.steps.append(event.step)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self.rates.append([group["lr"] for group in run.optimizer.param_groups])
        if event.step == self.at:
            run.optimizer.param_groups[1]["lr_scale"] = self.later


def document(result: TrainResult) -> Any:
    assert result.checkpoint_path is not None
    return json.loads((result.checkpoint_path / "state.json").read_text())


def test_a_group_has_the_rate_of_the_schedule_times_its_scale(tiny: TinyRun) -> None:
    plugin = ScalesVectors(0.25)
    result = tiny(plugins=[plugin], training__logging_steps=1)
    logged = [row["train/lr"] for row in read_metrics(result.output_dir / "metrics.jsonl", "train")]
    assert plugin.rates == [[rate, rate * 0.25] for rate in logged]
    assert "groups" not in document(result)["optimizer"]


def test_a_scale_of_one_changes_no_bit(tiny: TinyRun) -> None:
    assert state_bytes(tiny("plain")) == state_bytes(tiny("scaled", plugins=[ScalesVectors(1.0)]))


def test_a_scale_that_is_changed_during_the_run_is_resumed(tiny: TinyRun) -> None:
    whole = tiny("whole", plugins=[ScalesVectors(0.25, at=2, later=0.5)])
    tiny("parts", plugins=[ScalesVectors(0.25, at=2, later=0.5), stops_at(4)])
    rest = ScalesVectors(0.25, at=2, later=0.5)
    assert state_bytes(tiny("parts", plugins=[rest])) == state_bytes(whole)
    assert rest.steps == [4]


def test_a_scale_set_in_the_hook_may_be_another_at_a_resume(tiny: TinyRun) -> None:
    tiny(plugins=[ScalesVectors(0.25), stops_at(3)])
    rest = ScalesVectors(0.5)
    tiny(plugins=[rest])
    assert all(vectors == rate * 0.5 for rate, vectors in rest.rates)


@pytest.mark.parametrize("scale", ["half", -1.0, float("nan"), None])
def test_a_scale_that_is_no_factor_is_refused(tiny: TinyRun, scale: object) -> None:
    with pytest.raises(PluginError, match="group 1 of the optimizer has the lr_scale"):
        tiny(plugins=[ScalesVectors(scale)])


def test_there_is_no_optimizer_before_it_is_built(tiny: TinyRun) -> None:
    class TooEarly(Everywhere):
        @hookimpl
        def on_model_built(self, run: Any, event: Any) -> None:
            _ = run.optimizer

    with pytest.raises(PluginError, match=r"run\.optimizer does not exist yet: it is there from on_optimizer_built on"):
        tiny(plugins=[TooEarly()])


class Unfreezes(Everywhere):
    """The embedding is frozen at the start, and trained from after step ``at`` on. Only ``asks`` requests it."""

    def __init__(self, at: int = 3, asks: str = "all") -> None:
        super().__init__()
        self.at, self.asks = at, asks

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        event.model.token_embedding.weight.requires_grad_(False)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == self.at:
            run.model.token_embedding.weight.requires_grad_(True)
            if self.asks == "all" or run.is_main is (self.asks == "main"):
                run.control.rebuild_optimizer("the embedding is trained")


class Grows(Everywhere):
    """Another block from after step 3 on, a copy of the last one; the first one is replaced, and keeps its state."""

    def _grow(self, model: Any) -> None:
        model.blocks.append(copy.deepcopy(model.blocks[-1]))
        model.blocks[0] = copy.deepcopy(model.blocks[0])

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        if event.step >= 3:
            self._grow(event.model)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 3:
            self._grow(run.model)
            run.control.rebuild_optimizer("another block")


class Shrinks(Everywhere):
    """The last block goes after step 3, and the norm is frozen."""

    def _shrink(self, model: Any) -> None:
        del model.blocks[-1]
        model.norm.requires_grad_(False)

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        if event.step >= 3:
            self._shrink(event.model)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 3:
            self._shrink(run.model)
            run.control.rebuild_optimizer("smaller")


class Fails(Everywhere):
    """As a kill: the run ends in step ``step`` without a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    @hookimpl
    def on_step_start(self, run: Any, event: Any) -> None:
        if event.step == self.step:
            raise RuntimeError("killed")


CHANGES: dict[str, Callable[[], Everywhere]] = {"unfreezes": Unfreezes, "grows": Grows, "shrinks": Shrinks}
COMPILED = {"training__compile": True, "training__compile_backend": "aot_eager"}
OPTIONS: dict[str, dict[str, Any]] = {
    "eager": {"model__dropout": 0.1},
    "checkpointed": {"training__gradient_checkpointing": True},
    "compiled": {**COMPILED, "training__compile_scope": "model"},
    "blocks": {**COMPILED, "training__compile_scope": "blocks"},
}


@pytest.mark.parametrize(
    ("change", "options"),
    [*((change, "eager") for change in CHANGES), *(("grows", options) for options in OPTIONS if options != "eager")],
)
def test_a_run_with_another_model_is_resumed_in_bits(tiny: TinyRun, change: str, options: str) -> None:
    """Killed before, at and after the step of the change."""
    make = CHANGES[change]
    values = {**OPTIONS[options], "training__save_steps": 1, "training__keep_last_k": None}
    whole = tiny("whole", plugins=[make()], **values)
    for step in (3, 4, 6) if options == "eager" else (4,):
        with pytest.raises(PluginError, match="killed"):
            tiny("parts", plugins=[make(), Fails(step)], **values)
    assert state_bytes(tiny("parts", plugins=[make()], **values)) == state_bytes(whole)
    record = document(whole)
    assert set(record["trained"]) == record["optimizer"]["parameters"].keys()


def test_what_is_unfrozen_is_trained_the_rest_keeps_its_state(tiny: TinyRun) -> None:
    class Looks(Everywhere):
        @hookimpl
        def on_optimizer_built(self, run: Any, event: Any) -> None:
            self.before, self.old = getattr(self, "optimizer", None), getattr(self, "old", {})
            self.optimizer = run.optimizer
            run.optimizer.param_groups[0]["lr_scale"] = 0.5

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            state = {n: run.optimizer.state.get(p, {}).get("step") for n, p in run.model.named_parameters()}
            self.counts = {name: None if step is None else int(step) for name, step in state.items()}
            self.scale = run.optimizer.param_groups[0]["lr_scale"]
            if event.step == 3:
                run.optimizer.param_groups[0]["lr_scale"] = 0.25

    looks = Looks()
    result = tiny(plugins=[Unfreezes(), looks], training__save_steps=1, training__keep_last_k=None)
    assert looks.before is not None
    assert looks.before is not looks.optimizer
    assert looks.counts.pop("token_embedding.weight") == 3
    assert set(looks.counts.values()) == {6}
    assert looks.scale == 0.25
    assert result.checkpoint_path is not None
    states = [json.loads(path.read_text()) for path in sorted(result.output_dir.glob("checkpoints/*/state.json"))]
    assert ["trained" in state for state in states] == [False, False, True, True, True, True]
    (message,) = [row["message"] for row in read_metrics(result.output_dir / "metrics.jsonl") if "trained" in row]
    assert message.startswith("the optimizer is rebuilt: the embedding is trained; it trains ")
    assert message.endswith("parameters, 1 of them anew")


class Rebuilds(Everywhere):
    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        run.control.rebuild_optimizer("at the start")

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 3:
            run.control.rebuild_optimizer("for nothing")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, *SAVED])
def test_a_rebuild_of_the_same_changes_no_bit(tiny: TinyRun, kind: Any) -> None:
    class Brings(Everywhere):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Any) -> None:
            registry.add("optimizer", "own", lambda model, config, device: kind(model.parameters(), lr=0.01))

    plain, rebuilt = (
        tiny(out, plugins=[Brings(), *plugins], optimizer__name="own", training__max_steps=5)
        for out, plugins in (("plain", []), ("rebuilt", [Rebuilds()]))
    )
    assert state_bytes(rebuilt) == state_bytes(plain)
    assert document(rebuilt)["optimizer"] == document(plain)["optimizer"]


def test_state_that_belongs_to_all_parameters_is_not_mixed_up(tiny: TinyRun) -> None:
    class Brings(Everywhere):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Any) -> None:
            def build(model: Any, config: Any, device: Any) -> Any:
                return InOwnEntries([p for p in model.parameters() if p.requires_grad], lr=0.01)

            registry.add("optimizer", "own", build)

    with pytest.raises(PluginError, match=r"optimizer 'own' of the plugin brings .* keeps state in entries of its own"):
        tiny(plugins=[Brings(), Unfreezes()], optimizer__name="own")


def test_a_change_in_an_evaluation_is_used_after_the_next_step(tiny: TinyRun) -> None:
    class Later(Unfreezes):
        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            pass

        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            if event.step == 2:
                run.model.token_embedding.weight.requires_grad_(True)
                run.control.rebuild_optimizer("the embedding is trained")

    result = tiny(plugins=[Later()], training__eval_steps=2)
    assert "token_embedding.weight" in document(result)["trained"]


def test_facts_count_the_parameters_of_the_new_model(tiny: TinyRun) -> None:
    seen: list[int] = []

    class Counts(Everywhere):
        @hookimpl
        def on_step_start(self, run: Any, event: Any) -> None:
            seen.append(run.facts()["parameters"] - sum(p.numel() for p in run.model.parameters()))

    tiny(plugins=[Grows(), Counts()])
    assert seen == [0] * 6


class CountsWrappers(Everywhere):
    @hookimpl
    def on_run_end(self, run: Any, event: Any) -> None:
        gc.collect()
        wrappers = [each for each in gc.get_objects() if type(each) is DistributedDataParallel]
        assert len(wrappers) == 1


@pytest.mark.parametrize("change", ["unfreezes", "grows"])
def test_a_change_is_resumed_in_bits_on_two_processes(tmp_path: Path, change: str) -> None:
    make = CHANGES[change]
    options: dict[str, Any] = {"max_steps": 5, "overrides": {"training.save_steps": 1, "model.n_layer": 2}}
    whole = train_on_ranks(make(), CountsWrappers(), output_dir=tmp_path / "whole", **options)
    assert [outcome.error for outcome in whole] == ["", ""]
    for step in (3, 4):
        train_on_ranks(make(), Fails(step), output_dir=tmp_path / "parts", **options)
    rest = train_on_ranks(make(), output_dir=tmp_path / "parts", **options)
    assert [outcome.error for outcome in rest] == ["", ""]
    assert {outcome.weights for outcome in rest} == {outcome.weights for outcome in whole}
    assert len({outcome.weights for outcome in whole}) == 1


@pytest.mark.parametrize("asks", ["main", "others"])
def test_one_process_may_ask_for_all(tmp_path: Path, asks: str) -> None:
    one, all_ = (train_on_ranks(Unfreezes(2, who), output_dir=tmp_path / who) for who in (asks, "all"))
    assert [outcome.error for outcome in one] == ["", ""]
    assert {outcome.weights for outcome in one} == {outcome.weights for outcome in all_}


def test_processes_with_different_models_are_refused() -> None:
    class OnMain(Everywhere):
        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            if event.step == 2:
                run.model.norm.requires_grad_(not run.is_main)
                run.control.rebuild_optimizer("the norm is frozen")

    outcomes = train_on_ranks(OnMain())
    assert "the processes have models with different parameters" in outcomes[0].error
    assert outcomes[1].error


class ChangesUnasked(Everywhere):
    """Changes the model after step 2, and asks for nothing."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.change = change

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 2:
            self.change(run.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.norm.requires_grad_(False), "norm.weight is frozen now"),
        (lambda model: setattr(model, "norm", torch.nn.Identity()), "1 parameters that are trained are no longer in"),
    ],
)
def test_a_change_that_fails_in_torch_names_what_to_do(change: Any, message: str) -> None:
    """Two processes wait for the gradients of a parameter that has none any more."""
    for outcome in train_on_ranks(ChangesUnasked(change), max_steps=5, overrides={"training.logging_steps": 5}):
        assert message in outcome.error
        assert "run.control.rebuild_optimizer" in outcome.error
