"""The content of a checkpoint is whole on the main process, whatever part each process has of it."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load, save
from torch.optim import AdamW

from gpt_simple.checkpoint.sharded import local_part, sharded_like
from gpt_simple.checkpoint.state import (
    flatten_optimizer,
    load_model,
    model_tensors,
    restore_optimizer,
)
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.distributed.state_gathering import gather_state
from tests.distributed.test_sharding import model, on_meta, sharded
from tests.launch.conftest import Ranks


def train(built: torch.nn.Module) -> AdamW:
    """One step on the same rows in every process."""
    optimizer = AdamW(built.parameters(), lr=0.1, fused=True)
    ids = torch.arange(60).reshape(2, 30)
    built(ids, ids).backward()
    optimizer.step()
    return optimizer


def test_what_is_sharded_is_written_as_if_it_were_not(ranks: Ranks) -> None:
    alone = model()
    moments, document = flatten_optimizer(train(alone), alone)
    expected = {"model": model_tensors(alone), "optimizer": moments}

    def work(rank: int) -> list[Any]:
        unsharded = on_meta()
        group = ProcessGroup.join(30.0).sharding(None, 30.0)
        built = sharded(unsharded, group)
        tensors, written = flatten_optimizer(train(built), built)
        gathered = gather_state(group, {"model": model_tensors(built), "optimizer": tensors})
        assert written == document
        if not group.is_main:
            return [rank, gathered]
        for stem, group_of in expected.items():
            assert gathered[stem].keys() == group_of.keys()
            for name, tensor in group_of.items():
                torch.testing.assert_close(gathered[stem][name], tensor, rtol=1e-5, atol=1e-7)
                assert type(gathered[stem][name]) is torch.Tensor
        return [rank, {}]

    assert ranks(3, work) == [[0, {}], [1, {"model": {}, "optimizer": {}}], [2, {"model": {}, "optimizer": {}}]]


def test_a_whole_checkpoint_is_restored_in_parts(ranks: Ranks) -> None:
    alone = model()
    optimizer = train(alone)
    moments, document = flatten_optimizer(optimizer, alone)
    weights, state = save(model_tensors(alone)), save(moments)

    def work(rank: int) -> list[str]:
        unsharded = on_meta()
        group = ProcessGroup.join(30.0).sharding(None, 30.0)
        built = sharded(unsharded, group)
        own = AdamW(built.parameters(), lr=0.1, fused=True)
        load_model(built, load(weights))
        restore_optimizer(own, built, load(state), document)
        found = {**model_tensors(built), **flatten_optimizer(own, built)[0]}
        pairs = [(name, tensor, {**load(weights), **load(state)}[name]) for name, tensor in found.items()]
        parts = [(name, part, local_part(sharded_like(part, tensor))) for name, part, tensor in pairs]
        return [name for name, part, own_part in parts if not torch.equal(local_part(part), own_part)]

    assert ranks(2, work) == [[], []]


def test_a_sharded_tensor_of_some_processes_is_refused(ranks: Ranks) -> None:
    """A gather of it would wait for ever."""

    def work(rank: int) -> None:
        unsharded = on_meta()
        group = ProcessGroup.join(30.0).sharding(None, 30.0)
        own = next(sharded(unsharded, group).parameters()).detach().clone()
        gather_state(group, {"plugins": {"watch/shadow": own} if rank == 1 else {}})

    main, other = ranks(2, work)
    assert (main["error"], main["code"], main["silent"]) == ("PluginError", 5, False)
    assert "watch/shadow of plugins is sharded over the processes" in main["text"]
    assert (other["error"], other["code"], other["silent"]) == ("RankFailed", 5, True)
