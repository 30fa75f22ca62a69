"""Text to arrays of ids, by the fastest way that gives the ids of the tokenizer.json.

tiktoken encodes byte-level BPE several times faster than the `tokenizers` library. It has tokens and their ranks but no
merges: it joins the two neighbours that together are the token of the lowest rank. That equals applying a list of
merges in order if each token is what one merge makes, if ids rise along the list, and if the bytes of each token,
joined by the merges before it, end as the two halves of its merge. All trained BPE is like that; `tokenizers` encodes
with every other vocabulary.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiktoken import Encoding

from gpt_simple.hardware import cores
from tokenizers import Tokenizer as Backend

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""How GPT-2 cuts text before merging, as `ByteLevel` of `tokenizers` does; without backtracking."""

U32 = NDArray[np.uint32]


def encoder(backend: Backend, spec: Mapping[str, Any], *, plain: bool) -> Callable[[Sequence[str]], Iterable[U32]]:
    """A function from texts to the ids of each. ``spec``: the tokenizer.json; ``plain``: see ``is_plain``."""
    if plain and not spec["model"].get("merges"):
        byte_ids = np.array([backend.token_to_id(char) for char in _byte_alphabet()], np.uint32)
        return lambda texts: (byte_ids[np.frombuffer(text.encode(), np.uint8)] for text in texts)
    encoding = tiktoken_encoding(spec) if plain else None
    return partial(_library_ids, backend) if encoding is None else partial(_tiktoken_ids, encoding)


def _library_ids(backend: Backend, texts: Sequence[str]) -> Iterable[U32]:
    # array() converts a list of Python's numbers in half the time of numpy.
    found = backend.encode_batch_fast(texts, add_special_tokens=False)
    return (np.frombuffer(array("I", each.ids), np.uint32) for each in found)


def _tiktoken_ids(encoding: Encoding, texts: Sequence[str]) -> Iterable[U32]:
    """Uses as many threads as this process has cores, unless TOKENIZERS_PARALLELISM is false."""

    def encode(text: str) -> U32:
        # A list of Python's numbers would cost a fifth of the encoding itself.
        try:
            return encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a prompt that is not UTF-8 has halves of surrogate pairs: replace them
            return np.array(encoding.encode_ordinary(text), np.uint32)

    threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else cores()
    if threads == 1 or len(texts) == 1:
        return map(encode, texts)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(encode, texts))


def tiktoken_encoding(spec: Mapping[str, Any]) -> Encoding | None:
    """The encoding of a tokenizer.json that splits text by the byte-level pattern; None if its ids would differ."""
    model = spec["model"]
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(key) for key in unusual) or not model["merges"]:
        return None
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    byte_of = {char: bytes([byte]) for byte, char in enumerate(_byte_alphabet())}

    def bytes_of(token: str) -> bytes:
        return b"".join(byte_of[char] for char in token)

    try:
        ranks = {bytes_of(token): index for token, index in model["vocab"].items() if token not in added}
        pairs = [(bytes_of(left), bytes_of(right)) for left, right in model["merges"]]
    except (KeyError, ValueError):
        return None
    if not _equivalent(ranks, pairs):
        return None
    # Without a special token tiktoken would search for the empty one at every byte. No text becomes a special token.
    special = added or {"<|endoftext|>": max(ranks.values()) + 1}
    return Encoding("merges", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _equivalent(ranks: Mapping[bytes, int], pairs: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether joining by rank is applying the merges in order; see above."""
    made = [left + right for left, right in pairs]
    whole = {token for token in ranks if len(token) > 1}
    if set(made) != whole or len(made) != len(whole) or any(bytes([byte]) not in ranks for byte in range(256)):
        return False
    if any(ranks[later] <= ranks[earlier] for earlier, later in pairwise(made)):
        return False
    return all(_joined(left + right, ranks) == [left, right] for left, right in pairs)


def _joined(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The bytes of a token after all merges that come before its own."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while True:
        found = [(ranks.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(found, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _byte_alphabet() -> list[str]:
    """The characters by which byte-level vocabularies write the 256 bytes: those that print stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
