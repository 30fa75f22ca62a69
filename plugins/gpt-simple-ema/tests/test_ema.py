"""The plugin keeps the contract, and its average is that of its definition, also after a stop and a resume."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpt_simple_ema import Ema, EmaConfig
from safetensors.torch import load_file

from gpt_simple import Plugin, hookimpl
from gpt_simple.testing import check_contract, no_host_sync, train, train_on_ranks

Weights = Mapping[str, torch.Tensor]


class Expected(Plugin[Any]):
    """The average by its definition, and the weights of each step."""

    ranks = "all"

    def __init__(self, decay: float, every: int, warmup: bool) -> None:
        super().__init__(None)
        self.options = decay, every, warmup
        self.average: dict[str, torch.Tensor] = {}

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.average = {name: tensor.detach().double() for name, tensor in run.model.named_parameters()}

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        decay, every, warmup = self.options
        if event.step % every == 0:
            number = event.step // every
            kept = min(decay, (1 + number) / (10 + number)) if warmup else decay
            for name, tensor in run.model.named_parameters():
                self.average[name] = kept * self.average[name] + (1 - kept) * tensor.detach().double()


class StopsAt(Plugin[Any]):
    def __init__(self, step: int) -> None:
        super().__init__(None)
        self.step = step

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == self.step:
            run.control.stop("for a test")


class Skips(Plugin[Any]):
    """Skips the second step, whose gradients it makes NaN."""

    ranks = "all"

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        if event.step == 2:
            for parameter in run.model.parameters():
                parameter.grad.fill_(torch.nan)


class Grows(Plugin[Any]):
    """The model has another block after the second step."""

    ranks = "all"

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        if event.step >= 2:
            event.model.blocks.append(copy.deepcopy(event.model.blocks[-1]))

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 2:
            run.model.blocks.append(copy.deepcopy(run.model.blocks[-1]))
            run.control.rebuild_optimizer("another block")


class Shrinks(Grows):
    """The model loses its first block after the second step."""

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        if event.step >= 2:
            del event.model.blocks[0]

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 2:
            del run.model.blocks[0]
            run.control.rebuild_optimizer("a block less")


def saved(out: Path) -> Weights:
    return load_file(sorted((out / "checkpoints").glob("step-*"))[-1] / "weights-ema.safetensors")


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_keeps_the_contract() -> None:
    check_contract(Ema, overrides={"plugins.evaluate.weights": ["live", "ema"]})


@pytest.mark.parametrize("options", [(0.999, 1, True), (0.5, 2, False), (0.0, 3, False)])
def test_the_average_is_that_of_its_definition(options: tuple[float, int, bool], tmp_path: Path) -> None:
    expected = Expected(*options)
    keys = ("plugins.ema.decay", "plugins.ema.every", "plugins.ema.warmup")
    train(Ema, expected, output_dir=tmp_path, max_steps=6, overrides=dict(zip(keys, options, strict=True)))
    found = saved(tmp_path)
    assert found.keys() == expected.average.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected.average[name], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    train(Ema, output_dir=tmp_path / "whole", max_steps=6)
    train(Ema, StopsAt(2), output_dir=tmp_path / "parts", max_steps=6)
    train(Ema, StopsAt(3), output_dir=tmp_path / "parts", max_steps=6)
    train(Ema, output_dir=tmp_path / "parts", max_steps=6)
    assert equal(saved(tmp_path / "parts"), saved(tmp_path / "whole"))


def test_it_can_be_added_when_a_run_is_resumed(tmp_path: Path) -> None:
    first = train(StopsAt(2), output_dir=tmp_path, max_steps=4)
    train(Ema, output_dir=tmp_path, max_steps=4, overrides={"plugins.ema.every": 100})
    assert equal(saved(tmp_path), {name: first.weights[name] for name in saved(tmp_path)})


@pytest.mark.parametrize("changes", [Grows, Shrinks])
def test_the_average_follows_a_change_of_the_model(changes: type[Plugin[Any]], tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 5, "overrides": {"model.n_layer": 2}}
    whole = train(Ema, changes, output_dir=tmp_path / "whole", **options)
    for stops in ([StopsAt(2)], [StopsAt(3)], []):
        train(Ema, changes, *stops, output_dir=tmp_path / "parts", **options)
    average = saved(tmp_path / "whole")
    assert average.keys() <= whole.weights.keys()
    assert equal(saved(tmp_path / "parts"), average)
    options["overrides"] |= {"plugins.ema.decay": 0.0}
    latest = train(Ema, changes, output_dir=tmp_path / "latest", **options)
    assert equal(saved(tmp_path / "latest"), {name: latest.weights[name] for name in average})


def test_two_processes_have_one_average_and_resume_it(tmp_path: Path) -> None:
    for out, plugins in (("whole", [Ema]), ("parts", [Ema, StopsAt(2)]), ("parts", [Ema])):
        overrides = {"plugins.evaluate.weights": ["ema", "live"]}
        outcomes = train_on_ranks(*plugins, output_dir=tmp_path / out, max_steps=4, overrides=overrides)
        assert not any(outcome.error for outcome in outcomes)
        assert len({outcome.weights for outcome in outcomes}) == 1
    assert equal(saved(tmp_path / "parts"), saved(tmp_path / "whole"))


def test_a_skipped_step_leaves_a_finite_average(tmp_path: Path) -> None:
    trained = train(Ema, Skips, output_dir=tmp_path, max_steps=3)
    assert "train/skipped_steps" in trained.recorder.events("on_metrics")[1].metrics
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path).values())


@pytest.mark.parametrize("skipped", [True, False])
def test_a_step_that_says_it_was_skipped_changes_nothing(skipped: bool) -> None:
    ema, model = Ema(EmaConfig()), torch.nn.Linear(3, 3)
    run: Any = SimpleNamespace(model=model)
    ema.on_optimizer_built(run, SimpleNamespace())  # type: ignore[arg-type]
    ema.on_run_start(run, SimpleNamespace())  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in ema.weight_sets()["ema"].items()}
    torch.nn.init.ones_(model.weight)
    event: Any = SimpleNamespace(step=5, skipped=torch.tensor(skipped))
    with no_host_sync():
        ema.on_step_end(run, event)
    assert equal(ema.weight_sets()["ema"], before) is skipped


def test_both_are_evaluated_by_their_names() -> None:
    trained = train(Ema, overrides={"plugins.evaluate.weights": ["live", "ema"]}, max_steps=4)
    metrics = trained.recorder.events("on_eval_end")[-1].metrics
    assert metrics["eval/loss"] != metrics["eval/ema/loss"]
