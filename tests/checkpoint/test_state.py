"""Model and optimizer state by name: exact, strict in both directions, whatever the order of parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from gpt_simple.checkpoint.state import (
    OptimizerAsBuilt,
    flatten_optimizer,
    load_model,
    model_tensors,
    restore_optimizer,
)
from gpt_simple.checkpoint.store import Store
from gpt_simple.config.schema import ModelConfig
from gpt_simple.errors import CheckpointError
from gpt_simple.model.gpt import build
from tests.checkpoint.optimizers import SAVED, UNSAVABLE
from tests.sharding import sharded


class Tiny(nn.Module):
    def __init__(self, width: int = 4, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, width, dtype=dtype)
        self.block = nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.BatchNorm1d(width, dtype=dtype))
        self.head = nn.Linear(width, 6, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.embedding(ids)))
        return logits


def train(model: nn.Module, optimizer: Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(6, (8,), generator=generator)
        nn.functional.cross_entropy(model(ids), ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw-fused": lambda model: AdamW(model.parameters(), fused=True),
    "adamw-foreach-amsgrad": lambda model: AdamW(model.parameters(), foreach=True, amsgrad=True),
    "sgd-momentum": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "sgd-without-state": lambda model: SGD(model.parameters(), lr=0.1),
    "muon": lambda model: Muon(matrices(model), lr=0.1),
    **{kind.__name__: lambda model, kind=kind: kind(model.parameters()) for kind in SAVED},  # type: ignore[misc]
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_bit_equal_through_a_checkpoint(
    store: Store, kind: str, dtype: torch.dtype, tied: bool
) -> None:
    def fresh(seed: int) -> tuple[Tiny, Optimizer, OptimizerAsBuilt]:
        torch.manual_seed(seed)
        model = Tiny(tied=tied, dtype=dtype)
        optimizer = OPTIMIZERS[kind](model)
        return model, optimizer, OptimizerAsBuilt.of(optimizer)

    model, optimizer, built = fresh(0)
    train(model, optimizer, 3, seed=1)
    tensors, document = flatten_optimizer(optimizer, model, built)
    store.publish(3, tensors={"model": model_tensors(model), "optimizer": tensors}, documents={"optimizer": document})
    (checkpoint,) = store.list()
    other, restored, built = fresh(7)
    load_model(other, store.load_tensors(checkpoint, "model"))
    restore_optimizer(
        restored,
        other,
        store.load_tensors(checkpoint, "optimizer"),
        store.load_document(checkpoint, "optimizer"),
    )
    train(model, optimizer, 3, seed=2)
    train(other, restored, 3, seed=2)
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert flatten_optimizer(optimizer, model)[1]["parameters"] == flatten_optimizer(restored, other)[1]["parameters"]
    assert flatten_optimizer(restored, other, built)[1].keys() == document.keys()


@pytest.mark.parametrize("what", UNSAVABLE)
def test_state_that_cannot_be_saved_is_refused(what: str) -> None:
    model = Tiny()
    optimizer = UNSAVABLE[what](model.parameters())
    built = OptimizerAsBuilt.of(optimizer)
    train(model, optimizer, 1, seed=0)
    with pytest.raises(CheckpointError, match=r"which a checkpoint cannot hold"):
        flatten_optimizer(optimizer, model, built)


def test_state_follows_the_name_when_parameters_are_reordered() -> None:
    """torch's own numbers would hand each parameter the moments of another of the same shape."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    forward = AdamW([model["a"].weight, model["b"].weight])
    for factor, layer in enumerate(model.values(), start=1):
        layer.weight.grad = torch.full((3, 3), float(factor))
    forward.step()
    backward = AdamW([{"params": [model["b"].weight]}, {"params": [model["a"].weight], "weight_decay": 0.0}])
    restore_optimizer(backward, model, *flatten_optimizer(forward, model))
    for layer in model.values():
        assert torch.equal(backward.state[layer.weight]["exp_avg"], forward.state[layer.weight]["exp_avg"])


def test_group_options_come_from_the_configuration() -> None:
    model = nn.Linear(2, 2)
    old = AdamW(model.parameters(), lr=1.0)
    new = AdamW(model.parameters(), lr=0.5, weight_decay=0.2)
    restore_optimizer(new, model, *flatten_optimizer(old, model, OptimizerAsBuilt.of(old)))
    assert (new.param_groups[0]["lr"], new.param_groups[0]["weight_decay"]) == (0.5, 0.2)


