"""The model as a whole: what it may see, what it returns, how it starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt_simple.config.schema import ModelConfig
from gpt_simple.errors import ConfigError
from gpt_simple.model.gpt import build

from .conftest import LENGTH, SHAPES, VOCAB, rows, tiny

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@shapes
def test_the_future_does_not_change_the_past(shape: dict[str, Any]) -> None:
    model, (ids, _) = tiny(**shape), rows()
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % VOCAB
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10], after[:, 10])


@shapes
def test_the_loss_is_the_sum_over_counted_labels(shape: dict[str, Any]) -> None:
    model, (ids, labels) = tiny(**shape), rows()
    loss = model(ids, labels)
    expected = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@shapes
def test_packed_documents_equal_documents_alone(shape: dict[str, Any]) -> None:
    model, (ids, _) = tiny(**shape), rows(batch=1)
    lengths = (7, 1, LENGTH - 8)
    packed = model(
        ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        document_ids=torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).unsqueeze(0),
    )
    alone = torch.cat([model(document) for document in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@shapes
def test_positions_matter(shape: dict[str, Any]) -> None:
    model = tiny(**shape)
    ids = torch.tensor([[5, 7, 9, 7]])
    swapped = torch.tensor([[7, 5, 9, 7]])
    assert not torch.allclose(model(ids)[0, 3], model(swapped)[0, 3], atol=1e-6)


def test_a_new_model_is_as_good_as_guessing() -> None:
    model, (ids, labels) = tiny(), rows(batch=8)
    loss = model(ids, labels) / (labels != -100).sum()
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.3)


def test_initial_deviations() -> None:
    model = tiny(n_embd=256, n_layer=8, use_bias=True, norm="layernorm")
    block = model.blocks[3]
    plain = math.sqrt(2 / (5 * 256))
    assert block.attention.query.weight.std().item() == pytest.approx(plain, rel=0.05)
    assert block.attention.output.weight.std().item() == pytest.approx(plain / 4, rel=0.05)
    assert block.mlp.down.weight.std().item() == pytest.approx(plain / 4, rel=0.05)
    assert model.token_embedding.weight.std().item() == pytest.approx(plain, rel=0.05)
    assert not block.mlp.up.bias.any()
    assert not block.mlp_norm.bias.any()
    assert (block.mlp_norm.weight == 1).all()


@shapes
def test_a_model_from_meta_has_the_same_weights(shape: dict[str, Any]) -> None:
    expected = tiny(**shape)
    with torch.device("meta"):
        model = tiny(**shape)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    ids, _ = rows()
    assert torch.equal(model(ids), expected(ids))


def test_weights_are_drawn_from_the_given_generator_alone() -> None:
    first, second = tiny(), tiny(seed=1)
    state = torch.get_rng_state()
    for model in (first, second):
        model.init_weights(torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_no_tensor_has_two_names_in_a_checkpoint() -> None:
    for tied in (True, False):
        model = tiny(tie_word_embeddings=tied)
        tensors = model.state_dict()
        assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
        assert ("head.weight" in tensors) is not tied
        assert set(tensors) == dict(model.named_parameters()).keys()  # position tables are not saved


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_residual_stream_has_the_dtype_that_is_asked_for(shape: str, checkpointed: bool) -> None:
    wide, narrow = (tiny(**SHAPES[shape], residual_in_fp32=fp32).train() for fp32 in (True, False))
    ids, labels = rows()
    losses, dtypes = {}, {}
    for name, model in (("wide", wide), ("narrow", narrow)):
        model.set_activation_checkpointing(int(checkpointed))
        seen = dtypes[name] = set[torch.dtype]()
        for block in model.blocks:
            block.register_forward_hook(lambda _, given, x, seen=seen: seen.update((given[0].dtype, x.dtype)))
            block.attention_norm.register_forward_hook(lambda _, given, x, seen=seen: seen.add(("norm", x.dtype)))
        with torch.autocast("cpu", torch.bfloat16):
            losses[name] = model(ids, labels)
        losses[name].backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert dtypes == {
        "wide": {torch.float32, ("norm", torch.float32)},
        "narrow": {torch.bfloat16, ("norm", torch.float32)},
    }
    assert losses["narrow"].item() == pytest.approx(losses["wide"].item(), rel=0.01)
    assert torch.equal(wide(ids), narrow(ids)), "without autocast there is nothing to choose"
    cached = narrow.eval().decode(ids, narrow.new_cache())
    torch.testing.assert_close(cached, narrow(ids)[:, -1])


def test_bf16_autocast_changes_the_loss_by_rounding_only() -> None:
    for shape in SHAPES.values():
        model, (ids, labels) = tiny(**shape), rows()
        with torch.autocast("cpu", torch.bfloat16):
            low = model(ids, labels)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, model(ids, labels), rtol=2e-3, atol=0)


@shapes
@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_no_gradient(shape: dict[str, Any], every: int) -> None:
    ids, labels = rows()
    gradients = []
    for checkpointing in (0, every):
        model = tiny(**shape, n_layer=3, dropout=0.2).train()
        model.set_activation_checkpointing(checkpointing)
        torch.manual_seed(1)
        model(ids, labels).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_activation_checkpointing_recomputes_every_kth_block() -> None:
    ids, labels = rows()
    model = tiny(n_layer=5).train()
    model.set_activation_checkpointing(2)
    calls = [0] * 5
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    model(ids, labels).backward()
    assert calls == [2, 1, 2, 1, 2]


def test_dropout_is_off_in_eval_and_on_in_training() -> None:
    model, (ids, _) = tiny(dropout=0.5), rows()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_a_row_longer_than_the_model_is_refused() -> None:
    ids, _ = rows(length=LENGTH + 1)
    with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens.*n_positions, {LENGTH}"):
        tiny()(ids)


def test_unset_sizes_come_from_the_caller_and_set_ones_win() -> None:
    unset = build(ModelConfig(n_embd=24, n_layer=1, n_head=2), vocab_size=50, max_length=9).shape
    assert (unset.vocab_size, unset.n_positions, unset.n_kv_head, unset.intermediate_size) == (50, 9, 2, 64)
    given = ModelConfig(n_embd=24, n_layer=1, n_head=2, vocab_size=64, n_positions=12, mlp_type="mlp")
    shape = build(given, vocab_size=50, max_length=9).shape
    assert (shape.vocab_size, shape.n_positions, shape.intermediate_size) == (64, 12, 96)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n_head": 5}, ["model.n_head is 5", "model.n_embd, 32", "4"]),
        ({"n_head": 8, "n_kv_head": 3}, ["model.n_kv_head is 3", "model.n_head, 8", "2"]),
        ({"n_embd": 12, "n_head": 4}, ["pairs", "learned"]),
        ({"n_positions": 8}, ["model.n_positions is 8", "data.max_length, 24"]),
        (
            {"n_head": 5, "n_kv_head": 3, "n_positions": 8},
            ["n_head is 5", "n_kv_head is 3", "n_positions is 8"],
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(fields: dict[str, int], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**fields)
    for text in named:
        assert text in str(error.value)
