"""Byte-level BPE through tiktoken, several times faster than the `tokenizers` library, with the same ids.

tiktoken knows tokens and their ranks but no merges: it joins the two neighbours that together are the token of the
lowest rank. That is the same as applying a list of merges in order if each token is what one merge makes, if ids rise
along the list, and if the bytes of each token, joined by the merges before it, end as the two halves of its merge. All
trained BPE is like that; a vocabulary that is not is left to `tokenizers`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from tiktoken import Encoding

from gpt_simple.data.byte_level import byte_alphabet

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""How GPT-2 cuts text before merging, as `ByteLevel` of `tokenizers` does; without backtracking."""


@frozen(eq=False)
class MergeEncoder:
    """Ordinary text to ids: nothing in it is a special token."""

    encoding: Encoding

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text; in as many threads as there are cores, unless TOKENIZERS_PARALLELISM is false."""
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else os.cpu_count() or 1
        if threads == 1 or len(texts) == 1:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, texts))

    def _encode(self, text: str) -> NDArray[np.uint32]:
        # Python's numbers would cost a fifth of the encoding itself.
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except (
            UnicodeEncodeError
        ):  # halves of surrogate pairs, as in a prompt that is not UTF-8: this way replaces them
            return np.array(self.encoding.encode_ordinary(text), np.uint32)


def merge_encoder(spec: Mapping[str, Any]) -> MergeEncoder | None:
    """The encoder of a tokenizer.json that is known to split text by the byte-level pattern; None if it must not be."""
    model = spec["model"]
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(key) for key in unusual) or not model["merges"]:
        return None
    added = {token["content"] for token in spec["added_tokens"]}
    byte_of = {char: bytes([byte]) for byte, char in enumerate(byte_alphabet())}
    try:
        ranks = {
            b"".join(byte_of[char] for char in token): index
            for token, index in model["vocab"].items()
            if token not in added
        }
        pairs = [tuple(b"".join(byte_of[char] for char in half) for half in merge) for merge in model["merges"]]
    except KeyError:
        return None
    if not _equivalent(ranks, pairs):
        return None
    # A special token must be named, or tiktoken looks for the empty one at every byte; no text becomes it.
    special = {token["content"]: token["id"] for token in spec["added_tokens"]} or {
        "<|endoftext|>": max(ranks.values()) + 1
    }
    return MergeEncoder(Encoding("merges", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special))


def _equivalent(ranks: Mapping[bytes, int], pairs: Sequence[tuple[bytes, ...]]) -> bool:
    """Whether joining by rank is applying the merges in order; see above."""
    made = [left + right for left, right in pairs]
    whole = {token for token in ranks if len(token) > 1}
    if set(made) != whole or len(made) != len(whole) or any(bytes([byte]) not in ranks for byte in range(256)):
        return False
    ids = [ranks[token] for token in made]
    if any(later <= earlier for earlier, later in pairwise(ids)):
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