def test_restored_state_is_not_shared_with_the_caller() -> None:
    model = Tiny()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1, seed=0)
    tensors, document = flatten_optimizer(optimizer, model)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    before = copy.deepcopy(tensors)
    restore_optimizer(optimizer, model, tensors, document)
    train(model, optimizer, 1, seed=1)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_a_tied_weight_is_stored_once_and_buffers_are_stored() -> None:
    tied, untied = model_tensors(Tiny()), model_tensors(Tiny(tied=False))
    assert untied.keys() - tied.keys() == {"head.weight"}
    assert {"block.1.running_mean", "block.1.num_batches_tracked"} <= tied.keys()


def test_equal_values_and_empty_tensors_are_not_taken_for_tied() -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(0, 2)) for name in "ab"})
    assert model_tensors(model).keys() == {"a", "b"}


@pytest.mark.parametrize("tied", [True, False])
def test_no_tensor_of_a_sharded_model_is_left_out(tied: bool) -> None:
    """Their addresses are all 0."""
    sizes = {"n_embd": 8, "n_layer": 4, "n_head": 2, "tie_word_embeddings": tied}
    model = build(ModelConfig(**sizes), vocab_size=16, max_length=8)
    names = list(model_tensors(model))
    with sharded(model):
        assert list(model_tensors(model)) == names
    one = Tiny(tied=True)
    with sharded(one):
        assert "head.weight" not in model_tensors(one), "a tied weight is still stored once"


@pytest.mark.parametrize(
    ("saved", "own", "lines"),
    [
        (Tiny(4), Tiny(8), ["embedding.weight: checkpoint [6, 4], model [6, 8]"]),
        (Tiny(), Tiny(tied=False), ["head.weight: checkpoint has none, model [6, 4]"]),
        (Tiny(tied=False), Tiny(), ["head.weight: checkpoint [6, 4], model has none"]),
        (
            Tiny(dtype=torch.bfloat16),
            Tiny(),
            ["block.0.bias: checkpoint [4] bfloat16, model [4]"],
        ),
    ],
)
def test_a_model_that_differs_is_refused_with_the_difference(saved: Tiny, own: Tiny, lines: list[str]) -> None:
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(CheckpointError) as refused:
        load_model(own, model_tensors(saved))
    for line in lines:
        assert line in str(refused.value)
    assert all(torch.equal(own.state_dict()[name], before[name]) for name in before)


def test_a_long_difference_is_cut() -> None:
    big = nn.ModuleList(nn.Linear(2, 2) for _ in range(20))
    with pytest.raises(CheckpointError, match="and 30 more") as refused:
        load_model(big, {})
    assert str(refused.value).count("\n") == 11


def test_optimizer_state_that_does_not_fit_is_refused_by_name() -> None:
    model = Tiny()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1, seed=0)
    tensors, document = flatten_optimizer(optimizer, model)

    with pytest.raises(CheckpointError, match="state of AdamW, this run uses SGD"):
        restore_optimizer(SGD(model.parameters()), model, tensors, document)
    partial = AdamW([model.embedding.weight])
    with pytest.raises(CheckpointError, match=r"block\.0\.weight: checkpoint \[4, 4\], model has none"):
        restore_optimizer(partial, model, tensors, document)
    with pytest.raises(CheckpointError, match=r"block\.0\.weight: checkpoint has none, model \[4, 4\]"):
        restore_optimizer(optimizer, model, *flatten_optimizer(partial, model))
    wide = Tiny(8)
    with pytest.raises(CheckpointError, match=r"embedding\.weight: checkpoint \[6, 4\], model \[6, 8\]"):
        restore_optimizer(AdamW(wide.parameters()), wide, tensors, document)
    missing = {name: tensor for name, tensor in tensors.items() if name != "exp_avg_sq.block.0.bias"}
    with pytest.raises(CheckpointError, match=r"exp_avg_sq\.block\.0\.bias: missing in the checkpoint"):
        restore_optimizer(optimizer, model, missing, document)
    with pytest.raises(CheckpointError, match=r"exp_avg\.ghost: not expected"):
        restore_optimizer(optimizer, model, tensors | {"exp_avg.ghost": torch.zeros(1)}, document)
    with pytest.raises(CheckpointError, match="2 parameters of the optimizer are not the model's"):
        flatten_optimizer(AdamW(nn.Linear(2, 2).parameters()), model)


def test_the_docs_name_tensors_that_exist() -> None:
    model = build(ModelConfig(n_embd=8, n_layer=1, n_head=2), vocab_size=8, max_length=8)
    root = Path(__file__).parents[2]
    texts = [path.read_text() for path in (*root.glob("docs/**/*.md"), *root.glob("src/**/*.py"))]
    named = {name for text in texts for name in re.findall(r"\bblocks\.\d[\w.]*weight\b", text)}
    assert named
    assert named <= dict(model.named_parameters()).keys()
