"""How many parameters a model has and how many floating-point operations a token costs, in closed form.

Both follow from the shape alone: neither a model nor torch is needed.
"""

from __future__ import annotations

from gpt_simple.model.shape import Shape


def parameter_count(shape: Shape, *, non_embedding: bool = False) -> int:
    """Parameters of the model. ``non_embedding`` leaves out both embedding tables, so a tied head as well."""
    norm = shape.n_embd * (1 + shape.norm_bias)
    width, kv_width = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    biases = (
        shape.qkv_bias * (width + 2 * kv_width)
        + shape.attn_out_bias * shape.n_embd
        + shape.mlp_bias * (shape.n_embd + (1 + shape.gated) * shape.intermediate_size)
    )
    block = _block_matrices(shape) + biases + 2 * norm + shape.qk_norm * 2 * shape.head_dim
    matrix = shape.vocab_size * shape.n_embd
    count = shape.n_layer * block + norm + (0 if shape.tied else matrix)
    if non_embedding:
        return count
    return count + matrix + (shape.n_positions * shape.n_embd if shape.position == "learned" else 0)


def tensor_count(shape: Shape) -> int:
    """Number of parameter tensors: what a checkpoint has entries for, and an optimizer states."""
    norm, hidden = 1 + shape.norm_bias, 2 + shape.gated
    biases = 3 * shape.qkv_bias + shape.attn_out_bias + hidden * shape.mlp_bias
    block = 4 + hidden + biases + 2 * norm + 2 * shape.qk_norm
    return shape.n_layer * block + norm + 1 + (shape.position == "learned") + (not shape.tied)


def flops_per_token(shape: Shape, seq_len: int) -> float:
    """Floating-point operations of one token's forward and backward pass in rows of ``seq_len`` tokens.

    A multiply-add is two operations, and the backward pass costs twice the forward: three times the forward in all, 6
    per matrix element. Causal attention is counted **in full**, as if no score were masked (the convention of PaLM,
    Chowdhery et al. 2022, appendix B, and of torch's own counter). Recomputation under activation checkpointing is not
    counted: it is no progress. Norms, rotations, activations and the softmax are left out.
    """
    scores_and_values = 2 * shape.n_layer * seq_len * shape.n_head * shape.head_dim
    matrices = shape.n_layer * _block_matrices(shape) + shape.vocab_size * shape.n_embd
    return 3.0 * 2.0 * (matrices + scores_and_values)


def _block_matrices(shape: Shape) -> int:
    """Elements of the weight matrices of one block."""
    width, kv_width = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    attention = shape.n_embd * (2 * width + 2 * kv_width)
    return attention + (2 + shape.gated) * shape.n_embd * shape.intermediate_size
