"""Weights of targets, from the source through the batch into the loss."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from gpt_simple import ConfigError, DataConfig, Document, Plugin, PluginError, hookimpl
from gpt_simple.hooks import NoConfig, Registry
from gpt_simple.testing import train, train_on_ranks
from tests.hooks.test_losses import Bigram


def factors(labels: Any) -> Any:
    """No weight for odd tokens, 2 for the others."""
    return np.where(labels % 2 == 1, 0.0, 2.0).astype(np.float32)


class Weighing:
    """A source whose documents are counts, and whose tokens have weights."""

    def fingerprint(self) -> str:
        return "weighing 1"

    def documents(self) -> Iterator[Document]:
        for first in range(80):
            yield Document(" ".join(str(first + each) for each in range(9 + first % 5)), key=str(first))

    def weights(self, input_ids: Any, labels: Any, tokenizer: Any) -> Any:
        assert tokenizer.eod_id >= 0
        assert input_ids.shape == labels.shape
        return factors(labels)


class WeighingStream:
    fingerprint, weights, stream = Weighing.fingerprint, Weighing.weights, Weighing.documents


def brings(source: type) -> type[Plugin[NoConfig]]:
    class Brings(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("source", "weighing", lambda config, seed: source(), config=DataConfig)
            registry.add("model", "bigram", lambda config, *, vocab_size, max_length: Bigram(vocab_size, False))
            registry.add("optimizer", "sgd", lambda model, config, device: torch.optim.SGD(model.parameters()))

    return Brings


OPTIONS: dict[str, Any] = {
    "data.source": "weighing",
    "data.val_fraction": 0.3,
    "optimizer.name": "sgd",
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 0.1,
    "optimizer.max_grad_norm": None,
    "training.eval_steps": 2,
    "training.logging_steps": 1,
}


class ByHand(Plugin[NoConfig]):
    """The same steps on a copy of the model, with the weights that the labels have."""

    ranks, on_error = "all", "abort"

    def __init__(self) -> None:
        super().__init__(NoConfig())
        self.losses: dict[int, list[float]] = {}

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.model = copy.deepcopy(run.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        batch = event.batch
        assert batch.weights.dtype is torch.float32
        assert np.array_equal(batch.weights.numpy(), factors(batch.labels.numpy()))
        logits = self.model(batch.input_ids).flatten(0, 1)
        nats = cross_entropy(logits, batch.labels.flatten(), ignore_index=-100, reduction="none")
        targets = run.facts()["tokens_per_step"]
        ((nats * torch.from_numpy(factors(batch.labels.numpy())).flatten()).sum() / targets).backward()
        self.losses.setdefault(event.step, []).append(float(nats.sum()) / targets)
        if event.micro_batch == 1:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @hookimpl
    def evaluate(self, run: Any, event: Any) -> Any:
        assert all(batch.weights is None for batch in run.val_batches())
        return {}


@pytest.mark.parametrize("source", [Weighing, WeighingStream])
@pytest.mark.parametrize("how", ["plain", "fused", "masked", "in threads"])
def test_weights_of_targets_train_as_by_hand(how: str, source: type, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "fused": {"training.compile": True, "training.compile_backend": "aot_eager"},
        "masked": {"data.packing": "best_fit"} if source is Weighing else {},
        "in threads": {"data.num_workers": 2},
    }[how]
    by_hand = ByHand()
    trained = train(brings(source), by_hand, output_dir=tmp_path, max_steps=4, overrides={**OPTIONS, **options})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    if "data.packing" not in options:  # every position is a target
        for name, tensor in by_hand.model.state_dict().items():
            torch.testing.assert_close(trained.weights[name], tensor, rtol=1e-5, atol=1e-6)
        losses = [row["train/loss"] for row in rows if row["kind"] == "train"]
        assert losses == pytest.approx([sum(each) for each in by_hand.losses.values()], rel=1e-5)
    assert all(0 < row["train/weighted_loss"] < 2 * row["train/loss"] for row in rows if row["kind"] == "train")


def test_weights_are_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    plugin, batch = brings(Weighing), "training.per_device_batch_size"
    two = train_on_ranks(plugin, output_dir=tmp_path / "two", max_steps=2, overrides={**OPTIONS, batch: 1})
    again = train_on_ranks(plugin, output_dir=tmp_path / "two", max_steps=4, overrides={**OPTIONS, batch: 1})
    assert [outcome.error for outcome in (*two, *again)] == [""] * 4
    train(plugin, output_dir=tmp_path / "one", max_steps=4, overrides={**OPTIONS, batch: 2})
    losses = []
    for name in ("one", "two"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["train/weighted_loss"] for row in rows if row["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_model_that_takes_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source: the source gives weights of targets, .* 'bigram' has no"):
        train(brings(Weighing), output_dir=tmp_path, overrides={**OPTIONS, "model": {"name": "bigram"}})
    assert not (tmp_path / "run.json").exists()


def fails(*_: Any) -> Any:
    raise ValueError("boom")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda self, ids, labels, tokenizer: labels[0], r"int64 of shape \[16\]; expected finite numbers of shape"),
        (lambda self, ids, labels, tokenizer: labels * np.nan, "expected finite numbers"),
        (lambda self, ids, labels, tokenizer: np.full(labels.shape, "a"), "expected finite numbers"),
        (fails, "ValueError: boom"),
    ],
)
def test_weights_that_cannot_be_used_name_the_source(weights: Any, message: str) -> None:
    source = type("Wrong", (Weighing,), {"weights": weights})
    with pytest.raises(PluginError, match=rf"source 'weighing' .* failed in weights: .*{message}"):
        train(brings(source), overrides=OPTIONS)
