"""Text from a model, for the samples of a run and for people.

Drawing uses a generator of its own on the host: a sample depends on its seed alone and leaves the random
numbers of a training run untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gpt_simple.model.gpt import GPT

if TYPE_CHECKING:
    from gpt_simple.hooks.batch import Tokenizer
    from gpt_simple.model.attention import LayerCache


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
    stop_at_eod: bool = True,
    context: int | None = None,
    forward: Callable[..., Tensor] | None = None,
    agree: Callable[[int], int] | None = None,
) -> str:
    """The prompt and what the model says next, as the start of a document.

    ``temperature`` 0 takes the likeliest token. ``top_k`` keeps the k likeliest, ``top_p`` the fewest that
    together hold that probability; None keeps all. Ids that the tokenizer does not have are never drawn.
    ``context`` is how many tokens the model can read, by default its ``n_positions`` if it has that
    attribute; text that outgrows it goes on from its newest half.

    Any model whose ``forward(input_ids)`` returns logits ``[B, T, V]`` will do; ``GPT`` is run with a cache.
    ``forward`` replaces the call of any other model. ``agree`` returns the token to go on with for the one that was
    drawn, where several processes generate together. Runs in the caller's autocast, in eval mode, and leaves the
    model in the mode it found.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.eod_id, *tokenizer.encode(prompt)]  # in the training data every document follows an EOD
    reader = _Reader(model, context, forward or model)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = reader.next_logits(ids)[: tokenizer.vocab_size].float().cpu()
            token = draw(logits, generator, temperature=temperature, top_k=top_k, top_p=top_p)
            if agree is not None:
                token = agree(token)
            if stop_at_eod and token == tokenizer.eod_id:
                break
            ids.append(token)
    finally:
        model.train(was_training)
    return tokenizer.decode(ids[1:])


def draw(
    logits: Tensor,
    generator: torch.Generator,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """One id from logits ``[V]`` on the host; ``generate`` says what the parameters mean."""
    if temperature == 0:
        return int(logits.argmax())
    likeliest, ids = logits.topk(min(top_k or len(logits), len(logits)))
    # Less the largest, or a small temperature would make infinities, and NaN of their softmax.
    probabilities = ((likeliest - likeliest[0]) / temperature).softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        before[0] = -1.0  # the likeliest token stays, whatever top_p
        probabilities = probabilities.where(before < top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


class _Reader:
    """A model reading a text that grows by a token at a time, through a window once it has grown too long."""

    def __init__(self, model: nn.Module, context: int | None, forward: Callable[..., Tensor]) -> None:
        self.model, self.forward = model, forward
        self.device = next(model.parameters()).device
        self.context = context or getattr(model, "n_positions", None)
        self.start = 0
        self.cache: list[LayerCache] | None = None

    def next_logits(self, ids: list[int]) -> Tensor:
        """Logits ``[V]`` of the token after ``ids``, which are those of the last call and one more."""
        if self.context is not None and len(ids) - self.start > self.context:
            self.start = len(ids) - max(1, self.context // 2)
            self.cache = None
        if not isinstance(self.model, GPT):
            return self.forward(self._tensor(ids[self.start :]))[0, -1]
        if self.cache is None:
            self.cache = self.model.new_cache()
            return self.model.decode(self._tensor(ids[self.start :]), self.cache)[0]
        return self.model.decode(self._tensor(ids[-1:]), self.cache)[0]

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.device)
