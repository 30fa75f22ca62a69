"""Further terms of the loss: they are trained on, and reported apart from the cross-entropy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gpt_simple import ConfigError, Plugin, PluginError, hookimpl
from gpt_simple.hooks import Losses, NoConfig, Registry
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.preflight.memory import predict_memory
from gpt_simple.spec import resolve_spec
from gpt_simple.testing import train, train_on_ranks
from tests.docs.test_plugin_pages import RECIPES

Z = 1e-2


class Bigram(nn.Module):
    """``split``: the z-loss (Chowdhery et al. 2022) is a term of its own, else a part of the one loss."""

    def __init__(self, vocab_size: int, split: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size)
        self.split = split

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.embedding(input_ids)).float()
        if labels is None:
            return logits
        nats = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        z_loss = Z * (logits.logsumexp(-1).square() * (labels >= 0)).sum()
        if callable(self.split):
            return self.split(nats, z_loss)
        return Losses(nats, {"z_loss": z_loss}) if self.split else nats + z_loss


def brings(split: Any) -> type[Plugin[NoConfig]]:
    class Brings(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("model", "bigram", lambda config, *, vocab_size, max_length: Bigram(vocab_size, split))

    return Brings


BIGRAM: dict[str, Any] = {"model.name": "bigram", "training.logging_steps": 2, "training.eval_steps": 4}


def rows(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


@pytest.mark.parametrize("how", ["plain", "bf16", "compiled", "two passes"])
def test_a_term_is_trained_on_and_reported_apart(how: str, tmp_path: Path) -> None:
    options = {
        "plain": {},
        "bf16": {"training.mixed_precision": "bf16"},
        "compiled": {"training.compile": True, "training.compile_backend": "aot_eager"},
        "two passes": {"training.step": "sam"},
    }[how]
    more = (RECIPES["Sam"],) if how == "two passes" else ()
    for name in ("split", "whole"):
        out = tmp_path / name
        train(brings(name == "split"), *more, output_dir=out, max_steps=4, overrides={**BIGRAM, **options})
    split, whole = (rows(tmp_path / name, "train") for name in ("split", "whole"))
    saved = [
        (tmp_path / name / "checkpoints/step-00000004/model.safetensors").read_bytes() for name in ("split", "whole")
    ]
    assert saved[0] == saved[1]
    assert len(split) == 2
    for row, other in zip(split, whole, strict=True):
        assert row["train/z_loss"] > Z
        assert row["train/loss"] + row["train/z_loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        assert "train/z_loss" not in other
    (evaluated,), (with_term,) = rows(tmp_path / "split", "eval"), rows(tmp_path / "whole", "eval")
    assert evaluated["eval/loss"] < with_term["eval/loss"] - Z


def test_two_processes_report_what_one_does(tmp_path: Path) -> None:
    batch = "training.per_device_batch_size"
    outcomes = train_on_ranks(brings(True), output_dir=tmp_path / "two", max_steps=4, overrides=BIGRAM | {batch: 1})
    assert [outcome.error for outcome in outcomes] == ["", ""]
    train(brings(True), output_dir=tmp_path / "one", max_steps=4, overrides=BIGRAM | {batch: 2})
    for name in ("train/loss", "train/z_loss"):
        two, one = ([row[name] for row in rows(tmp_path / each, "train")] for each in ("two", "one"))
        assert two == pytest.approx(one, rel=1e-4)


def test_the_cross_entropy_may_have_a_weight(tmp_path: Path) -> None:
    train(
        brings(lambda nats, z_loss: Losses(nats, {"z": z_loss}, weight=0.0)),
        output_dir=tmp_path / "a",
        overrides=BIGRAM,
    )
    train(brings(lambda nats, z_loss: z_loss), output_dir=tmp_path / "b", overrides=BIGRAM)
    one, other = (tmp_path / name / "checkpoints/step-00000003/model.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert rows(tmp_path / "a", "train")[0]["train/loss"] == pytest.approx(5.6, abs=1.0)


def test_a_skipped_step_counts_for_no_term(tmp_path: Path) -> None:
    class Asks(Plugin[NoConfig]):
        @hookimpl
        def on_gradients(self, run: Any, event: Any) -> None:
            run.control.skip_step(torch.tensor(event.step > 1))

    train(brings(True), Asks, output_dir=tmp_path / "skipped", max_steps=2, overrides=BIGRAM)
    train(brings(True), output_dir=tmp_path / "one", max_steps=1, overrides=BIGRAM)
    for name in ("train/loss", "train/z_loss"):
        assert rows(tmp_path / "skipped", "train")[0][name] == rows(tmp_path / "one", "train")[0][name]


WRONG: dict[str, tuple[Any, str]] = {
    "a row": (lambda nats, z_loss: Losses(nats, {"z": z_loss[None]}), r"a tensor of shape \[1\] as z of Losses"),
    "a number": (lambda nats, z_loss: Losses(nats, {"z": 1.0}), "float as z of Losses"),
    "no cross-entropy": (lambda nats, z_loss: Losses(None, {"z": z_loss}), "NoneType as cross_entropy of Losses"),
    "a taken name": (lambda nats, z_loss: Losses(nats, {"grad_norm": z_loss}), "a term named 'grad_norm'"),
    "no name": (lambda nats, z_loss: Losses(nats, {3: z_loss}), "a term named 3"),
    "a list": (lambda nats, z_loss: Losses(nats, [z_loss]), "list as the terms of Losses; expected a mapping"),
    "a pair": (
        lambda nats, z_loss: (nats, z_loss),
        "returned tuple; expected the summed loss, a 0-d tensor, or Losses",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_losses_that_cannot_be_used_name_the_model(wrong: str) -> None:
    made, message = WRONG[wrong]
    with pytest.raises(PluginError, match=rf"model 'bigram' of the plugin brings .* failed in forward: .*{message}"):
        train(brings(made), overrides=BIGRAM)


class Own:
    """The cross-entropy and a z-loss from what the component needs; records the shapes that it gets."""

    def __init__(self, needs: str, shapes: list[list[int]], change: Any = None) -> None:
        self.needs, self.shapes, self.change = needs, shapes, change

    def build(self, model: nn.Module, config: Any) -> Any:
        self.model = model
        return self

    def __call__(self, output: Tensor, batch: Any) -> Any:
        self.shapes.append(list(output.shape))
        logits = (output if self.needs == "logits" else output @ self.model.head_weight.T).float()
        nats = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
        losses = Losses(nats, {"z_loss": Z * (logits.logsumexp(-1).square() * (batch.labels >= 0)).sum()})
        return self.change(losses) if self.change else losses


def brings_loss(own: Own) -> type[Plugin[NoConfig]]:
    class Brings(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("loss", "own", own.build)
            registry.add("model", "bigram", lambda config, *, vocab_size, max_length: Bigram(vocab_size, True))

    return Brings


OWN = {"training.loss": "own", "training.logging_steps": 2, "training.eval_steps": 4}


@pytest.mark.parametrize("needs", ["logits", "hidden"])
@pytest.mark.parametrize("how", ["plain", "masked", "bf16", "compiled", "checkpointing", "two processes"])
def test_a_loss_component_gets_what_it_needs(how: str, needs: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "masked": {"data.document_mask": True},
        "bf16": {"training.mixed_precision": "bf16"},
        "compiled": {"training.compile": True, "training.compile_backend": "aot_eager"},
        "checkpointing": {"training.gradient_checkpointing": True},
        "two processes": {},
    }[how]
    shapes: list[list[int]] = []
    plugin, options = brings_loss(Own(needs, shapes)), {**OWN, **options}
    if how == "two processes":
        outcomes = train_on_ranks(plugin, output_dir=tmp_path, max_steps=4, overrides=options)
        assert [outcome.error for outcome in outcomes] == ["", ""]
        assert outcomes[0].weights == outcomes[1].weights
    else:
        train(plugin, output_dir=tmp_path, max_steps=4, overrides=options)
        assert all(shape == [2, 16, 16 if needs == "hidden" else 384] for shape in shapes)
        assert len(shapes) == 8
    last = rows(tmp_path, "train")[-1]
    assert last["train/z_loss"] > Z
    assert last["train/loss"] == pytest.approx(rows(tmp_path, "eval")[0]["eval/loss"], rel=0.1)


def test_the_own_loss_of_a_model_as_a_component_is_the_same(tmp_path: Path) -> None:
    """A model with a term of its own, and a component that computes both."""
    for name, options in (("own", OWN), ("model", {})):
        train(brings_loss(Own("logits", [])), output_dir=tmp_path / name, overrides={**BIGRAM, **options})
    for name in ("train/loss", "train/z_loss"):
        own, model = ([row[name] for row in rows(tmp_path / each, "train")] for each in ("own", "model"))
        assert own == pytest.approx(model, rel=1e-6)


def test_a_loss_that_needs_what_a_model_does_not_give_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.loss: the loss 'own' needs hidden states, and .* 'bigram'"):
        train(brings_loss(Own("hidden", [])), output_dir=tmp_path, overrides={**BIGRAM, **OWN})
    assert not (tmp_path / "run.json").exists()


def _raise(losses: Losses) -> None:
    raise ValueError("boom")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (Own("attention", []), r"loss 'own' .* needs 'attention'; expected \"logits\" or \"hidden\""),
        (Own("logits", [], lambda losses: losses.total), "loss 'own' .* failed: .*returned a tensor; expected Losses"),
        (Own("logits", [], lambda losses: None), "loss 'own' .* failed: .*it returned NoneType"),
        (Own("logits", [], _raise), "loss 'own' .* failed: ValueError: boom"),
    ],
)
def test_a_defect_of_a_loss_names_it(own: Own, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        train(brings_loss(own), overrides=OWN)


def test_the_predicted_memory_has_what_the_loss_holds(tmp_path: Path) -> None:
    teacher = train(output_dir=tmp_path, max_steps=1).result.checkpoint_path
    peaks, registry = {}, builtin_registry()
    RECIPES["Distill"].register_components(registry.owned_by("distill"))
    for loss in ("standard", "distill"):
        sections: dict[str, Any] = {
            "model": {"n_embd": 16, "n_layer": 1, "n_head": 2},
            "data": {"max_length": 16},
            "training": {"loss": loss, "compile": False},
            "plugins": {"distill": {"teacher": str(teacher)}},
        }
        spec = resolve_spec(None, sections=sections, plugins=[RECIPES["Distill"]])
        peaks[loss] = predict_memory(spec.config, vocab_size=257, registry=registry).peak
    weights = sum(file.stat().st_size for file in Path(str(teacher)).glob("model.safetensors"))
    assert peaks["distill"] > peaks["standard"] + 0.9 * weights
