"""The same weights give the same logits as the reference implementations in ``transformers``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .conftest import LENGTH, VOCAB, rows, tiny

transformers = pytest.importorskip("transformers")


def randomise(model: nn.Module) -> None:
    """Weights large enough that every part of the model shows in the logits, norms and biases included."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def logits_of(reference: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = reference.eval()(input_ids=ids).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", [None, "linear", "ntk"])
def test_llama(n_kv_head: int, tied: bool, scaling: str | None) -> None:
    rope, trained = {"rope_type": scaling or "default", "rope_theta": 500.0, "factor": 3.0}, LENGTH
    if scaling == "ntk":  # theirs stretches by factor * length / trained - (factor - 1), which is 3 here
        rope, trained = {**rope, "rope_type": "dynamic", "factor": 2.0}, LENGTH // 2
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=n_kv_head,
            max_position_embeddings=trained,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
            tie_word_embeddings=tied,
        )
    )
    model = tiny(
        intermediate_size=40,
        n_kv_head=n_kv_head,
        tie_word_embeddings=tied,
        rope_base=500.0,
        rope_scaling_type=scaling,
        rope_scaling_factor=3.0,
    )
    randomise(model)
    theirs = {
        "token_embedding": reference.model.embed_tokens,
        "norm": reference.model.norm,
        "head": reference.lm_head,
    }
    for i, layer in enumerate(reference.model.layers):
        theirs |= {
            f"blocks.{i}.attention_norm": layer.input_layernorm,
            f"blocks.{i}.attention.query": layer.self_attn.q_proj,
            f"blocks.{i}.attention.key": layer.self_attn.k_proj,
            f"blocks.{i}.attention.value": layer.self_attn.v_proj,
            f"blocks.{i}.attention.output": layer.self_attn.o_proj,
            f"blocks.{i}.mlp_norm": layer.post_attention_layernorm,
            f"blocks.{i}.mlp.gate": layer.mlp.gate_proj,
            f"blocks.{i}.mlp.up": layer.mlp.up_proj,
            f"blocks.{i}.mlp.down": layer.mlp.down_proj,
        }
    for name, tensor in model.state_dict().items():
        theirs[name.removesuffix(".weight")].weight.copy_(tensor)
    ids, _ = rows()
    torch.testing.assert_close(model(ids), logits_of(reference, ids), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_gpt2() -> None:
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH)
    )
    model = tiny(norm="layernorm", position="learned", mlp_type="mlp", activation="gelu", use_bias=True)
    randomise(model)
    ours = model.state_dict()
    theirs = {
        "wte.weight": ours["token_embedding.weight"],
        "wpe.weight": ours["position_embedding.weight"],
        "ln_f.weight": ours["norm.weight"],
        "ln_f.bias": ours["norm.bias"],
    }
    for i in range(2):
        for kind in ("weight", "bias"):

            def get(name: str, i: int = i, kind: str = kind) -> Tensor:
                tensor = ours[f"blocks.{i}.{name}.{kind}"]
                return tensor.T if kind == "weight" else tensor  # GPT-2 keeps its matrices transposed

            theirs |= {
                f"h.{i}.ln_1.{kind}": ours[f"blocks.{i}.attention_norm.{kind}"],
                f"h.{i}.attn.c_attn.{kind}": torch.cat(
                    [get("attention.query"), get("attention.key"), get("attention.value")], dim=-1
                ),
                f"h.{i}.attn.c_proj.{kind}": get("attention.output"),
                f"h.{i}.ln_2.{kind}": ours[f"blocks.{i}.mlp_norm.{kind}"],
                f"h.{i}.mlp.c_fc.{kind}": get("mlp.up"),
                f"h.{i}.mlp.c_proj.{kind}": get("mlp.down"),
            }
    reference.transformer.load_state_dict(theirs)
    ids, _ = rows()
    torch.testing.assert_close(model(ids), logits_of(reference, ids), atol=1e-4, rtol=1e-4)
