"""The step as a component: sharpness-aware minimisation against a loop by hand, and components with a defect."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from gpt_simple import Plugin, PluginError, hookimpl
from gpt_simple.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.rng import derive_seed
from gpt_simple.hooks import NoConfig, Registry, accumulate
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.preflight.dry_run import DryRun
from gpt_simple.preflight.memory import predict_memory
from gpt_simple.testing import train, train_on_ranks
from tests.docs.test_plugin_pages import RECIPES

Sam = RECIPES["Sam"]
RHO = 0.3


class Sgd(Plugin[NoConfig]):
    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add(
            "optimizer", "sgd", lambda model, config, device: torch.optim.SGD(model.parameters(), momentum=0.9)
        )


OPTIONS: dict[str, Any] = {
    "model.dropout": 0.2,
    "optimizer.name": "sgd",
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 0.05,
    "optimizer.max_grad_norm": 0.5,
}
SAM = {**OPTIONS, "training.step": "sam", "plugins.sam.rho": RHO}


class Watch(Plugin[NoConfig]):
    """The model at the start, and the batches of each step."""

    ranks = "all"
    on_error = "abort"

    def __init__(self) -> None:
        super().__init__(NoConfig())
        self.steps: dict[int, list[Any]] = {}

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.model, self.seed = copy.deepcopy(run.model), run.config.training.seed

    @hookimpl
    def on_batch(self, run: Any, event: Any) -> None:
        self.steps.setdefault(event.step, []).append(event.batch)


def pass_over(model: torch.nn.Module, batches: list[Any], seed: int) -> None:
    """The gradient of the mean loss over the target tokens of all batches."""
    targets = sum(int((batch.labels >= 0).sum()) for batch in batches)
    for parameter in model.parameters():
        parameter.grad = None
    for batch in batches:
        torch.manual_seed(derive_seed(seed, batch.first_sample))
        logits = model(batch.input_ids)
        loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
        (loss / targets).backward()


def sam_by_hand(watch: Watch) -> dict[str, torch.Tensor]:
    model = watch.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batches in watch.steps.values():
        pass_over(model, batches, watch.seed)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            for p in model.parameters():
                p += RHO * p.grad / norm
        pass_over(model, batches, watch.seed)
        model.load_state_dict(before)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("ranks", [1, 2])
def test_sam_is_the_loop_by_hand(ranks: int, tmp_path: Path) -> None:
    watch, accumulation = Watch(), "training.gradient_accumulation_steps"
    # The rows of two processes with two micro-batches each are those of one process with four.
    train(Sgd, watch, max_steps=4, overrides={**OPTIONS, accumulation: 2 * ranks})
    assert {len(batches) for batches in watch.steps.values()} == {2 * ranks}
    options = {**SAM, accumulation: 2}
    if ranks == 1:
        train(Sgd, Sam, output_dir=tmp_path, max_steps=4, overrides=options)
    else:
        outcomes = train_on_ranks(Sgd, Sam, output_dir=tmp_path, max_steps=4, overrides=options)
        assert [outcome.error for outcome in outcomes] == ["", ""]
    trained = load_file(tmp_path / "checkpoints/step-00000004/model.safetensors")
    by_hand = sam_by_hand(watch)
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, by_hand[name], rtol=0, atol=1e-6)
    plain = train(Sgd, max_steps=4, overrides=OPTIONS).weights
    assert any(float((tensor - plain[name]).abs().max()) > 1e-4 for name, tensor in trained.items())


def test_sam_resumes_in_bits_on_two_processes(tmp_path: Path) -> None:
    whole = train_on_ranks(Sgd, Sam, output_dir=tmp_path / "whole", max_steps=4, overrides=SAM)
    train_on_ranks(Sgd, Sam, output_dir=tmp_path / "parts", max_steps=2, overrides=SAM)
    parts = train_on_ranks(Sgd, Sam, output_dir=tmp_path / "parts", max_steps=4, overrides=SAM)
    assert [outcome.error for outcome in (*whole, *parts)] == [""] * 4
    assert {outcome.weights for outcome in (*whole, *parts)} == {whole[0].weights}


def test_hooks_see_each_micro_batch_once(tmp_path: Path) -> None:
    trained = train(Sgd, Sam, output_dir=tmp_path, overrides=SAM)
    seen = [(event.step, event.micro_batch) for event in trained.recorder.events("on_batch")]
    assert seen == [(step, index) for step in (1, 2, 3) for index in (0, 1)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ends = trained.recorder.events("on_step_end")
    assert [row["train/loss"] for row in rows if row["kind"] == "train"] == pytest.approx(
        [float(event.loss) for event in ends]
    )


def made(step: Callable[..., Any]) -> type[Plugin[NoConfig]]:
    class Brings(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("step", "own", lambda model, config: step)

    return Brings


def never_last(batches: Any, backward: Any) -> Any:
    return sum(backward(batch, is_last=False) for batch in batches)


def forgets_in_the_second_pass(batches: Any, backward: Any) -> Any:
    accumulate(batches, backward)
    return never_last(batches, backward)


def one_too_many(batches: Any, backward: Any) -> Any:
    loss = accumulate(batches, backward)
    backward(batches[0], is_last=False)
    return loss


def fails(batches: Any, backward: Any) -> Any:
    raise ZeroDivisionError("boom")


NOT_A_LOSS, NOT_REDUCED = "expected the summed loss of its micro-batches", "left gradients that are not reduced"
DEFECTS: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda batches, backward: accumulate(batches, backward) and None, f"returned NoneType; {NOT_A_LOSS}"),
    "a number": (lambda batches, backward: float(accumulate(batches, backward)), f"returned float; {NOT_A_LOSS}"),
    "a row": (
        lambda batches, backward: accumulate(batches, backward)[None],
        rf"returned a tensor of shape \[1\]; {NOT_A_LOSS}",
    ),
    "no pass": (lambda batches, backward: torch.zeros(()), NOT_REDUCED),
    "never last": (never_last, NOT_REDUCED),
    "not last in its second pass": (forgets_in_the_second_pass, NOT_REDUCED),
    "one pass more": (one_too_many, NOT_REDUCED),
    "no is_last": (lambda batches, backward: backward(batches[0]), "failed: TypeError: .*is_last"),
    "raises": (fails, r"failed: ZeroDivisionError: boom \(.*test_step.py:\d+\)"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_a_step_names_it(defect: str, tmp_path: Path) -> None:
    step, message = DEFECTS[defect]
    with pytest.raises(PluginError, match=rf"step 'own' of the plugin brings \(.*test_step.py\) {message}"):
        train(made(step), output_dir=tmp_path, overrides={"training.step": "own"})


def test_a_component_that_is_no_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"step 'own' .* is made as a int, which has no __call__"):
        train(made(3), output_dir=tmp_path, overrides={"training.step": "own"})  # type: ignore[arg-type]


def test_a_failure_inside_backward_is_not_the_steps(tmp_path: Path) -> None:
    class Full(Plugin[NoConfig]):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            def fail(*_: Any) -> None:
                raise torch.OutOfMemoryError("out of memory")

            run.model.register_forward_pre_hook(fail)

    with pytest.raises(torch.OutOfMemoryError):
        train(made(lambda batches, backward: accumulate(batches, backward)), Full, overrides={"training.step": "own"})


CONFIG = Config(
    model=ModelConfig(n_embd=64, n_layer=2, n_head=2, dropout=0.1),
    data=DataConfig(max_length=64),
    training=TrainingConfig(gradient_accumulation_steps=2, gradient_checkpointing=False, step="sam"),
)


def registry() -> Registry:
    parts = builtin_registry()
    Sam.register_components(parts.owned_by("sam"))
    return parts


def test_the_predicted_memory_has_what_the_step_holds() -> None:
    standard = evolve(CONFIG, training=evolve(CONFIG.training, step="standard"))
    sam = predict_memory(CONFIG, vocab_size=512, registry=registry())
    plain = predict_memory(standard, vocab_size=512, registry=registry())
    copies = sam.peak - plain.peak
    weights = plain.by_category["parameters"]
    assert 0.9 * weights < copies < 2.1 * weights


def test_a_step_sees_gradients_without_the_loss_scale() -> None:
    """fp16's scaler on a CPU, in float32: a scale that is a power of two changes no digit."""
    seen: dict[bool, list[torch.Tensor]] = {}
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**12)
        precision = Precision("fp16", "", torch.device("cpu"), None, scaler)
        torch.manual_seed(1)
        dry_run = DryRun.prepare(CONFIG, registry(), precision, vocab_size=64)
        result = dry_run.step()
        seen[enabled] = [result.norm, *(p.detach() for p in dry_run.train_step.model.parameters())]
    assert all(torch.equal(one, other) for one, other in zip(seen[False], seen[True], strict=True))
