"""Batches on the device, from a dataset and one integer: the samples consumed.

Row ``b`` of ``B`` in micro-batch ``a`` of rank ``r`` of ``W`` is sample ``consumed + (a * W + r) * B + b`` of the
order, so a run goes on with any number of processes where it stopped. Every rank computes the number of targets of a
step without communication. Threads read several steps at once and ahead: the training thread only takes views.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from gpt_simple.config.schema import Config
from gpt_simple.data.dataset import IGNORED, Dataset, Split
from gpt_simple.data.locate import order_seed
from gpt_simple.data.order import I64, key, permute
from gpt_simple.hooks.batch import Batch

CHUNK_TOKENS = 1 << 17
CHUNK_STEPS = 64
"""A chunk is as many steps as hold about ``CHUNK_TOKENS`` tokens of this process, at most ``CHUNK_STEPS``."""

LOCATED = 1 << 12
"""Samples whose rows are located at once."""

EVALUATION_STREAM = 3
"""Key of the choice of rows when not the whole val split is evaluated: the same for every run."""

PADDING = -1
"""The number of a row that only fills a batch."""

T = TypeVar("T")

Rows = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Inputs, labels, positions, documents and weights of some rows, [n, T] each.

Positions and documents only with a document mask, weights only in training and if the source gives them.
"""


class DataExhausted(Exception):
    """There is no further whole step: the data have been read as often as ``data.on_exhaustion`` allows."""


@frozen(eq=False)
class StepData:
    """The micro-batches of a step on this process; the counts are over all processes and micro-batches."""

    batches: tuple[Batch, ...]
    first_sample: int
    samples: int
    tokens: int
    targets: int


@frozen(eq=False)
class _Chunk:
    """Some steps of this process, and the targets of each micro-batch [steps, A] and of each step [steps]."""

    rows: Rows
    first_sample: int
    targets: list[list[int]]
    step_targets: list[int]


