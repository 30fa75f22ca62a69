"""``training.gradient_checkpointing = "auto"``: what is compared, and what a run decides by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve

from gpt_simple.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.preflight.activation_checkpointing import Memory, decide
from gpt_simple.preflight.memory import predict_memory
from tests.preflight.conftest import Check

MIB = 2**20
SMALL: dict[str, Any] = {"per_device_batch_size": 2, "gradient_accumulation_steps": 1}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one micro-batch": ({}, {}, {}),
    "two micro-batches": ({}, {"gradient_accumulation_steps": 2}, {}),
    "gradients larger than activations": ({"n_embd": 256}, {"per_device_batch_size": 1}, {}),
    "the same, two micro-batches": (
        {"n_embd": 256},
        {"per_device_batch_size": 1, "gradient_accumulation_steps": 2},
        {},
    ),
    "two processes": ({}, {}, {"world_size": 2}),
    "two processes, two micro-batches": ({}, {"gradient_accumulation_steps": 2}, {"world_size": 2}),
    "bf16 on a GPU": ({}, {}, {"precision": "bf16", "cuda": True}),
    "compiled on a GPU": (
        {"n_embd": 192},
        {"gradient_accumulation_steps": 2},
        {"precision": "bf16", "cuda": True, "compiled": True},
    ),
    "fp16, untied, GPT-2": (
        {"tie_word_embeddings": False, "norm": "layernorm", "mlp_type": "mlp", "position": "learned"},
        {},
        {"precision": "fp16", "cuda": True},
    ),
    "dropout, grouped heads": ({"dropout": 0.1, "n_kv_head": 2}, {}, {}),
    "saved in the background": ({}, {"background_save": True}, {}),
}


def config(model: dict[str, Any] | None = None, **training: Any) -> Config:
    return Config(
        model=ModelConfig(**{"n_embd": 64, "n_layer": 7, "n_head": 4, **(model or {})}),
        data=DataConfig(max_length=128),
        training=TrainingConfig(**{"gradient_checkpointing": "auto", **SMALL, **training}),
    )


def decided(cfg: Config, free: int | None, *, is_cuda: bool = False, **assumptions: Any) -> ActivationCheckpointing:
    known = {"vocab_size": 512, "precision": "no", "compiled": False, "world_size": 1, "workspaces": 0, **assumptions}
    return decide(cfg, builtin_registry(), Memory("a device", is_cuda, free), **known)


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_all_blocks_follows_from_one(case: str) -> None:
    """The decision changes where the prediction for the whole model fits, to 2 %."""
    model, training, assumptions = CASES[case]
    cfg = config(model, **training)
    is_cuda = assumptions.get("cuda", False)
    assumptions = {name: value for name, value in assumptions.items() if name != "cuda"}
    bare = evolve(cfg, training=evolve(cfg.training, gradient_checkpointing=False))
    peak = predict_memory(bare, vocab_size=512, workspaces=0, cuda=is_cuda, **assumptions).peak
    share = 0.95 if is_cuda else 0.75
    assert decided(cfg, int(0.98 * peak / share), is_cuda=is_cuda, **assumptions).setting is True
    assert decided(cfg, int(1.02 * peak / share), is_cuda=is_cuda, **assumptions).setting is False


def test_the_reason_has_both_numbers() -> None:
    off, on, unknown = (decided(config(), free) for free in (100 * MIB, MIB, None))
    assert (off.setting, on.setting, unknown.setting) == (False, True, True)
    assert off.why.startswith("auto: without it ")
    assert off.why.endswith(" MiB are predicted, and 75.0 MiB fit into a device")
    assert unknown.why.endswith("the free memory of a device is unknown")


@pytest.mark.parametrize("setting", [True, 2])
def test_auto_is_recommended_where_there_is_room(setting: bool | int) -> None:
    cfg = config(gradient_checkpointing=setting)
    room, none = decided(cfg, 100 * MIB), decided(cfg, MIB)
    assert (room.setting, none.setting) == (setting, setting)
    assert room.why.startswith('configured; "auto" or false saves the time: without it ')
    assert none.why == decided(config(gradient_checkpointing=False), 100 * MIB).why == "configured"


class Bigram(torch.nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(rows, rows)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.table(input_ids).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")


class Checkpointed(Bigram):
    def set_activation_checkpointing(self, every: int) -> None:
        pass


class NeedsValues(Checkpointed):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise ValueError("no values")


@pytest.mark.parametrize(
    ("model", "setting", "why"),
    [
        (Bigram, False, "auto: the model has no set_activation_checkpointing"),
        (Checkpointed, False, "auto: without it "),
        (NeedsValues, True, "auto: the memory without it cannot be predicted: "),
    ],
)
def test_a_model_of_a_plugin_is_decided_too(model: type[Bigram], setting: bool, why: str) -> None:
    registry = builtin_registry()
    registry.owned_by("own").add("model", "own", lambda config, *, vocab_size, max_length: model(vocab_size))
    for value, expected in (("auto", (setting, why)), (True, (True, "configured"))):
        cfg = config({"name": "own"}, gradient_checkpointing=value)
        found = decide(
            cfg,
            registry,
            Memory("a device", False, 1000 * MIB),
            vocab_size=512,
            precision="no",
            compiled=False,
            world_size=1,
        )
        assert (found.setting, found.why[: len(expected[1])]) == expected


def test_the_processes_of_a_machine_share_its_memory() -> None:
    host, gpu = Memory("this machine", False, 100 * MIB), Memory("H100", True, 100 * MIB)
    assert (host.limit, host.shared(4).limit) == (75 * MIB, 75 * MIB // 4)
    assert gpu.limit == gpu.shared(4).limit == 95 * MIB


AUTO = "--training.gradient_checkpointing=auto"


def test_validate_decides_for_the_device_that_is_named(check: Check) -> None:
    large, small = (check("--device", str(1536 * MIB + size * MIB), AUTO)["memory"] for size in (2000, 68))
    assert "without gradient checkpointing: auto: without it " in large["message"]
    assert (large["fields"]["gradient_checkpointing"], small["fields"]["gradient_checkpointing"]) == (False, True)
    assert large["fields"]["peak"] > small["fields"]["peak"]


def test_validate_finds_the_largest_batch_of_auto(check: Check) -> None:
    device = ("--device", str(1536 * MIB + 70 * MIB))
    found = check(*device, AUTO, "--fit")["memory-fit"]
    batch, bare = found["fields"]["batch"], found["fields"]["batch_without_checkpointing"]
    assert batch > bare
    assert found["message"].endswith('("auto" switches it off up to there)')
    for rows, setting in ((bare, False), (bare + 2, True), (batch, True)):
        asked = check(*device, AUTO, f"--training.per_device_batch_size={rows}")
        assert asked["memory"]["fields"]["gradient_checkpointing"] is setting
        assert asked["memory-margin"]["fields"]["margin"] >= 0


def test_the_estimated_time_follows_the_decision(check: Check) -> None:
    def seconds(device: str, setting: str) -> float:
        answer: float = check(f"--device={device}", "--model.n_layer=3", setting)["runtime"]["fields"]["step_seconds"]
        return answer

    assert seconds("h100", AUTO) == seconds("h100", AUTO.replace("auto", "false"))


@pytest.mark.parametrize("arguments", [(), ("--memory",), ("--probe",)])
def test_validate_takes_auto_with_every_option(check: Check, arguments: tuple[str, ...]) -> None:
    assert "config" in check(AUTO, *arguments)
