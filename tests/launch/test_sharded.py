"""A run whose model is sharded over processes learns, saves and goes on as one whose processes all have it whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import gpt_simple.distributed.sharding  # noqa: F401 - once, here, instead of in every process
from gpt_simple import Plugin, hookimpl
from gpt_simple.job.model import restore
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import read_metrics
from tests.children import At, Everywhere, stops_at
from tests.launch.conftest import Ranks, tiny
from tests.launch.test_same_numbers import files, losses

FSDP = {"training__parallel": "fsdp"}
UNEVEN: dict[str, Any] = {
    "model__n_embd": 36,
    "model__n_layer": 3,
    "model__use_bias": True,
    "training__logging_steps": 1,
    "training__eval_steps": 3,
    "optimizer__max_grad_norm": 0.5,
    "plugins__sample__max_new_tokens": 4,
}
"""Sizes that neither 2 nor 4 processes divide, and a norm that clips every step."""

ROWS: dict[int, tuple[int, int]] = {1: (12, 1), 2: (3, 2), 3: (2, 2), 4: (1, 3)}
"""Rows of a micro-batch and micro-batches of a step, by the number of processes: 12 rows in all."""


def rows(count: int) -> dict[str, int]:
    batch, accumulation = ROWS[count]
    return {"training__per_device_batch_size": batch, "training__gradient_accumulation_steps": accumulation}


def numbers(directory: Path) -> list[float]:
    """Losses and norms."""
    norms = [row["train/grad_norm"] for row in read_metrics(directory / "metrics.jsonl", "train")]
    return losses(directory) + norms


def little_memory() -> None:
    """Let the machine have none, so that whole parameters are not kept between micro-batches."""
    found = os.sysconf
    os.sysconf = lambda name: 1 if name == "SC_PHYS_PAGES" else found(name)  # type: ignore[assignment]


def nothing() -> None:
    pass


COMPILED = {
    "training__compile": True,
    "training__compile_backend": "aot_eager",
    "training__gradient_checkpointing": True,
}

VARIANTS: dict[str, tuple[int, Mapping[str, Any], Mapping[str, Any], Callable[[], None]]] = {
    "two": (2, {}, {}, nothing),
    "four, and little memory": (4, {}, {}, little_memory),
    "untied, documents apart": (
        2,
        {"model__tie_word_embeddings": False, "data__document_mask": True},
        {"training__gradient_checkpointing": 2},
        little_memory,
    ),
    "compiled blocks": (2, {"model__n_layer": 1}, COMPILED, nothing),
    "two by two": (4, {}, {"training__shard_size": 2}, little_memory),
}
"""Processes, options of both runs, options of the sharded one, and what is done in its processes first."""


SLOW = ("compiled blocks", "untied, documents apart", "two by two")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in VARIANTS]
)
def test_losses_are_those_of_ddp(ranks: Ranks, tmp_path: Path, variant: str) -> None:
    count, options, own, surroundings = VARIANTS[variant]
    options = {**UNEVEN, **rows(count), **options}

    def sharded(rank: int) -> str:
        surroundings()
        return str(tiny(tmp_path / "fsdp", **{**options, **own, **FSDP}).status)

    assert ranks(count, lambda rank: tiny(tmp_path / "ddp", **options).status) == ["completed"] * count
    assert ranks(count, sharded, 150.0) == ["completed"] * count
    ddp, fsdp = numbers(tmp_path / "ddp"), numbers(tmp_path / "fsdp")
    assert len(ddp) == 14
    assert fsdp == pytest.approx(ddp, rel=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(ranks: Ranks, tmp_path: Path) -> None:
    options: dict[str, Any] = {**UNEVEN, **FSDP, "model__dropout": 0.1}
    ranks(3, lambda rank: tiny(tmp_path / "whole", **options).status)
    stopped = ranks(3, lambda rank: tiny(tmp_path / "parts", plugins=[stops_at(2)], **options).reason)
    assert stopped == ["enough"] * 3
    assert ranks(3, lambda rank: tiny(tmp_path / "parts", **options).status) == ["completed"] * 3
    assert files(tmp_path / "parts", 6) == files(tmp_path / "whole", 6)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


HYBRID = {"training__shard_size": 2}

KINDS: dict[str, tuple[int, Mapping[str, Any]]] = {
    "one": (1, {}),
    "ddp on 2": (2, {}),
    "fsdp on 2": (2, FSDP),
    "fsdp on 3": (3, FSDP),
    "fsdp on 4": (4, FSDP),
    "fsdp on 2 x 2": (4, {**FSDP, **HYBRID}),
}


@pytest.mark.parametrize(
    "first", ["fsdp on 4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp on 2 x 2", "ddp on 2"))]
)
def test_a_run_goes_on_however_it_is_sharded(ranks: Ranks, tmp_path: Path, first: str) -> None:
    """From one checkpoint of half the steps; each way to go on gives the losses of one whole run."""
    options: dict[str, Any] = {**UNEVEN, "training__save_steps": 3, "training__max_eval_batches": None}
    count, kind = KINDS[first]
    ranks(count, lambda rank: tiny(tmp_path / "first", **options, **kind, **rows(count)).status)
    source = {"training__resume": str(tmp_path / "first/checkpoints/step-00000003")}
    expected = [row for row in numbers_by_step(tmp_path / "first") if row[0] > 3]
    for name, (number, parallel) in KINDS.items():
        if name in ("fsdp on 4", first):
            continue
        own = {**parallel, **rows(number), **source}
        done = ranks(number, lambda rank, own=own, name=name: tiny(tmp_path / name, **options, **own).status)
        assert done == ["completed"] * number, name
        found = numbers_by_step(tmp_path / name)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6), name


def numbers_by_step(directory: Path) -> list[tuple[int, float]]:
    rows = read_metrics(directory / "metrics.jsonl")
    return [(row["step"], row[key]) for row in rows for key in ("train/loss", "eval/loss") if key in row]


def test_a_background_save_writes_the_same_files(ranks: Ranks, tmp_path: Path) -> None:
    options: dict[str, Any] = {**UNEVEN, **FSDP, "training__save_steps": 2}
    for name in ("front", "back"):
        own = {"training__background_save": name == "back"}
        ranks(2, lambda rank, name=name, own=own: tiny(tmp_path / name, **options, **own).status)
    for step in (2, 4, 6):
        assert files(tmp_path / "front", step) == files(tmp_path / "back", step)


class Breaks(Everywhere):
    """The last process's gradients, or its weights, are not a number in step 3."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    @hookimpl
    def on_gradients(self, run: Any, event: Any) -> None:
        if event.step == 3 and run.rank == run.world_size - 1 and self.what == "gradients":
            parameter = next(run.model.parameters())
            getattr(parameter.grad, "_local_tensor", parameter.grad)[:1] = torch.nan

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 3 and run.rank == run.world_size - 1 and self.what == "weights":
            parameter = next(run.model.parameters()).data
            getattr(parameter, "_local_tensor", parameter)[:1] = torch.nan


