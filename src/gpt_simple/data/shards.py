"""Tokens on disk: one shard is one stretch of documents that can be read at any position.

``.bin`` holds ``EOD document EOD document EOD ... document EOD`` as uint16 or uint32, ``.idx`` int64 positions, both
little-endian. Document ``i`` owns the positions ``idx[i]`` to ``idx[i + 1]``: its tokens and the EOD that ends it. What
comes before any of these positions is in the same file, so each of them is a target that has an input.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from gpt_simple.data.manifest import (
    FileRecord,
    Manifest,
    ShardRecord,
    SplitRecord,
    content,
    token_dtype,
    write_manifest,
)
from gpt_simple.errors import DataError
from gpt_simple.hooks.batch import Tokenizer

SHARD_TOKENS = 1 << 28
"""A shard is closed with the document that passes this many tokens."""


@frozen(eq=False)
class Shard:
    """A shard, mapped into memory: nothing is read until it is used."""

    path: Path
    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    vocab_size: int
    eod_id: int
    record: ShardRecord
    _seen: dict[Path, tuple[int, int]] = field(init=False, repr=False)
    """Size and time (ns) of each file when its content was that of ``record``."""

    @_seen.default
    def _seen_now(self) -> dict[Path, tuple[int, int]]:
        return {path: _state(path) for path in self._files()}

    @property
    def targets(self) -> int:
        """Positions that can be predicted: all but the first EOD."""
        return len(self.tokens) - 1

    def require_unchanged(self) -> None:
        """Raise a DataError if a file was changed since; reading one that was cut off would kill the process.

        A file of which only the time differs is read to compare its content.
        """
        for path, record in self._files().items():
            state = _state(path)
            if state == self._seen[path]:
                continue
            if state[0] != record.size or content(path) != record.sha256:
                raise DataError(
                    f"{path}: has changed, or is gone, since the run began",
                    hint="put it back as it was, or prepare the data again and start a new run",
                )
            self._seen[path] = state

    def _files(self) -> dict[Path, FileRecord]:
        return {self.path: self.record.bin, self.path.with_suffix(".idx"): self.record.idx}

    def check(self, values: NDArray[Any], position: Callable[[int], int]) -> None:
        """Refuse ids beyond the vocabulary; ``position`` maps an index into the flat values to one into the file."""
        if values.size and int(values.max()) >= self.vocab_size:
            flat = int(values.argmax())
            raise DataError(
                f"{self.path}: token {int(values.flat[flat])} at position {position(flat)} is beyond the vocabulary of "
                f"{self.vocab_size}",
                hint="the file is damaged or was made with another tokenizer",
            )


def open_shard(directory: Path, record: ShardRecord, manifest: Manifest) -> Shard:
    """Map a shard whose files have been checked to exist with their sizes."""
    path = directory / f"{record.name}.bin"
    tokens = np.asarray(np.memmap(path, manifest.dtype, "r"))
    starts = np.asarray(np.memmap(path.with_suffix(".idx"), "<i8", "r"))
    if len(tokens) != record.tokens + 1 or len(starts) != record.documents + 1 or starts[-1] != len(tokens):
        raise DataError(
            f"{path}: does not hold the {record.documents} documents that dataset.json says", hint="prepare again"
        )
    return Shard(path, tokens, starts, manifest.vocab_size, manifest.eod_id, record)


def _state(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0)
    return stat.st_size, stat.st_mtime_ns


def write_index(path: Path, starts: NDArray[np.int64]) -> FileRecord:
    """Write the ``.idx`` of a shard."""
    data = starts.astype("<i8", copy=False).tobytes()
    path.write_bytes(data)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


class _ShardFile:
    """A shard that is being written; its tokens are hashed on the way."""

    def __init__(self, path: Path, eod: NDArray[Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.size = 0
        self._path, self._stream, self._sha256 = path, path.open("wb"), hashlib.sha256()
        self._starts: list[NDArray[np.int64]] = []
        self.extend(eod, np.array([1]))

    def extend(self, tokens: NDArray[Any], ends: NDArray[np.int64]) -> None:
        """Append documents that end at ``ends`` in ``tokens``."""
        data = tokens.tobytes()
        self._stream.write(data)
        self._sha256.update(data)
        self._starts.append(ends + self.size)
        self.size += len(tokens)

    def close(self, name: str) -> ShardRecord:
        tokens = FileRecord(self._stream.tell(), self._sha256.hexdigest())
        self._stream.close()
        starts = np.concatenate(self._starts)
        index = write_index(self._path.with_suffix(".idx"), starts)
        return ShardRecord(name, len(starts) - 1, self.size - 1, tokens, index)


class ShardWriter:
    """Writes the documents of one bucket of one split, shard after shard, below ``root``.

    ``prefix`` is the bucket's directory, relative to ``root``: ``train/all``.
    """

    def __init__(
        self, root: Path, prefix: str, *, eod_id: int, vocab_size: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._root, self._prefix, self._vocab_size, self._shard_tokens = root, prefix, vocab_size, shard_tokens
        self._eod = np.array([eod_id], token_dtype(vocab_size))
        self._records: list[ShardRecord] = []
        self._shard: _ShardFile | None = None

    def extend(self, tokens: NDArray[Any], sizes: NDArray[np.int64]) -> None:
        """Append documents that end in EOD already, one after another in ``tokens``, and their sizes."""
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= self._vocab_size):
            raise DataError(f"the tokenizer gave an id outside its vocabulary of {self._vocab_size} ids")
        tokens, ends = tokens.astype(self._eod.dtype, copy=False), np.cumsum(sizes)
        done = begin = 0
        while done < len(ends):
            shard = self._shard = self._shard or _ShardFile(self._root / f"{self._name()}.bin", self._eod)
            room = self._shard_tokens - shard.size
            count = 1 + int(np.searchsorted(ends[done:] - begin, room, side="right"))
            taken = ends[done : done + count]
            shard.extend(tokens[begin : taken[-1]], taken - begin)
            done, begin = done + len(taken), int(taken[-1])
            if shard.size > self._shard_tokens:
                self.close()

    def close(self) -> tuple[ShardRecord, ...]:
        """Finish the last shard; returns all."""
        if self._shard is not None:
            self._records.append(self._shard.close(self._name()))
            self._shard = None
        return tuple(self._records)

    def _name(self) -> str:
        return f"{self._prefix}/shard-{len(self._records):05d}"


class DatasetWriter:
    """Writes a dataset directory: documents by bucket into both splits, and at last the tokenizer and the manifest.

    ``buckets`` are listed in the manifest even if they get no document.
    """

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, *, buckets: Sequence[str] = (), shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._directory, self._tokenizer = directory, tokenizer
        eod_id, vocab_size = tokenizer.eod_id, tokenizer.vocab_size
        self._writer = partial(ShardWriter, directory, eod_id=eod_id, vocab_size=vocab_size, shard_tokens=shard_tokens)
        self._splits = {name: {b: self._writer(f"{name}/{b}") for b in buckets} for name in ("train", "val")}
        self._documents, self._bytes = Counter[str](), Counter[str]()

    def add(
        self,
        bucket: str,
        tokens: NDArray[Any],
        sizes: NDArray[np.int64],
        text_bytes: NDArray[np.int64],
        held_out: NDArray[np.bool_],
    ) -> None:
        """Append documents, each ended by EOD, one after another in ``tokens``.

        Of each document: ``sizes`` in tokens with its EOD, ``text_bytes`` in UTF-8, and whether it is ``held_out``.
        """
        for name, mine in (("train", ~held_out), ("val", held_out)):
            if mine.any():
                if bucket not in self._splits[name]:
                    self._splits[name][bucket] = self._writer(f"{name}/{bucket}")
                self._splits[name][bucket].extend(tokens[np.repeat(mine, sizes)], sizes[mine])
                self._documents[name] += int(mine.sum())
                self._bytes[name] += int(text_bytes[mine].sum())

    def close(
        self, source: str, nats: Mapping[str, float | None] | None = None, *, bytes_known: bool = True
    ) -> Manifest:
        """``source`` is the fingerprint of the documents, ``nats`` minus their log-probability by split.

        ``bytes_known``: whether ``text_bytes`` was exact. Else the manifest has no bytes.
        """
        tokenizer, splits = self._tokenizer, {}
        for name, writers in self._splits.items():
            shards = {bucket: writer.close() for bucket, writer in writers.items()}
            tokens = sum(shard.tokens for each in shards.values() for shard in each)
            split_nats = None if nats is None else nats[name]
            size = self._bytes[name] if bytes_known else None
            splits[name] = SplitRecord(self._documents[name], tokens, size, split_nats, shards)
        manifest = Manifest(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id, source, splits)
        write_manifest(self._directory, manifest, tokenizer)
        return manifest
