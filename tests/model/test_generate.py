"""Text generation: the cache changes nothing, and nothing outside is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt_simple.model.generate import draw, generate

from .conftest import LENGTH, SHAPES, VOCAB, tiny


class Letters:
    """A tokenizer with fewer ids than the model: id n is the character n + 32, and 0 ends a document."""

    eod_id = 0

    def __init__(self, vocab_size: int = 90) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 32 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        assert all(i < self.vocab_size for i in ids)
        return "".join(chr(i + 32) for i in ids)


class Uncached(nn.Module):
    """Any model that is not ours: it has nothing but ``forward``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids)
        return logits


def sample(model: nn.Module, prompt: str = "Once", **options: Any) -> str:
    options = {"max_new_tokens": 12, "stop_at_eod": False, **options}
    return generate(model, Letters(), prompt, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_logits_with_a_cache_equal_those_without(shape: dict[str, Any]) -> None:
    model = tiny(**shape)
    ids = torch.randint(0, VOCAB, (3, LENGTH))
    expected = model(ids)
    cache = model.new_cache()
    torch.testing.assert_close(model.decode(ids[:, :5], cache), expected[:, 4], atol=1e-5, rtol=1e-5)
    for t in range(5, LENGTH):
        step = model.decode(ids[:, t : t + 1], cache)
        torch.testing.assert_close(step, expected[:, t], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("new", [5, 3 * LENGTH])
def test_cached_text_equals_uncached_also_beyond_the_context(new: int) -> None:
    model = tiny()
    with_cache = sample(model, max_new_tokens=new, temperature=5.0)
    assert len(with_cache) == 4 + new
    assert with_cache == sample(Uncached(model), max_new_tokens=new, temperature=5.0, context=LENGTH)


def test_a_prompt_longer_than_the_context_is_continued() -> None:
    prompt = "x" * (2 * LENGTH)
    assert len(sample(tiny(), prompt)) == 2 * LENGTH + 12


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model = tiny()
    state = torch.get_rng_state()
    first = sample(model, temperature=5.0, seed=1)
    torch.rand(3)
    torch.set_rng_state(state)
    assert first == sample(model, temperature=5.0, seed=1)
    assert first != sample(model, temperature=5.0, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_generate_runs_in_eval_mode_and_restores_the_mode() -> None:
    model = tiny(dropout=0.9).train()
    assert sample(model, temperature=0) == sample(model, temperature=0)
    assert model.training


def test_rows_that_pad_the_vocabulary_are_never_drawn() -> None:
    model = tiny(tie_word_embeddings=False, norm="layernorm", use_bias=True)
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
        model.norm.weight.zero_()
        model.head.weight[90:] = 10.0  # the model wants nothing but padding
    assert len(sample(model)) == 16
    assert len(sample(model, temperature=0)) == 16


def test_the_end_of_the_document_ends_the_text() -> None:
    model = tiny(tie_word_embeddings=False, norm="layernorm", use_bias=True)
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
        model.norm.weight.zero_()
        model.head.weight[0] = 10.0
    assert sample(model, stop_at_eod=True) == "Once"
    assert sample(model, stop_at_eod=False) == "Once" + 12 * " "


def test_sampling_runs_compiled_blocks_as_written() -> None:
    model = tiny()
    for block in model.blocks:
        block.compile(backend=lambda *_: pytest.fail("sampling compiled a block"))
    sample(model)


def drawn(logits: list[float], **options: Any) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, **options}
    return {draw(torch.tensor(logits), generator, **options) for _ in range(300)}


def test_draw() -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().tolist()
    assert drawn(logits) == {0, 1, 2, 3}
    assert drawn(logits, temperature=0) == {0}
    assert drawn(logits, temperature=0.01) == drawn([90.0, 89.0], temperature=1e-40) == {0}
    assert drawn(logits, top_k=2) == {0, 2}
    assert drawn(logits, top_k=100) == {0, 1, 2, 3}
    assert drawn(logits, top_p=0.69) == {0, 2}
    assert drawn(logits, top_p=0.71) == {0, 2, 3}
    assert drawn(logits, top_p=0.0) == {0}
