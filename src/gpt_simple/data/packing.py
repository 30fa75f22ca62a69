"""How documents are cut into rows of ``max_length`` inputs and targets.

A row is made of spans of a shard. A span (start, length) predicts the tokens at ``start .. start + length - 1``, each
from the token before it; what comes before a document is the EOD of the one before. What a row does not fill is EOD
that is no target. Whatever the policy, every token of every document and every document's EOD is a target exactly once:

- ``concat``: row ``r`` of a shard is the one span that starts at ``1 + r * max_length``;
- ``best_fit``: a document that fits into a row is never split (best-fit decreasing); a longer one is cut into
  windows of ``max_length`` that share ``overlap`` tokens, and the shared ones are targets in the earlier
  window only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gpt_simple.data.manifest import content
from gpt_simple.data.order import I64
from gpt_simple.data.shards import Shard
from gpt_simple.errors import DataError

CHECKSUM = "sha256"
"""The file beside the arrays of a packing: a hash of them, and of what they were made from."""

_ARRAYS = ("spans", "offsets", "row_targets")

Bools = NDArray[np.bool_]


@frozen(eq=False)
class Block:
    """Some rows, [n, T] each."""

    inputs: NDArray[Any]
    labels: NDArray[Any]
    scored: Bools | None
    """Which labels are targets; None: all."""
    starts: Bools | None = None
    """Where a document, a window of one or the padding begins; always in column 0. None if ``read`` omits them."""


@frozen(eq=False)
class ConcatRows:
    """The stream, cut every ``max_length`` tokens; only the last row may not be full."""

    shard: Shard
    max_length: int

    def __len__(self) -> int:
        return -(-self.shard.targets // self.max_length)

    def targets(self, rows: I64) -> I64:
        """Number of targets of each row."""
        return np.minimum(self.shard.targets - rows * self.max_length, self.max_length)

    def read(self, rows: I64, *, starts: bool) -> Block:
        width, begin, filled = self.max_length + 1, rows * self.max_length, self.targets(rows)
        full = filled == self.max_length
        if whole := bool(full.all()):
            block = sliding_window_view(self.shard.tokens, width)[begin]
        else:
            block = np.full((len(rows), width), self.shard.eod_id, self.shard.tokens.dtype)
            for i, (first, count) in enumerate(zip(begin, filled + 1, strict=True)):
                block[i, :count] = self.shard.tokens[first : first + count]
        self.shard.check(block, lambda flat: int(begin[flat // width]) + flat % width)
        inputs, labels = block[:, :-1], block[:, 1:]
        columns = np.arange(self.max_length)
        scored = None if whole else columns < filled[:, None]
        if not starts:
            return Block(inputs, labels, scored)
        begins = (inputs == self.shard.eod_id) & (columns <= filled[:, None])
        begins[:, 0] = True
        return Block(inputs, labels, scored, begins)


@frozen(eq=False)
class BestFitRows:
    """Rows that were put together by ``best_fit``.

    ``spans`` is int64 [spans, 3]: start, length, and how many of its first labels another window scores. Row
    ``r`` has the spans ``offsets[r] .. offsets[r + 1] - 1``.
    """

    shard: Shard
    max_length: int
    spans: I64
    offsets: I64
    row_targets: I64

    def __len__(self) -> int:
        return len(self.row_targets)

    def targets(self, rows: I64) -> I64:
        """Number of targets of each row."""
        return self.row_targets[rows]

    def read(self, rows: I64, *, starts: bool) -> Block:
        tokens, size = self.shard.tokens, len(rows) * self.max_length
        counts = self.offsets[rows + 1] - self.offsets[rows]
        spans = self.spans[np.repeat(self.offsets[rows], counts) + _ranges(counts)]
        row = np.repeat(np.arange(len(rows)), counts)
        begin, length, masked = spans.T
        before = np.cumsum(length) - length
        place = row * self.max_length + before - np.repeat(before[np.cumsum(counts) - counts], counts)
        filled = np.bincount(row, length, len(rows)).astype(np.int64)
        padding = np.arange(self.max_length) >= filled[:, None]

        # Along a row the source goes on by one, except where a span begins: so one running sum finds all of it.
        jump = np.zeros(size, np.int64)
        jump[place] = np.diff(begin - place, prepend=0)
        source = np.minimum(np.cumsum(jump) + np.arange(size), len(tokens) - 1)
        labels = tokens[source].reshape(padding.shape)
        self.shard.check(labels, lambda flat: int(source[flat]))
        labels[padding] = self.shard.eod_id
        inputs = np.empty_like(labels)
        inputs[:, 1:] = labels[:, :-1]
        inputs.flat[place] = tokens[begin - 1]
        scored = ~padding
        shared = masked > 0
        scored.flat[np.repeat(place[shared], masked[shared]) + _ranges(masked[shared])] = False
        if not starts:
            return Block(inputs, labels, scored)
        begins = np.zeros(padding.shape, bool)
        begins.flat[place] = True
        padded = np.flatnonzero(filled < self.max_length)
        begins[padded, filled[padded]] = True
        return Block(inputs, labels, scored, begins)

    def save(self, directory: Path, made_from: str) -> None:
        """Write the arrays so that ``load`` with the same ``made_from`` returns equal rows."""
        for name in _ARRAYS:
            np.save(_file(directory, name), getattr(self, name), allow_pickle=False)
        (directory / CHECKSUM).write_text(_checksum(directory, made_from))

    @classmethod
    def load(cls, directory: Path, made_from: str, shard: Shard, max_length: int) -> BestFitRows:
        """Map the arrays into memory. Raises DataError unless they are as ``save`` wrote them."""
        verify_packing(directory, made_from)
        arrays = {name: np.load(_file(directory, name), mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return cls(shard, max_length, **arrays)


Rows = ConcatRows | BestFitRows
"""The rows of a shard under a packing."""


def verify_packing(directory: Path, made_from: str) -> None:
    """Raise DataError unless the arrays in a directory are those that were made from this."""
    try:
        known, found = (directory / CHECKSUM).read_bytes().decode(errors="replace"), _checksum(directory, made_from)
    except OSError as error:
        raise DataError(f"{directory}: cannot be read ({error})") from error
    if known != found:
        raise DataError(f"{directory}: its content is not what was written")


def packed_rows(directory: Path, made_from: str) -> int | None:
    """The number of rows of a packing that was saved; None if there is none that can be used."""
    try:
        verify_packing(directory, made_from)
    except DataError:
        return None
    return len(np.load(_file(directory, "row_targets"), mmap_mode="r", allow_pickle=False))


def _file(directory: Path, array: str) -> Path:
    return directory / f"{array}.npy"


def _checksum(directory: Path, made_from: str) -> str:
    files = [content(_file(directory, name)) for name in _ARRAYS]
    return hashlib.sha256(json.dumps([made_from, files]).encode()).hexdigest()


def best_fit(shard: Shard, max_length: int, overlap: int) -> BestFitRows:
    """Pack the documents of a shard: the longest piece first, each into the fullest row that has room for it."""
    start, length, masked = _pieces(np.asarray(shard.starts), max_length, overlap)
    longest_first = np.argsort(-length, kind="stable")
    row = np.empty(len(length), np.int64)
    row[longest_first] = _assign(length[longest_first], max_length)
    order = np.lexsort((-length, row))
    spans = np.stack([start, length, masked], axis=1)[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row))])
    targets = np.add.reduceat(spans[:, 1] - spans[:, 2], offsets[:-1])
    return BestFitRows(shard, max_length, spans, offsets, targets)


def _pieces(starts: I64, max_length: int, overlap: int) -> tuple[I64, I64, I64]:
    """Documents as spans (start, length, masked), those longer than a row as windows."""
    sizes, stride = np.diff(starts), max_length - overlap
    counts = np.maximum(1, -(-(sizes - overlap) // stride))
    window = _ranges(counts)
    skipped = window * stride
    length = np.minimum(np.repeat(sizes, counts) - skipped, max_length)
    return np.repeat(starts[:-1], counts) + skipped, length, np.where(window > 0, overlap, 0)


def _assign(lengths: I64, max_length: int) -> I64:
    """The row of each piece, for lengths that descend.

    Rows with equal room are one class, and equal lengths are placed together: the fullest row that takes a piece is
    still the fullest after it, so a class is filled row by row and the work is that of distinct lengths, not pieces.
    """
    row = np.empty(len(lengths), np.int64)
    room: list[list[I64]] = [[] for _ in range(max_length + 1)]
    open_rooms = np.zeros(max_length + 1, bool)
    rows, next_piece = 0, 0
    for length, count in zip(*(part[::-1].tolist() for part in np.unique(lengths, return_counts=True)), strict=True):
        while count:
            fit = length + int(open_rooms[length:].argmax())
            if open_rooms[fit]:
                bins = np.concatenate(room[fit])
            else:
                fit = max_length
                bins = np.arange(rows, rows - (-count // (fit // length)))
                rows += len(bins)
            each = fit // length
            placed = min(count, each * len(bins))
            used = -(-placed // each)
            row[next_piece : next_piece + placed] = np.repeat(bins[:used], each)[:placed]
            whole, rest = placed // each, placed % each
            room[fit] = [bins[used:]] if used < len(bins) else []
            room[fit - each * length].append(bins[:whole])
            if rest:
                room[fit - rest * length].append(bins[whole:used])
                open_rooms[fit - rest * length] = True
            open_rooms[fit] = bool(room[fit])
            open_rooms[fit - each * length] |= whole > 0
            next_piece += placed
            count -= placed
    return row


def _ranges(counts: I64) -> I64:
    """``0 .. counts[0] - 1, 0 .. counts[1] - 1, ...``"""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
