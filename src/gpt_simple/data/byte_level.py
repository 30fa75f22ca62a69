"""Where long texts may be cut, so that the byte-level pattern gives the same words on both sides. Needs no numpy."""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE = 1 << 16
"""Longer texts are encoded in pieces of about this many characters: in parallel, and in bounded memory."""

STRETCH = 256
"""Training a tokenizer takes time quadratic in the length of a word: longer words are cut for it."""

_CUT = re.compile(r"[!-~](?=\n)")


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
