"""What the tests of the model share: a tiny model of any shape, and random rows for it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_simple.config.schema import ModelConfig
from gpt_simple.model.gpt import GPT, build

VOCAB, LENGTH = 96, 24

SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "gpt2": {
        "norm": "layernorm",
        "position": "learned",
        "mlp_type": "mlp",
        "activation": "gelu",
        "use_bias": True,
    },
    "gqa": {"n_kv_head": 2, "qk_norm": True, "tie_word_embeddings": False},
    "mqa-ntk": {"n_kv_head": 1, "rope_scaling_type": "ntk", "rope_scaling_factor": 2.0, "activation": "relu"},
}


def tiny(seed: int = 0, **fields: Any) -> GPT:
    """A model of 2 blocks, 32 wide with 4 heads unless ``fields`` say otherwise, in eval mode."""
    torch.manual_seed(seed)
    config = ModelConfig(**{"n_embd": 32, "n_layer": 2, "n_head": 4, **fields})
    return build(config, vocab_size=VOCAB, max_length=LENGTH).eval()


def rows(batch: int = 2, length: int = LENGTH, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids and labels ``[batch, length]``; the first three labels of each row are not in the loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, :3] = -100
    return ids[:, :-1], labels


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="no C++ compiler"
)
