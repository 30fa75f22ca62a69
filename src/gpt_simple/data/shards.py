"""Tokens on disk: one shard is one stretch of documents that can be read at any position.

``.bin`` holds ``EOD document EOD document EOD ... document EOD`` as uint16 or uint32, ``.idx`` int64
positions, both little-endian. Document ``i`` owns the positions ``idx[i]`` to ``idx[i + 1]``: its tokens and
the EOD that ends it. What comes before any of these positions is in the same file, so each of them is a
target that has an input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, field, frozen
from numpy.typing import DTypeLike, NDArray

from gpt_simple.data.manifest import FileRecord, Manifest, ShardRecord, content
from gpt_simple.errors import DataError

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
    _seen: dict[Path, tuple[int, int]] = field(factory=dict, init=False, repr=False)
    """Size and time (ns) of each file when its content was known to be that of ``record``."""

    def __attrs_post_init__(self) -> None:
        self._seen.update((path, _state(path)) for path in self._files())

    @property
    def targets(self) -> int:
        """Positions that can be predicted: all but the first EOD."""
        return len(self.tokens) - 1

    def require_unchanged(self) -> None:
        """Raise a DataError if a file was changed since; reading one that was cut off would kill the process.

        One that only has another time than before is read to compare its content.
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
        """Refuse ids that the tokenizer does not have; ``position`` tells where in the file a flat index comes from."""
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


@define
class _File:
    """A file that is hashed while it is written."""

    path: Path
    size: int = 0
    sha256: Any = field(factory=hashlib.sha256)
    stream: Any = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.stream = self.path.open("wb")

    def write(self, values: NDArray[Any]) -> None:
        data = values.tobytes()
        self.stream.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def close(self) -> FileRecord:
        self.stream.close()
        return FileRecord(self.size, self.sha256.hexdigest())


@define
class ShardWriter:
    """Writes the documents of one bucket of one split, shard after shard, below ``root``."""

    root: Path
    prefix: str
    """``train/all``: the bucket's directory, relative to ``root``."""
    dtype: DTypeLike
    eod_id: int
    vocab_size: int
    shard_tokens: int = SHARD_TOKENS
    records: list[ShardRecord] = field(factory=list, init=False)
    _bin: _File | None = field(default=None, init=False)
    _starts: list[NDArray[np.int64]] = field(factory=list, init=False)
    _size: int = field(default=0, init=False)

    def add(self, ids: Sequence[int]) -> None:
        """Append a document of at least one token."""
        self.extend(np.array([*ids, self.eod_id], np.int64), np.array([len(ids) + 1]))

    def extend(self, tokens: NDArray[Any], sizes: NDArray[np.int64]) -> None:
        """Append documents that end in EOD already, one after another in ``tokens``, and their sizes."""
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size):
            raise DataError(f"the tokenizer gave an id outside its vocabulary of {self.vocab_size} ids")
        ends = np.cumsum(sizes)
        done = begin = 0
        while done < len(ends):
            shard = self._bin or self._new()
            room = self.shard_tokens - self._size
            count = 1 + int(np.searchsorted(ends[done:] - begin, room, side="right"))
            taken = ends[done : done + count]
            shard.write(tokens[begin : int(taken[-1])].astype(self.dtype, copy=False))
            self._starts.append(taken + (self._size - begin))
            self._size += int(taken[-1]) - begin
            done, begin = done + len(taken), int(taken[-1])
            if self._size > self.shard_tokens:
                self._finish(shard)

    def close(self) -> tuple[ShardRecord, ...]:
        """Finish the last shard."""
        if self._bin is not None:
            self._finish(self._bin)
        return tuple(self.records)

    def _new(self) -> _File:
        path = self.root / f"{self.prefix}/shard-{len(self.records):05d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._bin, self._starts, self._size = _File(path), [np.array([1])], 1
        self._bin.write(np.array([self.eod_id], self.dtype))
        return self._bin

    def _finish(self, tokens: _File) -> None:
        starts = _File(tokens.path.with_suffix(".idx"))
        values = np.concatenate(self._starts)
        starts.write(values.astype("<i8", copy=False))
        name = f"{self.prefix}/{tokens.path.stem}"
        self.records.append(ShardRecord(name, len(values) - 1, self._size - 1, tokens.close(), starts.close()))
        self._bin = None
