"""What all byte-level tokenizers share: how bytes are written as characters, and where long texts may be cut."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

PIECE = 1 << 16
"""Longer texts are encoded in pieces of about this many characters: in parallel, and in bounded memory."""

STRETCH = 256
"""Training a tokenizer takes the square of the time that a word is long; no longer one is shown to it whole."""

_CUT = re.compile(r"[!-~](?=\n)")


def byte_alphabet() -> list[str]:
    """The characters by which byte-level vocabularies write the 256 bytes: those that print stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def is_plain(spec: dict[str, Any]) -> bool:
    """Whether text is split by the byte-level pattern alone, as in the tokenizers that are trained here.

    ``spec`` is the content of a tokenizer.json.
    """
    pattern = spec["pre_tokenizer"] or {}
    return (
        spec["normalizer"] is None
        and pattern.get("type") == "ByteLevel"
        and not pattern["add_prefix_space"]
        and pattern["use_regex"]
        and all(token["special"] for token in spec["added_tokens"])
    )


def pieces(text: str) -> Iterator[str]:
    """Cut where the byte-level pattern cuts anyway, before a newline that follows a printable ASCII character."""
    start = 0
    while len(text) - start > PIECE and (cut := _CUT.search(text, start + PIECE)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def stretches(text: str) -> Iterator[str]:
    """Cut runs of hundreds of characters without a space, or of nothing else, as in encoded binaries and padding."""
    start = 0
    for end in range(STRETCH, len(text), STRETCH):
        block = text[end - STRETCH : end]
        if block.split(None, 1) in ([], [block]):
            yield text[start:end]
            start = end
    yield text[start:]
