"""The shape of a model: its configuration with every unset field filled in.

The defaults that depend on other fields and the combinations that cannot be built are defined here. Needs no torch.
"""

from __future__ import annotations

from typing import Literal

from attrs import fields_dict, frozen

from gpt_simple.config.schema import ModelConfig
from gpt_simple.errors import ConfigError, Problem

VOCABULARY_MULTIPLE = 128


def padded(vocab_size: int) -> int:
    """Rows of the embedding for a tokenizer of so many ids: whole tiles of a GPU's matrix units."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@frozen
class Shape:
    """Every number and choice that determines the model. Fields are named as in ``ModelConfig``."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    intermediate_size: int
    activation: Literal["swish", "gelu", "relu"]
    gated: bool
    norm: Literal["rmsnorm", "layernorm"]
    norm_eps: float
    norm_bias: bool
    qkv_bias: bool
    attn_out_bias: bool
    mlp_bias: bool
    tied: bool
    qk_norm: bool
    residual_in_fp32: bool
    dropout: float
    position: Literal["rope", "learned"]
    rope_base: float
    rope_scaling_type: Literal["linear", "ntk"] | None
    rope_scaling_factor: float


def resolve(config: ModelConfig, *, vocab_size: int, max_length: int) -> Shape:
    """Fill in what the configuration leaves unset.

    ``vocab_size`` (ids, padded as the caller likes) and ``max_length`` (tokens) stand in for ``model.vocab_size`` and
    ``model.n_positions``. Raises ConfigError, one line per mistake, for sizes that do not fit together.
    """
    n_kv_head = config.n_kv_head or config.n_head
    n_positions = config.n_positions or max_length
    gated = config.mlp_type == "gated"
    head_dim, rest = divmod(config.n_embd, config.n_head)
    mistakes = []
    if rest:
        mistakes.append(
            f"model.n_head is {config.n_head} and does not divide model.n_embd, {config.n_embd}: "
            f"choose a divisor, such as {_nearest_divisor(config.n_embd, config.n_head)}"
        )
    elif config.position == "rope" and head_dim % 2:
        mistakes.append(
            f"model.n_embd / model.n_head is {head_dim}, but rotary positions turn pairs: "
            'choose sizes with an even quotient, or model.position = "learned"'
        )
    if config.n_head % n_kv_head:
        mistakes.append(
            f"model.n_kv_head is {n_kv_head} and does not divide model.n_head, {config.n_head}: "
            f"choose a divisor, such as {_nearest_divisor(config.n_head, n_kv_head)}"
        )
    if n_positions < max_length:
        mistakes.append(
            f"model.n_positions is {n_positions}, shorter than data.max_length, {max_length}: "
            "raise it, leave it unset, or shorten the rows"
        )
    if mistakes:
        raise ConfigError(*(Problem(None, "", mistake) for mistake in mistakes))

    def bias(own: bool | None) -> bool:
        return config.use_bias if own is None else own

    unchanged = {name: getattr(config, name) for name in fields_dict(Shape) if hasattr(config, name)}
    resolved = {
        "vocab_size": config.vocab_size or vocab_size,
        "n_positions": n_positions,
        "n_kv_head": n_kv_head,
        "head_dim": head_dim,
        "intermediate_size": config.intermediate_size or _default_intermediate_size(config.n_embd, gated),
        "gated": gated,
        "norm_bias": config.norm == "layernorm" and config.use_bias,
        "qkv_bias": bias(config.qkv_bias),
        "attn_out_bias": bias(config.attn_out_bias),
        "mlp_bias": bias(config.mlp_bias),
        "tied": config.tie_word_embeddings,
    }
    return Shape(**unchanged | resolved)


def _default_intermediate_size(n_embd: int, gated: bool) -> int:
    """A gated MLP has three matrices where a plain one has two: at 2/3 of 4 n_embd it costs the same."""
    return -(-8 * n_embd // (3 * 64)) * 64 if gated else 4 * n_embd


def _nearest_divisor(number: int, target: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - target))
