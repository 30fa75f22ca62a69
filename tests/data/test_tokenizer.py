"""Text to ids and back, training, files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve

from gpt_simple.config.schema import DataConfig
from gpt_simple.data import tokenizer as module
from gpt_simple.data.tokenize import encode_documents
from gpt_simple.data.tokenizer import JsonTokenizer, bpe, load_tokenizer
from gpt_simple.data.tokenizer import bytes as byte_tokenizer
from gpt_simple.errors import DataError
from gpt_simple.hooks.batch import Tokenizer
from tests.tokenizers import EXACT, INEXACT, saved, word_piece
from tests.tokenizers import TEXTS as FOREIGN_TEXTS
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXTS = [
    "the cat sat on the mat, the cat sat.",
    "naïve café 東京 🙂\n\n\tdef f(x):\n    return x",
    "a\u0000b\r\n \x1f z",
]


def texts() -> Iterator[str]:
    return iter(TEXTS * 3)


def trained(size: int = 300) -> Tokenizer:
    return bpe(evolve(DataConfig(), tokenizer_vocab_size=size), texts)


def the_bytes() -> Tokenizer:
    return byte_tokenizer(DataConfig(), texts)


@pytest.mark.parametrize("make", [trained, the_bytes])
@pytest.mark.parametrize("text", [*TEXTS, "", "<|endoftext|>", "x<|endoftext|>y"])
def test_text_comes_back_and_never_is_the_end_of_a_document(make: type, text: str) -> None:
    tokenizer: Tokenizer = make()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_id not in ids
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_what_stands_for_no_text_is_replaced_in_a_prompt() -> None:
    tokenizer = trained()
    assert tokenizer.decode(tokenizer.encode("the cat\udcff sat")) == "the cat\ufffd sat"


def test_bpe_is_shorter_than_bytes_and_its_size_is_a_limit() -> None:
    assert len(trained().encode(TEXTS[0])) < len(TEXTS[0])
    assert trained(300).vocab_size == 300
    assert trained(5000).vocab_size < 5000


def test_bytes_are_one_id_each() -> None:
    tokenizer = the_bytes()
    assert tokenizer.vocab_size == 257
    assert [len(tokenizer.encode(text)) for text in TEXTS] == [len(text.encode()) for text in TEXTS]
    assert tokenizer.token_bytes().tolist() == [0] + [1] * 256
    # The quick way for bytes gives what the general one gives.
    assert tokenizer.encode_batch(TEXTS) == [
        tokenizer.backend.encode(text).ids
        for text in TEXTS  # type: ignore[attr-defined]
    ]


def foreign() -> Tokenizer:
    """One that only the `tokenizers` library encodes with."""
    spec = json.loads(trained().backend.to_str())  # type: ignore[attr-defined]
    spec["normalizer"] = {"type": "Lowercase"}
    return JsonTokenizer("foreign", Backend.from_str(json.dumps(spec)), 0)


@pytest.mark.parametrize("make", [trained, the_bytes, foreign])
@pytest.mark.parametrize("threads", ["true", "false"])
def test_documents_in_one_array_are_the_ids_of_each_and_its_end(
    make: type, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
    monkeypatch.setattr(module, "PIECE", 5)
    tokenizer: JsonTokenizer = make()
    documents = [*TEXTS, "x<|endoftext|>y", "\U0001f642" * 20]
    ids, sizes = tokenizer.encode_documents(documents)
    assert ids.dtype == np.uint32
    ends = sizes.cumsum()
    parts = [ids[end - size : end].tolist() for end, size in zip(ends, sizes, strict=True)]
    assert ends[-1] == len(ids)
    assert parts == [[*tokenizer.encode(text), tokenizer.eod_id] for text in documents]


@pytest.mark.parametrize("make", [trained, the_bytes])
def test_a_saved_tokenizer_is_equal_to_the_one_that_was_saved(make: type, tmp_path: Path) -> None:
    tokenizer: Tokenizer = make()
    tokenizer.save(tmp_path / "t")
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.eod_id == tokenizer.eod_id
        assert loaded.encode_batch([*TEXTS, "<|endoftext|>"]) == tokenizer.encode_batch([*TEXTS, "<|endoftext|>"])
        assert loaded.token_bytes().tolist() == tokenizer.token_bytes().tolist()


def test_training_is_the_same_in_every_process() -> None:
    program = (
        "from gpt_simple.config.schema import DataConfig; from gpt_simple.data.tokenizer import bpe; import random;"
        "r = random.Random(1); w = [''.join(r.choices('abcdefgh', k=4)) for _ in range(300)];"
        "print(bpe(DataConfig(), lambda: iter([' '.join(r.choices(w, k=20)) for _ in range(200)])).fingerprint)"
    )
    found = {subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(3)}
    assert len(found) == 1


def test_training_is_quick_on_long_runs_of_characters() -> None:
    """Uncut, each of these runs takes minutes: they are in real text as padding, genomes and encoded binaries."""
    began = time.perf_counter()
    for run in ("x" * 500_000, " " * 500_000, "".join(random.Random(0).choices("ACGT", k=500_000))):
        tokenizer = bpe(evolve(DataConfig(), tokenizer_vocab_size=300), lambda run=run: iter([run]))  # type: ignore[misc]
        assert len(tokenizer.encode(run)) < len(run) / 2
    assert time.perf_counter() - began < 60

    words = "".join(f"{'y' * (i % 200)} {i}\n" for i in range(3000))
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([words], trainer)
    assert bpe(evolve(DataConfig(), tokenizer_vocab_size=400), lambda: iter([words])).encode(words) == (
        backend.encode(words).ids
    )


def test_the_fingerprint_follows_the_ids() -> None:
    assert trained(300).fingerprint == trained(300).fingerprint
    assert len({trained(300).fingerprint, trained(301).fingerprint, the_bytes().fingerprint}) == 3


@pytest.mark.parametrize("piece", [1, 7, 50])
def test_long_texts_encode_in_pieces_as_they_do_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(piece)
    alphabet = ["the", "cat", " ", "  ", "\n", "\n\n", "\t", ".", "!", "'s", "é", "東", "12", "\r\n", "\u00a0", "_"]
    documents = ["".join(rng.choices(alphabet, k=200)) for _ in range(30)]
    tokenizer = trained()
    whole = tokenizer.encode_batch(documents)
    monkeypatch.setattr(module, "PIECE", piece)
    assert tokenizer.encode_batch(documents) == whole


def test_a_missing_tokenizer_is_an_error_and_never_a_fallback(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=r"there is no .*\.json"):
            load_tokenizer(path)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", "not json", '{"version": "1.0", "model": {"type": "Nope"}}'])
def test_a_file_that_is_no_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_needs_an_end_of_document(tmp_path: Path) -> None:
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no token that ends a document"):
        load_tokenizer(tmp_path)


def test_a_foreign_tokenizer_keeps_its_own_end(tmp_path: Path) -> None:
    backend = Backend(models.BPE(vocab={"▁": 0, "a": 1, "▁a": 2, "<0x0A>": 3}, merges=[("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(2)
    spec = json.loads(backend.to_str())
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eod_id == 5
    assert tokenizer.encode("a a a") == [2, 2, 2]
    assert tokenizer.decode([2, 2, 5]) == "a a"
    assert tokenizer.token_bytes().tolist() == [1, 1, 2, 1, 0, 0]
    assert tokenizer.token_bytes().dtype == np.int32


def renamed_end(backend: Backend) -> Backend:
    """With another name of the token that ends a document."""
    text = backend.to_str().replace("</s>", "<stop>").replace("[SEP]", "<stop>")
    return Backend.from_str(text)


def not_special(backend: Backend) -> Backend:
    """With the end of a document among the tokens that are found in text."""
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["special"] = False
    return Backend.from_str(json.dumps(spec))


def not_added(backend: Backend) -> Backend:
    """With the end of a document as a piece of the model alone."""
    spec = json.loads(backend.to_str())
    return Backend.from_str(json.dumps(spec | {"added_tokens": []}))


def merged_end() -> Backend:
    """Merges that make the end of a document from its characters."""
    vocab = {"<": 0, "/": 1, "s": 2, ">": 3, "</": 4, "s>": 5, "</s>": 6, "a": 7, "</s>a": 8, " ": 9}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "a")]
    return Backend(models.BPE(vocab=vocab, merges=merges))


def whole_words() -> Backend:
    """A BPE that takes a whole word from its vocabulary first."""
    backend = Backend(models.BPE(vocab={"<": 0, "/": 1, "s": 2, ">": 3, "</s>": 4}, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


ENDS = ["", "</s>", "a </s>", "</s></s>", "a</s>b", "</s>a", " [SEP] ", "a [SEP] b", "<stop> <stop>"]


def unchanged(backend: Backend) -> Backend:
    return backend


@pytest.mark.parametrize(
    ("make", "change"),
    [
        *product([*EXACT, *INEXACT, whole_words], [unchanged, not_special, not_added, renamed_end]),
        *product([merged_end], [unchanged]),
    ],
)
def test_text_is_never_the_end_of_a_document_for_any_tokenizer(
    make: Callable[[], Backend], change: Callable[[Backend], Backend], tmp_path: Path
) -> None:
    file = saved(lambda: change(make()), tmp_path)
    backend = Backend.from_file(str(file))
    end = next((name for name in ("</s>", "[SEP]", "<stop>") if backend.token_to_id(name) is not None), None)
    if end is None:
        pytest.skip("a trained tokenizer without its added tokens has no end")
    tokenizer = load_tokenizer(file, end=end)
    for texts in (ENDS, [*TEXTS, *FOREIGN_TEXTS]):
        ids, sizes = encode_documents(tokenizer, texts)
        ends = np.cumsum(sizes) - 1
        assert np.flatnonzero(ids == tokenizer.eod_id).tolist() == ends.tolist()
    # Text without the end has the ids of the library.
    backend.encode_special_tokens = True
    plain = [text.replace("</s>", "").replace("[SEP]", "") for text in FOREIGN_TEXTS]
    expected = [each.ids for each in backend.encode_batch(plain, add_special_tokens=False)]
    assert tokenizer.encode_batch(plain) == expected
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again", end=end).fingerprint == tokenizer.fingerprint


def test_a_tokenizer_that_gives_text_its_end_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel(vocab={"</s>": 0, "a": 1}, unk_token="</s>"))
    tokenizer = load_tokenizer(saved(lambda: backend, tmp_path))
    assert encode_documents(tokenizer, ["a"])[0].tolist() == [1, 0]
    with pytest.raises(DataError, match="gives text the id 0, which ends a document"):
        encode_documents(tokenizer, ["a", "unknown"])


def test_the_end_of_a_document_can_be_named(tmp_path: Path) -> None:
    file = saved(lambda: renamed_end(word_piece()), tmp_path)
    with pytest.raises(DataError, match=r"data\.end_token \(its special tokens: \[UNK\], <stop>\)"):
        load_tokenizer(file)
    with pytest.raises(DataError, match="no token '</s>'"):
        load_tokenizer(file, end="</s>")
    assert load_tokenizer(file, end="<stop>").eod_id == 1
