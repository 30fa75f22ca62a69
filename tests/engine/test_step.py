"""Steps of a run against the same steps by PyTorch alone: the weights, and the training loss that is reported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from gpt_simple import Plugin, hookimpl, read_metrics
from gpt_simple.config.schema import Config, DataConfig, ModelConfig
from gpt_simple.engine.precision import Precision
from gpt_simple.hooks import NoConfig, Registry
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.preflight.dry_run import DryRun
from tests.tiny import TinyRun, weights


def sgd(model: torch.nn.Module, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """An optimizer without ``found_inf`` and ``grad_scale``."""
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9, foreach=False)


class BringsSgd(Plugin[NoConfig]):
    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add("optimizer", "sgd", sgd)


FLAT: dict[str, Any] = {
    "optimizer__name": "sgd",
    "optimizer__schedule": "constant",
    "optimizer__warmup_steps": 0,
    "optimizer__max_grad_norm": 0.5,
}


class BareLoop(Plugin[NoConfig]):
    """The batches of the run, on a copy of its model. The gradient of step ``spoiled`` is not finite in both."""

    ranks = "all"
    on_error = "abort"

    def __init__(self, spoiled: int = 0) -> None:
        super().__init__(NoConfig())
        self.spoiled = spoiled
        self.losses: dict[int, list[torch.Tensor]] = {}

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.model = copy.deepcopy(run.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2, momentum=0.9)

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        logits, labels = self.model(event.batch.input_ids), event.batch.labels
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        self.losses.setdefault(event.step, []).append(losses.detach())
        (losses.mean() / 2).backward()
        if event.micro_batch == 1:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            if event.step != self.spoiled:
                self.optimizer.step()
            self.optimizer.zero_grad()

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        if event.step == self.spoiled:
            next(run.model.parameters()).grad.view(-1)[0] = float("nan")

    def mean_loss(self, *steps: int) -> float:
        return torch.cat([losses for step in steps for losses in self.losses[step]]).mean().item()


@pytest.mark.parametrize("spoiled", [0, 3])
def test_an_optimizer_without_found_inf_trains_as_pytorch_does(tiny: TinyRun, spoiled: int) -> None:
    bare = BareLoop(spoiled)
    result = tiny(plugins=[BringsSgd, bare], **FLAT)
    trained = weights(result)
    for name, tensor in bare.model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-6)
    rows = [row for row in read_metrics(result.output_dir / "metrics.jsonl") if row["kind"] == "train"]
    skipped = {row["step"]: row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row}
    assert skipped == ({4: 1.0} if spoiled else {})


@pytest.mark.parametrize("spoiled", [0, 3])
def test_the_training_loss_is_the_mean_cross_entropy(tiny: TinyRun, spoiled: int) -> None:
    """Of each target token in the interval, without the steps that are skipped."""
    bare = BareLoop(spoiled)
    result = tiny(plugins=[BringsSgd, bare], **FLAT)
    rows = [row for row in read_metrics(result.output_dir / "metrics.jsonl") if row["kind"] == "train"]
    expected = [bare.mean_loss(1, 2), bare.mean_loss(4) if spoiled else bare.mean_loss(3, 4), bare.mean_loss(5, 6)]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["train/loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert result.final_loss == result.summary["final_loss"] == pytest.approx(expected[-1], rel=1e-5)


def test_an_interval_of_a_thousand_steps_loses_none(tiny: TinyRun) -> None:
    losses: list[torch.Tensor] = []

    class Listens(Plugin[NoConfig]):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            run.model.register_forward_hook(lambda model, given, loss: losses.append(loss.detach()))

        @hookimpl
        def on_gradients(self, run: Any, event: Any) -> None:
            if event.step == 7:
                run.control.skip_step(torch.tensor(True))

    small = {"model__n_embd": 8, "model__n_layer": 1, "model__n_head": 1, "data__max_length": 8}
    one = {"training__gradient_accumulation_steps": 1, "training__per_device_batch_size": 1}
    result = tiny(plugins=[Listens], training__max_steps=1100, training__logging_steps=1100, **small, **one)
    (row,) = [row for row in read_metrics(result.output_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert len(losses) == 1100
    mean = torch.stack([*losses[:6], *losses[7:]]).mean().item() / 8
    assert row["train/loss"] == pytest.approx(mean, rel=1e-5)
    assert row["train/skipped_steps"] == 1


def test_a_norm_that_overflows_lowers_the_loss_scale() -> None:
    """Four gradients of 1e25 are finite and their fp32 norm is not: at one scale every step would be skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    precision = Precision("fp16", "", torch.device("cpu"), None, scaler)
    config = Config(ModelConfig(n_embd=32, n_layer=1, n_head=2), DataConfig(max_length=16))
    run = DryRun.prepare(config, builtin_registry(), precision, vocab_size=64)
    model = run.train_step.model
    before = copy.deepcopy(model.state_dict())

    def overflow(*_: Any) -> None:
        next(model.parameters()).grad.view(-1)[:4] = 1e25

    result = run.step(on_gradients=overflow)
    assert (result.norm.item(), result.skipped.item(), scaler.get_scale()) == (float("inf"), 1.0, 2.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert run.step().skipped.item() == 0.0
    assert scaler.get_scale() == 2.0
