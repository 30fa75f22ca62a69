"""The model component ``gpt``: a pre-norm decoder that covers the GPT-2 and the Llama shapes and what lies between.

In training it returns the summed loss and never logits: a wrapper of the model would copy those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt_simple.config.schema import ModelConfig
from gpt_simple.hooks.losses import Losses
from gpt_simple.model import flops
from gpt_simple.model.attention import Attention, LayerCache
from gpt_simple.model.documents import Kernel, document_kernel, document_mask
from gpt_simple.model.linear import Linear
from gpt_simple.model.loss import summed_cross_entropy, weighted_cross_entropy
from gpt_simple.model.rope import Rotation, rotary_tables
from gpt_simple.model.shape import Shape, resolve

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def build(config: ModelConfig, *, vocab_size: int, max_length: int) -> GPT:
    """The model of a configuration, initialised from torch's global generator.

    ``vocab_size`` is used unless ``config.vocab_size`` is set, ``max_length`` unless ``config.n_positions``
    is. Under ``torch.device("meta")`` nothing is allocated; ``to_empty(device=...)`` and ``init_weights()``
    then give the same weights. Raises ConfigError for sizes that do not fit together.
    """
    shape = resolve(config, vocab_size=vocab_size, max_length=max_length)
    device = torch.get_default_device()
    with torch.device("meta"):  # torch's own initialisation of every layer would be thrown away
        model = GPT(shape)
    if device.type != "meta":
        model.to_empty(device=device)
        model.init_weights()
    return model


class GPT(nn.Module):
    """Embedding, ``n_layer`` blocks, a last norm and the head. The head has no bias.

    Made by ``build``; a module constructed directly holds no values before ``init_weights``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.checkpoint_every = 0
        self.loss_function: Callable[[Tensor, Tensor, Tensor], Tensor] = summed_cross_entropy
        self.token_embedding = _embedding(shape.vocab_size, shape.n_embd)
        if shape.position == "learned":
            self.position_embedding = _embedding(shape.n_positions, shape.n_embd)
        else:
            for name in ("cos", "sin"):
                table = torch.empty(shape.n_positions, shape.head_dim // 2, dtype=torch.float32)
                self.register_buffer(name, table, persistent=False)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = _norm(shape)
        # A tied head is no module of its own: one tensor has one name in every checkpoint.
        self.head = None if shape.tied else nn.Linear(shape.n_embd, shape.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        hidden: bool = False,
        weights: Tensor | None = None,
    ) -> Tensor | Losses:
        """The summed loss if labels are given, else the logits, or with ``hidden`` what they are made of.

        All arguments are int64 ``[B, T]``. ``labels[b, t]`` is the token that follows ``input_ids[b, t]``
        (nothing is shifted here), or -100 for a position that is not in the loss. ``position_ids`` default to
        0..T-1. With ``document_ids``, attention stays between positions of one id. ``weights`` (float32 ``[B, T]``)
        are factors of the labels in the loss.

        Returns a 0-d float32 tensor, the cross-entropy in nats summed over the labels; with ``weights`` Losses, whose
        term ``weighted_loss`` alone is trained on; or logits ``[B, T, V]``; or the states after the last norm
        ``[B, T, C]``, whose product with ``head_weight`` gives logits.
        """
        mask = None
        if document_ids is not None:
            mask = document_mask(document_ids, self.document_kernel(document_ids.device))
        x, rotation = self._embed(input_ids, position_ids)
        for index, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.recomputes(index):
                x = checkpoint(
                    block,
                    x,
                    rotation,
                    mask,
                    use_reentrant=False,
                    preserve_rng_state=self.shape.dropout > 0,  # saving it costs a copy per block
                )
            else:
                x = block(x, rotation, mask)
        states: Tensor = self.norm(_in_weights_dtype(x, self.norm))
        if hidden:
            return states
        if labels is None:
            return F.linear(states, self.head_weight)
        if weights is not None:
            weighted, nats = weighted_cross_entropy(states, self.head_weight, labels, weights)
            return Losses(nats, {"weighted_loss": weighted}, weight=0.0)
        return self.loss_function(states, self.head_weight, labels)

    def decode(self, input_ids: Tensor, cache: list[LayerCache]) -> Tensor:
        """Logits ``[B, V]`` of the token that follows ``input_ids`` ``[B, T]``, given what the cache has seen.

        The first call takes the whole prompt, each later one a single token. A growing cache would compile the blocks
        again for every length.
        """
        start = cache[0].length
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x, rotation = self._embed(input_ids, positions)
        for block, layer in zip(self.blocks, cache, strict=True):
            x = block.decode(x, rotation, layer)  # type: ignore[operator]
        return F.linear(self.norm(_in_weights_dtype(x[:, -1], self.norm)), self.head_weight)

    def new_cache(self) -> list[LayerCache]:
        """An empty cache for ``decode``, with room for ``n_positions`` tokens."""
        return [LayerCache(self.n_positions) for _ in self.blocks]

    def _embed(self, input_ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Rotation | None]:
        """The residual stream ``[B, T, n_embd]`` at the first block, and the rotation of its positions."""
        length = input_ids.shape[1]
        if length > self.n_positions:
            raise ValueError(f"a row of {length} tokens is longer than the model's n_positions, {self.n_positions}")
        x: Tensor = self.token_embedding(input_ids)
        rotation = None
        if self.shape.position == "learned":
            table = self.position_embedding.weight
            x = x + (table[:length] if position_ids is None else F.embedding(position_ids, table))
        elif position_ids is None:
            rotation = self.cos[:length], self.sin[:length]
        else:
            rotation = self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)
        if not self.shape.residual_in_fp32:
            x = x.to(self._compute_dtype(x.device))
        return F.dropout(x, self.shape.dropout, self.training) if self.shape.dropout else x, rotation

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of matrix products on this device, in the autocast of the caller."""
        is_cast = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if is_cast else self.token_embedding.weight.dtype

    def document_kernel(self, device: torch.device) -> Kernel:
        """What keeps the documents of a row apart on this device and in the autocast of the caller."""
        dtype = self._compute_dtype(device)
        kernel: Kernel = document_kernel(device, dtype, self.shape.head_dim, self.shape.dropout)
        return kernel

    @property
    def n_positions(self) -> int:
        """The longest row that the model can read."""
        return self.shape.n_positions

    @property
    def head_weight(self) -> Tensor:
        """The matrix ``[V, n_embd]`` that makes logits: the head's own, or the embedding's if tied."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Give every parameter and table its starting value.

        Matrices are normal with deviation sqrt(2 / (5 n_embd)) (Nguyen & Salazar 2019, "Transformers without Tears"):
        0.023 at a width of 768, and enough for narrow models to learn to copy. The two that write into the residual
        stream of each block have 1 / sqrt(2 n_layer) of it, so that the stream's variance does not grow with depth
        (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"). Biases are 0, norms 1. Rows that
        pad the vocabulary are drawn like the others: training pushes their logits down, and no id selects them.
        """
        plain_std = math.sqrt(2 / (5 * self.shape.n_embd))
        residual_std = plain_std / math.sqrt(2 * self.shape.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = residual_std if name.endswith((".output", ".down")) else plain_std
                module.weight.normal_(0.0, std, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        if self.shape.position == "rope":
            cos, sin = rotary_tables(self.shape)
            self.cos.copy_(cos)
            self.sin.copy_(sin)

    def set_loss_function(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Compute the loss with ``loss(hidden [B, T, C], head_weight [V, C], labels [B, T])``, summed, in nats."""
        self.loss_function = loss

    def set_activation_checkpointing(self, every: int) -> None:
        """Recompute the activations of every ``every``-th block in the backward pass; 0: of none."""
        self.checkpoint_every = every

    def recomputes(self, index: int) -> bool:
        """Whether the backward pass computes the activations of this block again."""
        return self.checkpoint_every > 0 and index % self.checkpoint_every == 0

    def num_parameters(self, non_embedding: bool = False) -> int:
        """Parameters of the model; ``non_embedding`` leaves out both embedding tables, so a tied head too."""
        return flops.parameter_count(self.shape, non_embedding=non_embedding)

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of a token's forward and backward pass; see ``model.flops``."""
        return flops.flops_per_token(self.shape, seq_len)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.attention_norm = _norm(shape)
        self.attention = Attention(shape)
        self.mlp_norm = _norm(shape)
        self.mlp = MLP(shape)

    def forward(
        self, x: Tensor, rotation: Rotation | None, mask: Tensor | BlockMask | None, cache: LayerCache | None = None
    ) -> Tensor:
        """``[B, T, n_embd]`` to the same shape; see ``Attention.forward`` for the other arguments."""
        normed = self.attention_norm(_in_weights_dtype(x, self.attention_norm))
        x = x + self._drop(self.attention(normed, rotation, mask, cache))
        return x + self._drop(self.mlp(self.mlp_norm(_in_weights_dtype(x, self.mlp_norm))))

    def decode(self, x: Tensor, rotation: Rotation | None, cache: LayerCache) -> Tensor:
        """``forward`` after what ``cache`` has seen, as written, also when the block is compiled."""
        return self.forward(x, rotation, None, cache)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class MLP(nn.Module):
    """``down(act(up(x)))``, or gated: ``down(act(gate(x)) * up(x))``.

    The gated form is Shazeer's ("GLU Variants Improve Transformer", 2020).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[shape.activation]
        width, hidden = shape.n_embd, shape.intermediate_size
        self.gate = Linear(width, hidden, bias=shape.mlp_bias) if shape.gated else None
        self.up = Linear(width, hidden, bias=shape.mlp_bias)
        self.down = Linear(hidden, width, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, n_embd]`` to the same shape."""
        up = self.up(x)
        hidden = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        projected: Tensor = self.down(hidden)
        return projected


def _gelu(x: Tensor) -> Tensor:
    """The tanh form, as GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "gelu": _gelu, "relu": F.relu}


def _embedding(rows: int, width: int) -> nn.Embedding:
    """A table without values: torch's own initialisation, on the meta device, would load its compiler."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def _in_weights_dtype(x: Tensor, norm: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """A norm adds up squares, in fp32 however narrow the residual stream is. What has the dtype is not copied."""
    return x.type_as(norm.weight)


def _norm(shape: Shape) -> nn.LayerNorm | nn.RMSNorm:
    if shape.norm == "layernorm":
        return nn.LayerNorm(shape.n_embd, shape.norm_eps, bias=shape.norm_bias)
    return nn.RMSNorm(shape.n_embd, shape.norm_eps)
