"""A dataset as training sees it: two splits of numbered rows, and the tokenizer that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from gpt_simple._files import write_whole
from gpt_simple.config.schema import DataConfig
from gpt_simple.data.cache import Log, NotWritable, build_once, locked, reading
from gpt_simple.data.locate import index_of, packing_of
from gpt_simple.data.manifest import NANOGPT, REPORT, Manifest, SplitRecord, file_states, verify_checksums
from gpt_simple.data.mixture import Mixture, mixture
from gpt_simple.data.order import I64
from gpt_simple.data.packing import BestFitRows, ConcatRows, Rows, best_fit
from gpt_simple.data.shards import Shard, open_shard
from gpt_simple.data.sources import Weights
from gpt_simple.data.stream import StreamRows
from gpt_simple.hooks.batch import Tokenizer

IGNORED = -100
"""The label of a position that is no target."""


@frozen(eq=False)
class Split:
    """Rows of ``max_length`` positions, numbered through all buckets.

    ``targets`` counts the positions that are in the loss, ``bytes`` the text they stand for (UTF-8), ``nats`` is minus
    its log-probability under the source; both are None where unknown.
    """

    max_length: int
    parts: tuple[Rows, ...]
    buckets: Mapping[str, int]
    """Rows of each bucket, in the order of their numbers."""
    documents: int
    targets: int
    bytes: int | None
    nats: float | None

    @cached_property
    def _offsets(self) -> I64:
        return np.cumsum([0, *(len(part) for part in self.parts)])

    @property
    def rows(self) -> int:
        return int(self._offsets[-1])

    def rows_of(self, bucket: str) -> tuple[int, int]:
        """The first row of a bucket and their number. KeyError if there is no such bucket."""
        begin = 0
        for name, rows in self.buckets.items():
            if name == bucket:
                return begin, rows
            begin += rows
        raise KeyError(bucket)

    def targets_of(self, rows: I64) -> I64:
        """Number of targets in each of these rows, shape [n]."""
        targets = np.empty(len(rows), np.int64)
        for part, where, local in self._by_part(rows):
            targets[where] = part.targets(local)
        return targets

    def read(self, rows: I64, inputs: I64, labels: I64, starts: NDArray[np.bool_] | None) -> None:
        """Fill arrays of shape [n, T] with rows: token ids, labels (-100: no target), and where documents start."""
        for part, where, local in self._by_part(rows):
            part.shard.require_unchanged()
            block = part.read(local, starts=starts is not None)
            inputs[where] = block.inputs
            if block.scored is None:
                labels[where] = block.labels
            else:
                labels[where] = np.where(block.scored, block.labels.astype(np.int64), IGNORED)
            if starts is not None:
                starts[where] = block.starts

    def _by_part(self, rows: I64) -> list[tuple[Rows, I64 | slice, I64]]:
        """Each shard, which of the rows it has, and their numbers in it."""
        if len(self.parts) == 1:
            return [(self.parts[0], slice(None), rows)]
        number = np.searchsorted(self._offsets, rows, side="right") - 1
        places = [(i, np.flatnonzero(number == i)) for i in np.unique(number)]
        return [(self.parts[i], where, rows[where] - self._offsets[i]) for i, where in places]


@frozen(eq=False)
class Dataset:
    """Prepared data. ``fingerprint`` (sha256) changes whenever a token, the tokenizer or the format does.

    With a ``stream``, training reads that; ``train`` is then only its beginning, which was read before. ``weights`` is
    the function of the source that gives targets of training their weights, None if it has none.
    """

    directory: Path
    manifest: Manifest
    tokenizer: Tokenizer
    train: Split
    val: Split
    stream: StreamRows | None = None
    weights: Weights | None = None

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def floor(self) -> float | None:
        """The source's own cross-entropy on the val split in nats per target; None where the source is unknown."""
        nats = self.val.nats
        return None if nats is None or not self.val.targets else nats / self.val.targets

    def order(self, config: DataConfig, seed: int) -> Mixture:
        """The order of the train split's rows."""
        return mixture(
            self.train.buckets, config.curriculum, config.on_exhaustion, max_length=config.max_length, seed=seed
        )

    def describe(self) -> dict[str, Any]:
        """Counts of both splits, for people. Of a stream, ``train`` counts the beginning."""
        split = {
            name: {
                "documents": part.documents,
                "rows": part.rows,
                "targets": part.targets,
                "bytes": part.bytes,
                "buckets": dict(part.buckets),
            }
            for name, part in (("train", self.train), ("val", self.val))
        }
        return {
            "directory": str(self.directory),
            "tokenizer": self.tokenizer.name,
            "eod_id": self.tokenizer.eod_id,
            "vocab_size": self.tokenizer.vocab_size,
            "max_length": self.train.max_length,
            "buckets": dict(self.train.buckets),
            "stream": self.stream is not None,
            "floor": self.floor,
            **split,
        }


