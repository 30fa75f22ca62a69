"""A model sharded over processes: its weights are those of an unsharded one, and a process holds its slices only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt_simple.checkpoint.sharded import local_part, whole
from gpt_simple.config.schema import ModelConfig
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.distributed.sharding import shard
from gpt_simple.model.gpt import build
from gpt_simple.plugins.memory import start_counting, stop_counting
from tests.launch.conftest import Ranks

SIZES: dict[str, Any] = {"n_embd": 36, "n_layer": 3, "n_head": 2, "position": "learned", "use_bias": True}
"""Four processes divide neither the width of 36, but for its matrices, nor a vocabulary of 131."""


def model(**sizes: Any) -> nn.Module:
    torch.manual_seed(7)
    return build(ModelConfig(**SIZES | sizes), vocab_size=131, max_length=30)


def sharded(unsharded: nn.Module, group: ProcessGroup) -> nn.Module:
    """``unsharded``, which is on the meta device, as a run builds it."""
    assert group.mesh is not None
    torch.manual_seed(7)
    shard(unsharded, unsharded.init_weights, group.mesh, group.device, None)  # type: ignore[arg-type]
    return unsharded


def on_meta(**sizes: Any) -> nn.Module:
    with torch.device("meta"):
        return model(**sizes)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_an_unsharded_run_to_the_bit(ranks: Ranks, tied: bool) -> None:
    """And a process never holds more than its slices and one whole tensor, in measured bytes."""
    sizes = {"tie_word_embeddings": tied}
    expected = dict(model(**sizes).named_parameters())

    def work(rank: int) -> list[Any]:
        unsharded = on_meta(**sizes)
        group = ProcessGroup.join(30.0).sharding(None, 30.0)
        start_counting()
        built = sharded(unsharded, group)
        held = stop_counting()
        found = dict(built.named_parameters())
        assert list(found) == list(expected)
        different = [name for name in found if not torch.equal(whole(found[name]), expected[name])]
        # FSDP pads each slice to the size of the largest.
        slices = sum(-(-p.shape[0] // 4) * p[0].numel() * p.itemsize for p in expected.values())
        own = sum(local_part(parameter).nbytes for parameter in found.values())
        return [different, held - slices, own / sum(p.nbytes for p in expected.values())]

    largest = max(parameter.nbytes for parameter in expected.values())
    for different, beyond, share in ranks(4, work):
        assert different == []
        assert beyond <= largest
        assert share == pytest.approx(0.25, rel=0.05)


class Plain(nn.Module):
    """A model of a plugin: its head is its embedding, and its values are set in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(5))

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            block.reset_parameters()  # type: ignore[operator]
            nn.init.orthogonal_(block.weight)  # type: ignore[arg-type]
        with torch.no_grad():
            self.embedding.weight[3].fill_(0.5)  # it was let go of meanwhile
            self.head.weight.data.mul_(2.0)
            self.blocks[0].weight.copy_(self.blocks[1].weight)
        self.scale.copy_(torch.rand(5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def test_any_way_to_set_values_gives_the_same_bits(ranks: Ranks) -> None:
    expected = Plain()
    torch.manual_seed(7)
    expected.init_weights()

    def work(rank: int) -> list[str]:
        with torch.device("meta"):
            unsharded = Plain()
        built = sharded(unsharded, ProcessGroup.join(30.0).sharding(None, 30.0))
        assert built.head.weight is built.embedding.weight, "tied as before"
        pairs = zip(built.state_dict().items(), expected.state_dict().values(), strict=True)
        return [name for (name, found), value in pairs if not torch.equal(whole(found), value)]

    assert ranks(3, work) == [[]] * 3
