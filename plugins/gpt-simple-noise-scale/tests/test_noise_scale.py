"""The plugin keeps the contract, and its number is that of a computation by hand, also after a stop and a resume."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpt_simple_noise_scale import NoiseScale, NoiseScaleConfig

from gpt_simple import ConfigError, DataConfig, Document, Plugin, hookimpl
from gpt_simple.hooks import accumulate
from gpt_simple.testing import check_contract, train, train_on_ranks

NAME = "train/noise_scale"
ROWS: dict[str, Any] = {
    "training.mixed_precision": "no",
    "training.gradient_accumulation_steps": 3,
    "training.per_device_batch_size": 3,
    "plugins.noise_scale.decay": 0.5,
}
WORDS = {**ROWS, "data.source": "words", "data.packing": "best_fit", "data.max_documents": 400}


class Words:
    """Documents so short that micro-batches have different numbers of targets."""

    def fingerprint(self) -> str:
        return "words"

    def documents(self) -> Iterator[Document]:
        for i in range(400):
            yield Document("abcdefghijklmn"[i % 5 : i % 5 + 3 + i * i % 7], key=str(i))


class ByHand(Plugin[Any]):
    """The two estimates of each step from gradients in double precision, in a file for each process."""

    ranks = "all"
    on_error = "abort"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.batches: list[Any] = []

    @classmethod
    @hookimpl
    def register_components(cls, registry: Any) -> None:
        registry.add("source", "words", lambda config, seed: Words(), config=DataConfig)

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        self.batches.append(event.batch)

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        model = copy.deepcopy(run.model).double()
        one, *_ = gradients = [gradient(model, batch) for batch in self.batches]
        few = self.batches[0].targets
        counts = torch.tensor(float(sum(batch.targets for batch in self.batches)))
        many = float(run.comm.sum(counts))
        whole = float(run.comm.sum(sum(gradients)).div(many).square().sum())
        small = float(one.div(few).square().sum())
        self.batches = []
        with open(run.output_dir / f"by-hand-{run.rank}.jsonl", "a") as file:
            estimates = (small - whole) / (1 / few - 1 / many), (many * whole - few * small) / (many - few)
            file.write(json.dumps([run.step + 1, few, many, *estimates]) + "\n")


def gradient(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Of the summed cross-entropy."""
    with torch.enable_grad():
        logits = model(batch.input_ids).flatten(0, 1)
        loss = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100, reduction="sum")
        found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([each.flatten() for each in found])


def by_hand(out: Path, ranks: int, decay: float = 0.5) -> Iterator[float]:
    """The noise scale of each step: the ratio of the running means, over all processes."""
    rows = [[json.loads(line) for line in (out / f"by-hand-{r}.jsonl").read_text().splitlines()] for r in range(ranks)]
    trace = square = 0.0
    for step in zip(*rows, strict=True):
        trace = decay * trace + (1 - decay) * sum(row[3] for row in step)
        square = decay * square + (1 - decay) * sum(row[4] for row in step)
        yield trace / square if square > 0 else math.nan


def measured(out: Path) -> dict[int, float | None]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row.get(NAME, "none") for row in rows if row["kind"] == "train"}


class StopsAt(Plugin[Any]):
    def __init__(self, *steps: int) -> None:
        super().__init__(None)
        self.steps = steps

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step in self.steps:
            run.control.stop("for a test")


class Explodes(Plugin[Any]):
    """The third step is skipped: a gradient of its first micro-batch is not finite."""

    ranks = "all"

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        if event.step == 3 and event.micro_batch == 1:
            next(run.model.parameters()).grad.fill_(torch.inf)


def test_keeps_the_contract() -> None:
    check_contract(NoiseScale)


@pytest.mark.parametrize(("ranks", "overrides"), [(1, ROWS), (1, WORDS), (2, WORDS)], ids=["1", "1 words", "2 words"])
def test_the_number_is_that_of_a_computation_by_hand(ranks: int, overrides: Any, tmp_path: Path) -> None:
    options = {"ranks": ranks, "output_dir": tmp_path, "max_steps": 6, "overrides": overrides}
    outcomes = train_on_ranks(NoiseScale, ByHand, **options)
    assert [outcome.error for outcome in outcomes] == [""] * ranks
    expected, found = list(by_hand(tmp_path, ranks)), measured(tmp_path)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert any(math.isfinite(value) for value in expected)
    for value, other in zip(expected, found.values(), strict=True):
        assert (math.nan if other is None else other) == pytest.approx(value, rel=1e-5, nan_ok=True)
    counts = {tuple(json.loads(line)[1:3]) for line in (tmp_path / "by-hand-0.jsonl").read_text().splitlines()}
    assert (len(counts) > 1) is (overrides is WORDS), "numbers of targets"