def open_dataset(directory: Path, tokenizer: Tokenizer, manifest: Manifest, config: DataConfig, log: Log) -> Dataset:
    """Map a dataset directory into memory, after its content was compared with its checksums once."""
    empty = SplitRecord(0, 0, 0, None, {})
    splits = [manifest.splits.get(name, empty) for name in ("train", "val")]
    with reading(directory):
        _verify_once(directory, manifest, index_of(directory, manifest), log)
        if _has_estimated_bytes(directory, manifest, splits) and not getattr(tokenizer, "token_bytes_are_exact", True):
            splits = [evolve(split, bytes=None) for split in splits]
        train, val = (_open_split(directory, manifest, split, config, log) for split in splits)
    return Dataset(directory, manifest, tokenizer, train, val)


def _has_estimated_bytes(directory: Path, manifest: Manifest, splits: Sequence[SplitRecord]) -> bool:
    """Whether the bytes in a manifest are sums of ``token_bytes``: those of nanoGPT's files are.

    Those of the halves of a single document were, in data sets of the first version of `tokenize`.
    """
    halves = (directory / REPORT).exists() and [split.documents for split in splits] == [1, 1]
    return manifest.source == NANOGPT or halves


def _open_split(directory: Path, manifest: Manifest, record: SplitRecord, config: DataConfig, log: Log) -> Split:
    parts: list[Rows] = []
    buckets = {}
    for bucket in sorted(record.buckets):
        shards = [open_shard(directory, shard, manifest) for shard in record.buckets[bucket]]
        rows: list[Rows] = [
            ConcatRows(shard, config.max_length)
            if config.packing == "concat"
            else _cached_best_fit(shard, *packing_of(shard.record, directory, manifest, config), config, log)
            for shard in shards
        ]
        buckets[bucket] = sum(map(len, rows))
        parts += rows
    totals = record.documents, record.tokens, record.bytes, record.nats
    return Split(config.max_length, tuple(parts), buckets, *totals)


def _cached_best_fit(shard: Shard, target: Path, made_from: str, config: DataConfig, log: Log) -> BestFitRows:
    """The packing of a shard, which is computed once and then mapped into memory.

    Where it cannot be kept, each process computes its own.
    """

    def fill(directory: Path) -> None:
        best_fit(shard, config.max_length, config.overlap_size).save(directory, made_from)

    try:
        return build_once(target, fill, log, lambda: BestFitRows.load(target, made_from, shard, config.max_length))
    except NotWritable as error:
        log(f"{error.problems[0].message}: the packing is computed again in every launch")
        return best_fit(shard, config.max_length, config.overlap_size)


def _verify_once(directory: Path, manifest: Manifest, index: Path, log: Log) -> None:
    """Compare the checksums of all files, but for those that have the size and time of an earlier comparison."""
    stamp = index / f"verified-{manifest.fingerprint[:16]}.json"
    if _seen(stamp) == file_states(directory, manifest):
        return
    with ExitStack() as lock:
        try:
            lock.enter_context(locked(index, "verified", log))
        except NotWritable as error:
            log(f"{error.problems[0].message}: the data are compared with their checksums in every launch")
            verify_checksums(directory, manifest, {})
            return
        seen = _seen(stamp)
        now = verify_checksums(directory, manifest, seen)
        if now != seen:
            try:
                write_whole(stamp, json.dumps(now))
            except OSError as error:
                log(f"{stamp}: {error.strerror}: the data are compared with their checksums in every launch")


def _seen(stamp: Path) -> dict[str, Any]:
    """What an earlier comparison has found; nothing if its record cannot be read."""
    try:
        seen = json.loads(stamp.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return seen if isinstance(seen, dict) else {}
