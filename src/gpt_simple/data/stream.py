"""Rows from a source without length or index: it is tokenized during training, and nothing of it is kept.

Documents come in the order of the stream and are cut as packing ``concat`` cuts them. A resumed run goes on with the
row that comes next, whatever the number of processes, as long as the stream yields the same documents in the same
order. The cost: every process reads and tokenizes the whole stream, and a resume does so again from the beginning up to
where the run stopped. Documents are not shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.order import I64
from gpt_simple.data.sources import Document, Stream
from gpt_simple.data.tokenize import BATCH_BYTES, batches, encode_documents, key_hash, survey
from gpt_simple.errors import DataError
from gpt_simple.hooks.batch import Tokenizer

HEAD_BYTES = 1 << 24
"""The val split is held out of this much text at the beginning, and a tokenizer is trained on the rest of that."""


@frozen
class Head:
    """The beginning of a stream as a source that can be prepared."""

    stream: Stream

    def fingerprint(self) -> str:
        return f"head of {HEAD_BYTES} bytes of {self.stream.fingerprint()}"

    def documents(self) -> Iterator[Document]:
        size = 0
        for document in self.stream.stream():
            yield document
            size += len(document.text)
            if size >= HEAD_BYTES:
                return


@frozen(eq=False)
class StreamRows:
    """The rows of the train split of a stream. No document of the val split is among them."""

    stream: Stream
    held_out: NDArray[np.bool_]
    """Of the documents of the head."""
    data: DataConfig
    tokenizer: Tokenizer

    def blocks(self, consumed: int, counts: Iterator[int]) -> Iterator[I64]:
        """Rows from number ``consumed`` on, as many at once as ``counts`` yields: shape [n, max_length + 1].

        A row begins with the token before its first target. Without end where ``data.on_exhaustion`` is ``repeat``;
        else the last block may have fewer rows, and a row that is not full is left out.
        """
        length, count = self.data.max_length, next(counts)
        skip, held = consumed * length, np.array([self.tokenizer.eod_id])
        for tokens in self._tokens():
            if skip >= len(tokens):
                # The last skipped token is the input of the first target.
                skip, held = skip - len(tokens), tokens[-1:]
                continue
            held = np.concatenate([held, tokens], dtype=np.int64)[skip:]
            skip = 0
            while len(held) > count * length:
                yield _rows(held, count, length)
                held, count = held[count * length :], next(counts)
        if rest := (len(held) - 1) // length:
            yield _rows(held, rest, length)

    def _tokens(self) -> Iterator[NDArray[Any]]:
        """The tokens of documents, each with its EOD, some documents at a time."""
        while True:
            total = 0
            for texts in batches(self._texts(), str, BATCH_BYTES // 16):
                tokens, _ = encode_documents(self.tokenizer, texts)
                total += len(tokens)
                yield tokens
            if not total:
                raise DataError(f"the stream of {self.data.source} has no document to train on", key="data.source")
            if self.data.on_exhaustion != "repeat":
                return

    def _texts(self) -> Iterator[str]:
        documents = (each for each in islice(self.stream.stream(), self.data.max_documents) if each.text)
        head = islice(documents, len(self.held_out))
        yield from (document.text for document, out in zip(head, self.held_out, strict=False) if not out)
        limit = int(self.data.val_fraction * 2**64)
        yield from (document.text for document in documents if key_hash(document.key) >= limit)


def stream_rows(stream: Stream, data: DataConfig, tokenizer: Tokenizer) -> StreamRows:
    """The rows of a stream, after a reading of its head that finds what is held out."""
    found = survey(Head(stream), data)
    if found.documents == 1 and data.val_fraction:
        raise DataError(
            f"the first {HEAD_BYTES >> 20} MiB of the stream of {data.source} are one document",
            key="data.source",
            hint="nothing can be held out of it: set data.val_fraction = 0 and training.eval_steps = 0",
        )
    return StreamRows(stream, found.held_out, data, tokenizer)


def _rows(tokens: I64, count: int, length: int) -> I64:
    return np.lib.stride_tricks.sliding_window_view(tokens[: count * length + 1], length + 1)[::length]
