"""From documents to a dataset directory: which are held out, what the tokenizer learns from, and the shards.

The documents of a source are read several times and never held in memory together.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.manifest import ALL, Manifest
from gpt_simple.data.shards import DatasetWriter
from gpt_simple.data.sources import Document, Source
from gpt_simple.data.tokenizer import JsonTokenizer, Train
from gpt_simple.errors import DataError
from gpt_simple.hooks.batch import Tokenizer

TRAINING_BYTES = 1 << 27
"""A tokenizer is trained on a sample of about this much text."""

BATCH_BYTES = 1 << 22
"""Text that is encoded in one call."""

T = TypeVar("T")


@frozen(eq=False)
class Survey:
    """The result of reading all documents once. Sizes are in bytes of UTF-8; documents without text do not count."""

    held_out: NDArray[np.bool_]
    """Of each document, whether it goes to the val split."""
    bytes: int
    val_bytes: int
    val_documents: int
    empty: int

    @property
    def documents(self) -> int:
        return len(self.held_out)


def survey(source: Source, data: DataConfig) -> Survey:
    """Read all documents, and so find a bad one before anything is written; split them by the hash of their keys."""
    hashes, sizes, empty = [], [], 0
    text = ""
    for document in itertools.islice(source.documents(), data.max_documents):
        if not document.text:
            empty += 1
            continue
        text = document.text
        hashes.append(key_hash(document.key))
        sizes.append(len(text.encode()))
    if not hashes:
        raise DataError("no document has any text", key="data.path", hint="there is nothing to learn")
    share = np.array(hashes, np.uint64)
    held_out = held_out_of(share, int(share.min()), int(share.max()), data.val_fraction)
    if len(share) == 1 and data.val_fraction:
        val = len(text[_cut(text, data.val_fraction) :].encode())
        return Survey(held_out, sizes[0], val, 1, empty)
    val = int(np.array(sizes)[held_out].sum())
    return Survey(held_out, sum(sizes), val, int(held_out.sum()), empty)


def key_hash(key: str) -> int:
    """64 bits by which a document is held out or not."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def held_out_of(hashes: NDArray[np.uint64], lowest: int, highest: int, val_fraction: float) -> NDArray[np.bool_]:
    """Which of these documents are held out, where ``lowest`` and ``highest`` are those of all documents.

    Chance would often leave a split of a few documents empty: each gets one at least, unless all keys are equal.
    """
    limit = int(val_fraction * 2**64)
    if not limit or lowest == highest:
        return np.zeros(len(hashes), bool)
    if limit <= lowest:
        return np.equal(hashes, lowest)
    return np.less(hashes, limit) if limit <= highest else np.not_equal(hashes, highest)


def write(directory: Path, source: Source, data: DataConfig, found: Survey, train: Train, fingerprint: str) -> Manifest:
    """Fill a directory with the shards of both splits, the tokenizer and, last, the manifest."""
    tokenizer = train(data, lambda: _training_texts(source, data, found))
    writer = DatasetWriter(directory, tokenizer, buckets=(ALL,))
    nats: dict[str, float | None] = {"train": 0.0, "val": 0.0}
    for batch in batches(_documents(source, data, found), lambda pair: pair[1].text):
        texts = [document.text for _, document in batch]
        tokens, sizes = encode_documents(tokenizer, texts)
        text_bytes = np.array([len(text.encode()) for text in texts])
        writer.add(ALL, tokens, sizes, text_bytes, np.array([held_out for held_out, _ in batch]))
        for held_out, document in batch:
            split = "val" if held_out else "train"
            total = nats[split]
            nats[split] = None if total is None or document.nats is None else total + document.nats
    return writer.close(fingerprint, nats)


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Ids of all texts in one array, each text followed by EOD, and how many each has with it.

    Raises DataError if a text has the id of EOD.
    """
    if isinstance(tokenizer, JsonTokenizer):
        tokens, sizes = tokenizer.encode_documents(texts)
    else:
        ended = [[*ids, tokenizer.eod_id] for ids in tokenizer.encode_batch(texts)]
        tokens, sizes = np.array(list(itertools.chain.from_iterable(ended))), np.array([len(ids) for ids in ended])
    if np.count_nonzero(tokens == tokenizer.eod_id) != len(texts):
        raise DataError(
            f"the tokenizer {tokenizer.name} gives text the id {tokenizer.eod_id}, which ends a document",
            key="data.tokenizer",
            hint="choose another tokenizer, or another of its tokens with data.end_token",
        )
    return tokens, sizes


def batches(items: Iterable[T], text_of: Callable[[T], str], limit: int = BATCH_BYTES) -> Iterator[list[T]]:
    """Groups of items that hold about ``limit`` characters of text each."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(text_of(item))
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _documents(source: Source, data: DataConfig, found: Survey) -> Iterator[tuple[bool, Document]]:
    """Documents, and whether each is held out. Of a single document, the end is held out."""
    documents = (each for each in itertools.islice(source.documents(), data.max_documents) if each.text)
    if found.documents == 1 and data.val_fraction:
        text = next(documents).text
        cut = _cut(text, data.val_fraction)
        halves = ((False, text[:cut]), (True, text[cut:]))
        yield from ((held_out, Document(half, key="")) for held_out, half in halves if half)
    else:
        yield from zip(found.held_out.tolist(), documents, strict=True)


def _cut(text: str, val_fraction: float) -> int:
    """Where the held-out end of a single document begins; it has a character at least."""
    return min(len(text) - 1, round(len(text) * (1 - val_fraction)))


def _training_texts(source: Source, data: DataConfig, found: Survey) -> Iterator[str]:
    """The train split, thinned evenly to ``TRAINING_BYTES``; the first document always."""
    share, owed = min(1.0, TRAINING_BYTES / found.bytes), 1.0
    for held_out, document in _documents(source, data, found):
        if not held_out:
            owed += share
            if owed >= 1.0:
                owed -= 1.0
                yield document.text[:TRAINING_BYTES]