class Loader:
    """Steps from sample ``consumed`` on, and the batches of an evaluation, for one process of ``world_size``.

    ``wait_seconds`` sums the time that the training thread waited for data. The position in the data belongs
    to the caller: a loader only goes forward.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        *,
        world_size: int = 1,
        rank: int = 0,
        device: torch.device | str = "cpu",
        consumed: int = 0,
    ) -> None:
        self.wait_seconds = 0.0
        self._dataset, self._config = dataset, config
        self._world_size, self._rank, self._device = world_size, rank, torch.device(device)
        self._batch = config.training.per_device_batch_size
        self._accumulation = config.training.gradient_accumulation_steps
        self._samples = self._accumulation * world_size * self._batch
        own_tokens = self._accumulation * self._batch * config.data.max_length
        self._chunk_steps = min(max(CHUNK_TOKENS // own_tokens, 1), CHUNK_STEPS)
        self._order = None if dataset.stream else dataset.order(config.data, order_seed(config))
        self._located = lru_cache(maxsize=8)(self._locate)
        # The blocks of a stream come one after another.
        workers = min(config.data.num_workers, 1) if dataset.stream else config.data.num_workers
        self._pool = ThreadPoolExecutor(workers, "data") if workers else None
        self._ahead = workers + 1
        self._steps = self._make_steps(consumed)

    def samples_total(self) -> int | None:
        """Number of samples in the order; None: endless, or unknown."""
        return None if self._order is None else self._order.total

    def steps_after(self, consumed: int) -> int | None:
        """Whole steps after so many samples; None: endless, or unknown."""
        total = self.samples_total()
        return None if total is None else max(0, total - consumed) // self._samples

    def next_step(self) -> StepData:
        """The next step. Raises DataExhausted after the last one, and whatever went wrong in a thread."""
        if (step := next(self._steps, None)) is not None:
            return step
        total = self.samples_total()
        after = "" if total is None else f" after {total} samples"
        raise DataExhausted(f'the data end{after} (data.on_exhaustion = "{self._config.data.on_exhaustion}")')

    def val_batches(self, max_batches: int | None = None) -> Iterator[Batch]:
        """This process's share of the val split: every row once over all processes.

        Every process gets as many batches; the last ones are filled with rows without a target. ``max_batches`` caps
        the rows of all processes at that number times the batch size: a fixed sample, whatever their number.
        """
        split, size = self._dataset.val, self._batch
        chosen = np.arange(split.rows)
        if max_batches is not None and max_batches * size < split.rows:
            chosen = np.sort(permute(key(EVALUATION_STREAM), split.rows, np.arange(max_batches * size)))
        rounds = -(-len(chosen) // (self._world_size * size))
        padded = np.full(rounds * self._world_size * size, PADDING)
        padded[: len(chosen)] = chosen
        mine = padded.reshape(rounds, self._world_size * size)[:, self._rank * size :][:, :size]
        per_chunk = max(1, CHUNK_TOKENS // (size * split.max_length))
        jobs = (partial(self._read, split, mine[i : i + per_chunk].reshape(-1)) for i in range(0, rounds, per_chunk))
        first = self._rank * size
        for rows in self._prefetched(jobs):
            targets = (rows[1] != IGNORED).view(-1, size * split.max_length).sum(1).tolist()
            for (inputs, labels, positions, documents, _), count in zip(self._batches(rows), targets, strict=True):
                yield Batch(inputs, labels, positions, documents, first, count)
                first += self._world_size * size

    def close(self) -> None:
        """Stop the threads. Waits for the reads that have begun, not for those that are queued."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _make_steps(self, consumed: int) -> Iterator[StepData]:
        tokens = self._samples * self._config.data.max_length
        stride = self._world_size * self._batch
        for chunk in self._prefetched(self._chunks(consumed)):
            if chunk is None:
                return
            first, batches = chunk.first_sample, self._batches(chunk.rows)
            for targets, step_targets in zip(chunk.targets, chunk.step_targets, strict=True):
                begin = first + self._rank * self._batch
                step = tuple(
                    Batch(inputs, labels, positions, documents, begin + a * stride, count, weights)
                    for a, (count, (inputs, labels, positions, documents, weights)) in enumerate(
                        zip(targets, batches, strict=False)
                    )
                )
                yield StepData(step, first, self._samples, tokens, step_targets)
                first += self._samples

    def _batches(self, rows: Rows) -> Iterator[Rows]:
        """Views of one batch each, on the device; the copy does not wait."""
        count = len(rows[0]) // self._batch
        views = (
            itertools.repeat(None, count)
            if tensor is None
            else tensor.to(self._device, non_blocking=True).view(count, self._batch, -1).unbind()
            for tensor in rows
        )
        return zip(*views, strict=True)

    def _chunks(self, first: int) -> Iterator[Callable[[], _Chunk | None]]:
        """Reads chunk after chunk from sample ``first`` on; at the end of a stream the chunk is None."""
        stream = self._dataset.stream
        blocks = None if stream is None else stream.blocks(first, self._chunk_steps * self._samples)
        while True:
            left = self.steps_after(first)
            steps = self._chunk_steps if left is None else min(self._chunk_steps, left)
            if not steps:
                return
            yield partial(self._chunk, first, steps) if blocks is None else partial(self._stream_chunk, blocks, first)
            first += steps * self._samples

    def _chunk(self, first: int, steps: int) -> _Chunk:
        split = self._dataset.train
        rows = self._rows_of(first, steps * self._samples)
        shape = (steps, self._accumulation, self._world_size, self._batch)
        targets = split.targets_of(rows).reshape(shape).sum(3)
        mine = self._read(split, rows.reshape(shape)[:, :, self._rank].reshape(-1))
        return _Chunk(self._weighed(mine), first, targets[:, :, self._rank].tolist(), targets.sum((1, 2)).tolist())

    def _stream_chunk(self, blocks: Iterator[I64], first: int) -> _Chunk | None:
        block = next(blocks, None)
        steps = 0 if block is None else len(block) // self._samples
        if block is None or not steps:
            return None
        shape = (steps, self._accumulation, self._world_size, self._batch, block.shape[1])
        mine = block[: steps * self._samples].reshape(shape)[:, :, self._rank].reshape(-1, block.shape[1])
        inputs, labels, starts = self._empty(len(mine))
        inputs.numpy()[:], labels.numpy()[:] = mine[:, :-1], mine[:, 1:]
        if starts is not None:
            np.equal(mine[:, :-1], self._dataset.tokenizer.eod_id, out=starts)
            starts[:, 0] = True
        per_batch = self._batch * (block.shape[1] - 1)
        targets = [[per_batch] * self._accumulation] * steps
        per_step = per_batch * self._accumulation * self._world_size
        rows = self._weighed(self._with_documents(inputs, labels, starts))
        return _Chunk(rows, first, targets, [per_step] * steps)

    def _rows_of(self, first: int, count: int) -> I64:
        """The rows of samples, which are located many at once: one by one they cost several times as much."""
        blocks = range(first // LOCATED, -(-(first + count) // LOCATED))
        rows = np.concatenate([self._located(block) for block in blocks])
        return rows[first - blocks[0] * LOCATED :][:count]

    def _locate(self, block: int) -> I64:
        assert self._order is not None
        end, total = (block + 1) * LOCATED, self._order.total
        return self._order.locate(np.arange(block * LOCATED, end if total is None else min(end, total)))

    def _read(self, split: Split, rows: I64) -> Rows:
        """Rows as tensors of their own; those that are ``PADDING`` have no target."""
        inputs, labels, starts = self._empty(len(rows))
        split.read(np.maximum(rows, 0), inputs.numpy(), labels.numpy(), starts)
        labels.numpy()[rows == PADDING] = IGNORED
        return self._with_documents(inputs, labels, starts)

    def _empty(self, count: int) -> tuple[Tensor, Tensor, NDArray[np.bool_] | None]:
        """New inputs and labels of ``count`` rows, and, with a document mask, where documents start."""
        starts = np.empty((count, self._config.data.max_length), bool) if self._config.data.document_mask else None
        return self._tensor(count), self._tensor(count), starts

    def _tensor(self, count: int) -> Tensor:
        pinned = self._device.type == "cuda"
        return torch.empty((count, self._config.data.max_length), dtype=torch.int64, pin_memory=pinned)

    def _with_documents(self, inputs: Tensor, labels: Tensor, starts: NDArray[np.bool_] | None) -> Rows:
        """The rows with positions that restart, and numbers that rise by one, where a document starts."""
        if starts is None:
            return inputs, labels, None, None, None
        count, length = starts.shape
        positions, documents = self._tensor(count), self._tensor(count)
        begin = np.flatnonzero(starts)
        sizes = np.diff(begin, append=starts.size)
        first = np.searchsorted(begin, np.arange(count) * length)
        number = np.arange(len(begin)) - np.repeat(first, np.diff(first, append=len(begin)))
        documents.numpy().reshape(-1)[:] = np.repeat(number, sizes)
        positions.numpy().reshape(-1)[:] = np.arange(starts.size) - np.repeat(begin, sizes)
        return inputs, labels, positions, documents, None

    def _weighed(self, rows: Rows) -> Rows:
        """The rows with the weights that the source gives their targets."""
        if (weights := self._dataset.weights) is None:
            return rows
        inputs, labels, positions, documents, _ = rows
        factors = torch.empty(labels.shape, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        factors.numpy()[:] = weights(inputs.numpy(), labels.numpy(), self._dataset.tokenizer)
        return inputs, labels, positions, documents, factors

    def _prefetched(self, jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
        """The results of jobs in their order, some of them ahead in the threads."""
        if self._pool is None:
            for job in jobs:
                yield job()
            return
        pending: deque[Future[T]] = deque()
        for job in jobs:
            pending.append(self._pool.submit(job))
            if len(pending) > self._ahead:
                yield self._wait(pending.popleft())
        while pending:
            yield self._wait(pending.popleft())

    def _wait(self, future: Future[T]) -> T:
        begin = time.perf_counter()
        try:
            return future.result()
        finally:
            self.wait_seconds += time.perf_counter() - begin
