"""The quick way of encoding gives the ids of the `tokenizers` library, or is not taken."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.encoder import tiktoken_encoding
from gpt_simple.data.sources import stories
from gpt_simple.data.tokenizer import JsonTokenizer, bpe

WORDS = [
    "the",
    "cat",
    " ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "'s",
    "'ll",
    "'S",
    "é",
    "東京",
    "12",
    "½",
    "\r\n",
    "\u00a0",
    "\u0085",
    "_",
]


@pytest.fixture(scope="module")
def tokenizer() -> JsonTokenizer:
    rng = random.Random(1)
    texts = [document.text for document in stories.Stories(1, 300).documents()]
    mixed = ["".join(rng.choices(WORDS, k=300)) for _ in range(30)]
    made = bpe(evolve(DataConfig(), tokenizer_vocab_size=800), lambda: iter(texts + mixed))
    assert isinstance(made, JsonTokenizer)
    return made


@pytest.fixture(scope="module")
def spec(tokenizer: JsonTokenizer) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    return parsed


def reference(tokenizer: JsonTokenizer, texts: list[str]) -> list[list[int]]:
    return [one.ids for one in tokenizer.backend.encode_batch(texts, add_special_tokens=False)]


def test_every_character_in_every_surrounding(tokenizer: JsonTokenizer) -> None:
    characters = [
        chr(c)
        for c in range(sys.maxunicode + 1)
        if (c < 0x400 or 0x2000 <= c < 0x2070 or c % 61 == 0) and not 0xD800 <= c < 0xE000
    ]
    texts = [f"a{c}b {c} 1{c}{c}2'{c}  {c}\n{c}" for c in characters]
    assert tokenizer.encode_batch(texts) == reference(tokenizer, texts)


def test_random_text(tokenizer: JsonTokenizer) -> None:
    rng = random.Random(2)
    texts = ["".join(rng.choices(WORDS, k=rng.randrange(200))) for _ in range(300)]
    texts += ["".join(chr(rng.randrange(1, 0xD800)) for _ in range(100)) for _ in range(100)]
    texts += [" " * 5000, "a" * 5000 + "b", "\n \n" * 999, "<|endoftext|>", ""]
    assert tokenizer.encode_batch(texts) == reference(tokenizer, texts)


def _swap(spec: dict[str, Any]) -> None:
    vocab, (first, second) = spec["model"]["vocab"], ["".join(merge) for merge in spec["model"]["merges"][:2]]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _other_halves(spec: dict[str, Any]) -> None:
    merges = spec["model"]["merges"]
    i = next(i for i, (a, b) in enumerate(merges) if len(a) > 1 and len(b) == 1 and [a[-1], b] not in merges)
    merges[i] = [merges[i][0][0], merges[i][0][1:] + merges[i][1]]


def _orphan(spec: dict[str, Any]) -> None:
    del spec["model"]["merges"][-1]


def _ignore_merges(spec: dict[str, Any]) -> None:
    spec["model"]["ignore_merges"] = True


@pytest.mark.parametrize("change", [_swap, _other_halves, _orphan, _ignore_merges])
def test_merges_that_ranks_cannot_express_use_the_library(
    change: Callable[[dict[str, Any]], None], spec: dict[str, Any]
) -> None:
    assert tiktoken_encoding(spec) is not None
    changed = json.loads(json.dumps(spec))
    change(changed)
    assert tiktoken_encoding(changed) is None
