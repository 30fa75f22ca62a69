"""Parameters and operations in closed form, against the real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt_simple.config.schema import ModelConfig
from gpt_simple.model.gpt import build

flags = st.booleans()
fields = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 3),
        "use_bias": flags,
        "qkv_bias": st.none() | flags,
        "attn_out_bias": st.none() | flags,
        "mlp_bias": st.none() | flags,
        "activation": st.sampled_from(["swish", "gelu", "relu"]),
        "mlp_type": st.sampled_from(["gated", "mlp"]),
        "intermediate_size": st.none() | st.integers(1, 50),
        "norm": st.sampled_from(["rmsnorm", "layernorm"]),
        "tie_word_embeddings": flags,
        "rope_scaling_type": st.sampled_from([None, "linear", "ntk"]),
        "position": st.sampled_from(["rope", "learned"]),
        "qk_norm": flags,
        "n_positions": st.none() | st.integers(16, 40),
    }
)
heads = st.sampled_from([(1, None), (4, None), (4, 2), (4, 1), (6, 3)])


@settings(max_examples=60, deadline=None)
@given(
    fields=fields,
    heads=heads,
    half_dim=st.integers(1, 8),
    vocab=st.integers(1, 200),
    length=st.integers(1, 16),
)
def test_closed_forms_equal_the_model(
    fields: dict[str, Any], heads: tuple[int, int | None], half_dim: int, vocab: int, length: int
) -> None:
    n_head, n_kv_head = heads
    config = ModelConfig(n_embd=n_head * 2 * half_dim, n_head=n_head, n_kv_head=n_kv_head, **fields)
    with torch.device("meta"):
        model = build(config, vocab_size=vocab, max_length=16)
        ids = torch.zeros(2, length, dtype=torch.long)
    tables = [model.token_embedding] + ([model.position_embedding] if config.position == "learned" else [])
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters() - model.num_parameters(non_embedding=True) == sum(
        table.weight.numel() for table in tables
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(ids)
        assert 3 * counter.get_total_flops() == model.flops_per_token(length) * ids.numel()
        logits.sum().backward()
    assert counter.get_total_flops() == model.flops_per_token(length) * ids.numel()


def test_the_loss_in_chunks_costs_what_the_closed_form_says() -> None:
    model = build(ModelConfig(n_embd=16, n_layer=1, n_head=2), vocab_size=70, max_length=8)
    ids = torch.zeros(2, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).backward()
    assert counter.get_total_flops() == model.flops_per_token(8) * ids.numel()


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_published_sizes_of_gpt2(n_layer: int, n_head: int, n_embd: int, parameters: int) -> None:
    config = ModelConfig(
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        norm="layernorm",
        position="learned",
        mlp_type="mlp",
        activation="gelu",
        use_bias=True,
    )
    with torch.device("meta"):
        model = build(config, vocab_size=50_257, max_length=1024)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_parameters() == parameters
