"""From documents to a dataset directory: which are held out, what the tokenizer learns from, and the shards.

The documents of a source are read several times and never held in memory together.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.manifest import ALL, FILE, TOKENIZER, Manifest, SplitRecord
from gpt_simple.data.shards import ShardWriter
from gpt_simple.data.sources import Document, Source
from gpt_simple.data.tokenizer import Train
from gpt_simple.errors import DataError

TRAINING_BYTES = 1 << 27
"""A tokenizer is trained on a sample of about this much text."""

BATCH_BYTES = 1 << 22
"""Text that is encoded in one call."""


@frozen(eq=False)
class Survey:
    """What one reading of all documents tells. Sizes are in bytes of UTF-8; documents without text do not count."""

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
        return Survey(np.array([False]), sizes[0], val, 1, empty)
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
    manifest = Manifest(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id, fingerprint, {})
    splits = {name: _SplitWriter(directory, name, manifest) for name in ("train", "val")}
    for batch in _batches(_documents(source, data, found)):
        encoded = tokenizer.encode_batch([document.text for _, document in batch])
        for (name, document), ids in zip(batch, encoded, strict=True):
            splits[name].add(document, ids)
    manifest = evolve(manifest, splits={name: split.close() for name, split in splits.items()})
    tokenizer.save(directory / TOKENIZER)
    (directory / FILE).write_text(manifest.text, encoding="utf-8")
    return manifest


class _SplitWriter:
    """The shards of a split and its totals."""

    def __init__(self, directory: Path, name: str, manifest: Manifest) -> None:
        self.shards = ShardWriter(directory, f"{name}/{ALL}", manifest.dtype, manifest.eod_id, manifest.vocab_size)
        self.documents, self.bytes = 0, 0
        self.nats: float | None = 0.0

    def add(self, document: Document, ids: list[int]) -> None:
        self.shards.add(ids)
        self.documents += 1
        self.bytes += len(document.text.encode())
        self.nats = None if self.nats is None or document.nats is None else self.nats + document.nats

    def close(self) -> SplitRecord:
        shards = self.shards.close()
        tokens = sum(shard.tokens for shard in shards)
        return SplitRecord(self.documents, tokens, self.bytes, self.nats, {ALL: shards})


def _documents(source: Source, data: DataConfig, found: Survey) -> Iterator[tuple[str, Document]]:
    """Documents with the name of their split. Of a single document, the end is held out."""
    told = itertools.islice(source.documents(), data.max_documents)
    documents = (document for document in told if document.text)
    if found.documents == 1 and data.val_fraction:
        text = next(documents).text
        cut = _cut(text, data.val_fraction)
        parts = (("train", text[:cut]), ("val", text[cut:]))
        yield from ((name, Document(part, key=name)) for name, part in parts if part)
        return
    for held_out, document in zip(found.held_out, documents, strict=True):
        yield "val" if held_out else "train", document


def _cut(text: str, val_fraction: float) -> int:
    """Where the held-out end of a single document begins; it has a character at least."""
    return min(len(text) - 1, round(len(text) * (1 - val_fraction)))


def _training_texts(source: Source, data: DataConfig, found: Survey) -> Iterator[str]:
    """The train split, thinned evenly to ``TRAINING_BYTES``; the first document always."""
    share, owed = min(1.0, TRAINING_BYTES / found.bytes), 1.0
    for name, document in _documents(source, data, found):
        if name == "train":
            owed += share
            if owed >= 1.0:
                owed -= 1.0
                yield document.text[:TRAINING_BYTES]


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, size = [], 0
    for item in documents:
        batch.append(item)
        size += len(item[1].text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