def momentum(model: torch.nn.Module, config: Any, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9)


class Sgd(Plugin[Any]):
    """An optimizer without found_inf."""

    @classmethod
    @hookimpl
    def register_components(cls, registry: Any) -> None:
        registry.add("optimizer", "momentum", momentum)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("momentum", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_is_skipped_by_all(ranks: Ranks, tmp_path: Path, optimizer: str) -> None:
    options = {**UNEVEN, "optimizer__name": optimizer}

    def work(rank: int, kind: str) -> str:
        plugins = [Breaks("gradients"), Sgd]
        return str(tiny(tmp_path / kind, plugins=plugins, **options, training__parallel=kind).status)

    for kind in ("ddp", "fsdp"):
        assert ranks(2, lambda rank, kind=kind: work(rank, kind)) == ["completed"] * 2
    rows = read_metrics(tmp_path / "fsdp" / "metrics.jsonl", "train")
    assert [row.get("train/skipped_steps") for row in rows] == [None, None, 1, None, None, None]
    ddp, fsdp = (load_file(tmp_path / kind / "checkpoints/step-00000006/model.safetensors") for kind in ("ddp", "fsdp"))
    for name, tensor in ddp.items():
        torch.testing.assert_close(fsdp[name], tensor, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_finite_anywhere_are_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    options = {**FSDP, "training__max_steps": 3}
    found = ranks(2, lambda rank: tiny(tmp_path / "run", plugins=[Breaks("weights")], **options).reason)
    assert ["weights are not finite after step 3" in reason for reason in found] == [True] * 2
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_samples_are_written_by_all_and_logged_once(ranks: Ranks, tmp_path: Path) -> None:
    """They are those of a run that is not sharded, and `sample` writes from its checkpoint."""
    for kind in ("ddp", "fsdp"):
        ranks(2, lambda rank, kind=kind: tiny(tmp_path / kind, **UNEVEN, training__parallel=kind).status)
    ddp, fsdp = (
        [row["message"] for row in read_metrics(tmp_path / kind / "metrics.jsonl", "event") if row["name"] == "sample"]
        for kind in ("ddp", "fsdp")
    )
    assert len(ddp) == 2
    assert fsdp == ddp
    restored = [restore(RunDir(tmp_path / kind), torch.device("cpu"))[0] for kind in ("ddp", "fsdp")]
    for one, other in zip(*(model.parameters() for model in restored), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Generates(Plugin[Any]):
    """On the main process alone, where the others would not come."""

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        run.generate("Once")


class Fails(Everywhere):
    """Fails in the middle of a pass, and is switched off."""

    on_error = "disable"  # type: ignore[assignment]

    def __init__(self, generates: bool) -> None:
        super().__init__()
        self.generates = generates

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 2 and self.generates:
            with patch.object(type(run.model.norm), "forward", side_effect=ValueError("no norm")):
                run.generate("Once")
        elif event.step == 2:
            with torch.no_grad():
                run.model(torch.zeros(1, 99, dtype=torch.int64))


@pytest.mark.parametrize("generates", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_pass_of_a_plugin_that_fails_changes_no_step(ranks: Ranks, tmp_path: Path, generates: bool) -> None:
    for name, plugins in (("with", [Fails(generates)]), ("without", [])):
        own = {**UNEVEN, **FSDP}
        done = ranks(2, lambda rank, p=plugins, name=name, own=own: tiny(tmp_path / name, plugins=p, **own).status)
        assert done == ["completed"] * 2
    assert numbers(tmp_path / "with") == numbers(tmp_path / "without")


@pytest.mark.parametrize("hook", ["on_step_start", "on_checkpoint_saving"])
def test_a_process_that_dies_is_noticed_by_the_others(ranks: Ranks, tmp_path: Path, hook: str) -> None:
    """In a step, and before its part of a checkpoint is gathered. The run goes on from the last checkpoint."""
    options = {**FSDP, "training__save_steps": 2}
    dies = At(hook, 4, lambda run: os.kill(os.getpid(), signal.SIGKILL) if run.rank == 1 else None)
    found = ranks(2, lambda rank: tiny(tmp_path / "run", plugins=[dies], **options).status)
    assert found[1] is None
    assert (found[0]["error"], found[0]["code"]) == ("RankFailed", 1)
    assert "a process died in step" in found[0]["text"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    assert ranks(2, lambda rank: tiny(tmp_path / "run", **options).status) == ["completed"] * 2


class Average(Everywhere):
    """A set of weights that is sharded like the model."""

    def __init__(self) -> None:
        super().__init__()
        self.average: dict[str, torch.Tensor] = {}

    def weight_sets(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        return {"mean": self.average}

    @hookimpl
    def on_optimizer_built(self, run: Any, event: Any) -> None:
        self.average = {name: each.detach().clone() for name, each in run.model.named_parameters()}

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        for name, parameter in run.model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.5)


def test_a_set_of_weights_is_evaluated_saved_and_restored(ranks: Ranks, tmp_path: Path) -> None:
    options = {**UNEVEN, "plugins__evaluate__weights": ["mean", "live"], "training__eval_steps": 2}
    for kind in ("ddp", "fsdp"):
        for steps in (3, 6):
            own = {**options, "training__parallel": kind, "training__max_steps": steps, "optimizer__decay_steps": 6}
            work = lambda rank, own=own, kind=kind: tiny(tmp_path / kind, plugins=[Average()], **own).status  # noqa: E731
            assert ranks(2, work) == ["completed"] * 2
    ddp, fsdp = (
        [
            row[key]
            for row in read_metrics(tmp_path / kind / "metrics.jsonl", "eval")
            for key in ("eval/loss", "eval/live/loss")
        ]
        for kind in ("ddp", "fsdp")
    )
    assert len(ddp) == 8
    assert fsdp == pytest.approx(ddp, rel=1e-6)


class Adds(Everywhere):
    """A layer with values of its own, which differ between the processes."""

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        torch.manual_seed(run.rank)
        event.model.blocks[0].mlp.down.extra = torch.nn.Linear(5, 3)
        event.model.token_embedding.weight.requires_grad_(False)

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        extra = run.model.blocks[0].mlp.down.extra
        torch.manual_seed(0)
        expected = torch.nn.Linear(5, 3)
        assert torch.equal(extra.weight.full_tensor(), expected.weight)


def test_a_plugin_on_the_main_process_cannot_wait_for_ever(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, lambda rank: tiny(tmp_path / "run", plugins=[Generates], **FSDP).status) == ["completed"] * 2
    failed = [row for row in read_metrics(tmp_path / "run/metrics.jsonl", "event") if row["name"] == "plugin_failed"]
    assert len(failed) == 1
    assert "run.generate was used in a hook that not every process runs at once" in failed[0]["message"]


def test_a_layer_that_a_plugin_adds_is_sharded_too(ranks: Ranks, tmp_path: Path) -> None:
    """With the values of the main process; and what is frozen stays as it was drawn."""
    options = {**UNEVEN, **FSDP, "training__max_steps": 2}
    assert ranks(2, lambda rank: tiny(tmp_path / "run", plugins=[Adds()], **options).status) == ["completed"] * 2
    weights = load_file(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    assert weights["blocks.0.mlp.down.extra.weight"].shape == (3, 5)


class Bare(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(384, 8)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.embedding(input_ids) @ self.embedding.weight.T
        if labels is None:
            return logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


class BringsModel(Plugin[Any]):
    @classmethod
    @hookimpl
    def register_components(cls, registry: Any) -> None:
        registry.add("model", "bare", lambda config, *, vocab_size, max_length: Bare())


def test_a_model_that_cannot_be_sharded_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks(2, lambda rank: tiny(tmp_path / "run", plugins=[BringsModel], model__name="bare", **FSDP).status)
    assert [(each["error"], each["code"]) for each in found] == [("ConfigError", 2), ("RankFailed", 2)]
    assert "the model 'bare' has no init_weights() and no blocks (a ModuleList)" in found[0]["text"]


def freeze(run: Any) -> None:
    next(run.model.blocks[0].parameters()).requires_grad_(False)
    run.control.rebuild_optimizer("a block is frozen")


def test_an_optimizer_is_rebuilt_as_without_sharding(ranks: Ranks, tmp_path: Path) -> None:
    for kind in ("ddp", "fsdp"):
        plugins = [At("on_step_end", 2, freeze)]
        options = {**UNEVEN, "training__parallel": kind, "training__eval_steps": None}
        done = ranks(2, lambda rank, own=options, p=plugins, kind=kind: tiny(tmp_path / kind, plugins=p, **own).status)
        assert done == ["completed"] * 2
    assert numbers(tmp_path / "fsdp") == pytest.approx(numbers(tmp_path / "ddp"), rel=1e-6)


def test_groups_that_do_not_divide_the_processes_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks(3, lambda rank: tiny(tmp_path / "run", **FSDP, **HYBRID).status)
    assert [(each["error"], each["code"]) for each in found] == [("ConfigError", 2), *[("RankFailed", 2)] * 2]
    assert "training.shard_size" in found[0]["text"]
    assert "3 processes cannot be divided into groups of 2" in found[0]["text"]