def test_edits_of_other_plugins_are_not_measured(tmp_path: Path) -> None:
    class Halves(Plugin[Any]):
        ranks = "all"
        before = ("noise_scale",)

        @hookimpl
        def on_gradients(self, run: Any, event: Any) -> None:
            for parameter in run.model.parameters():
                parameter.grad.mul_(0.5)

    train(Halves, ByHand, NoiseScale, output_dir=tmp_path, overrides=ROWS)
    assert list(measured(tmp_path).values()) == pytest.approx(list(by_hand(tmp_path, 1)), rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_has_the_same_numbers(ranks: int, tmp_path: Path) -> None:
    overrides = {**ROWS, "training.logging_steps": 2}
    launches: Sequence[tuple[str, list[Any]]] = [("whole", []), ("parts", [StopsAt(3)]), ("parts", [])]
    for out, plugins in launches:
        options = {"output_dir": tmp_path / out, "max_steps": 6, "overrides": overrides, "ranks": ranks}
        outcomes = train_on_ranks(NoiseScale, *plugins, **options)
        assert [outcome.error for outcome in outcomes] == [""] * ranks
    whole, parts = measured(tmp_path / "whole"), measured(tmp_path / "parts")
    assert [parts[step] for step in (2, 4, 6)] == [whole[step] for step in (2, 4, 6)]
    assert "none" not in whole.values()


def test_another_number_of_processes_goes_on_with_the_mean(tmp_path: Path) -> None:
    train_on_ranks(NoiseScale, StopsAt(3), output_dir=tmp_path, max_steps=4, overrides=ROWS)
    # No share of a new step counts: the number that follows is the one that was saved.
    resumed = {**ROWS, "training.gradient_accumulation_steps": 6, "plugins.noise_scale.decay": 0.9999999}
    train(NoiseScale, output_dir=tmp_path, max_steps=4, overrides=resumed)
    found = measured(tmp_path)
    assert found[4] == pytest.approx(found[3], rel=1e-5)


def test_a_step_that_is_not_finite_leaves_the_means(tmp_path: Path) -> None:
    train(NoiseScale, Explodes, output_dir=tmp_path, max_steps=4, overrides=ROWS)
    found = measured(tmp_path)
    assert found[3] == found[2]
    assert found[4] not in (found[3], None)


def test_steps_of_one_micro_batch_are_left_out(tmp_path: Path) -> None:
    stages = [{"steps": 2, "gradient_accumulation_steps": 1}]
    train(NoiseScale, output_dir=tmp_path, max_steps=4, overrides={**ROWS, "training.warmup_stages": stages})
    found = measured(tmp_path)
    assert (found[1], found[2]) == ("none", "none")
    assert found[3] != "none"


def test_a_plugin_that_comes_back_begins_with_a_whole_step(tmp_path: Path) -> None:
    """The tokens of the steps without it are no part of the first step that it sees."""
    options = {"output_dir": tmp_path, "max_steps": 6, "overrides": {**ROWS, "plugins.noise_scale.decay": 0.0}}
    without = {"output_dir": tmp_path, "max_steps": 6, "overrides": {k: v for k, v in ROWS.items() if "noise" not in k}}
    train(NoiseScale, StopsAt(2), **options)
    train(StopsAt(4), **without)
    train(NoiseScale, **options)
    found = measured(tmp_path)
    assert (found[3], found[4]) == ("none", "none")
    assert found[5] == found[2], "the tokens of step 5 are not known"
    assert found[6] != found[5]


def test_one_micro_batch_in_a_step_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        train(NoiseScale, overrides={"training.gradient_accumulation_steps": 1})
    assert len(caught.value.problems) == 1
    assert "training.gradient_accumulation_steps): the noise scale compares a micro-batch" in str(caught.value)
    assert "set it to 2 or more" in str(caught.value)


@pytest.mark.parametrize(("precision", "codes"), [("fp16", ["scaled-gradients"]), ("bf16", []), ("no", [])])
def test_scaled_gradients_are_refused(precision: str, codes: list[str]) -> None:
    run: Any = SimpleNamespace(facts=lambda: {"precision": precision})
    findings = NoiseScale(NoiseScaleConfig()).check_runtime(run, None)  # type: ignore[arg-type]
    assert [(finding.severity, finding.code) for finding in findings] == [("error", code) for code in codes]


def test_another_step_is_warned_of() -> None:
    class Steps(Plugin[Any]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Any) -> None:
            registry.add("step", "mine", lambda model, config: accumulate)

    trained = train(NoiseScale, Steps, overrides={"training.step": "mine"})
    assert "another-step" in [event.name for event in trained.recorder.events("on_log")]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_wrong_decay_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"noise_scale\.decay"):
        train(NoiseScale, overrides={"plugins.noise_scale.decay": decay})
