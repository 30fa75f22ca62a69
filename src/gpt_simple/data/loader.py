"""Batches on the device, from a dataset and the plan of its steps.

Sample ``b`` of ``B`` in micro-batch ``a`` of rank ``r`` of ``W`` is sample ``first + (a * W + r) * B + b`` of the
order, where ``first`` is that of the step, so a run goes on with any number of processes where it stopped. A sample is
one row, or several in a stage of shorter rows. Every rank computes the number of targets of a step without
communication. Threads read several steps at once and ahead: the training thread only takes views.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from gpt_simple.data.host_memory import host_tensor
from gpt_simple.data.locate import order_seed
from gpt_simple.data.order import I64, key, permute
from gpt_simple.data.plan import BatchPlan
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


def steps_per_chunk(own_tokens: int) -> int:
    """Steps in a chunk, where a step has ``own_tokens`` tokens of this process."""
    return min(max(CHUNK_TOKENS // own_tokens, 1), CHUNK_STEPS)


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
    first_step: int
    targets: list[list[int]]
    step_targets: list[int]


class Loader:
    """The steps of ``plan``, and the batches of an evaluation, for one process of ``world_size``.

    The plan begins after step ``step`` and sample ``consumed``. ``wait_seconds`` sums the time that the training thread
    waited for data. The position in the data belongs to the caller: a loader only goes forward.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        *,
        world_size: int = 1,
        rank: int = 0,
        device: torch.device | str = "cpu",
        step: int = 0,
        consumed: int = 0,
    ) -> None:
        self.wait_seconds = 0.0
        self.plan = BatchPlan.of(config, world_size=world_size, step=step, samples=consumed)
        self._dataset, self._config = dataset, config
        self._world_size, self._rank, self._device = world_size, rank, torch.device(device)
        self._batch = config.training.per_device_batch_size
        self._order = None if dataset.stream else dataset.order(config.data, order_seed(config))
        self._located = lru_cache(maxsize=8)(self._locate)
        # The blocks of a stream come one after another.
        workers = min(config.data.num_workers, 1) if dataset.stream else config.data.num_workers
        self._pool = ThreadPoolExecutor(workers, "data") if workers else None
        self._ahead = workers + 1
        self._steps = self._make_steps()

    def samples_total(self) -> int | None:
        """Number of samples in the order; None: endless, or unknown."""
        return None if self._order is None else self._order.total

    def last_step(self) -> int | None:
        """The last step for which there are data; None: endless, or unknown."""
        total = self.samples_total()
        return None if total is None else self.plan.last_step(total)

    def next_step(self) -> StepData:
        """The next step. Raises DataExhausted after the last one, and whatever went wrong in a thread."""
        if (step := next(self._steps, None)) is not None:
            return step
        total = self.samples_total()
        after = "" if total is None else f" after {total} samples"
        raise DataExhausted(f'the data end{after} (data.on_exhaustion = "{self._config.data.on_exhaustion}")')

    @property
    def val_buckets(self) -> Mapping[str, int]:
        """Rows of each bucket of the val split."""
        return self._dataset.val.buckets

    @property
    def has_samples(self) -> bool:
        """Whether ``batches`` can read any sample again: a stream is read once, forward."""
        return self._order is not None

    def val_batches(self, max_batches: int | None = None, bucket: str | None = None) -> Iterator[Batch]:
        """This process's share of the val split, or of one ``bucket`` of it: every row once over all processes.

        Every process gets as many batches; the last ones are filled with rows without a target. ``max_batches`` caps
        the rows of all processes at that number times the batch size: a fixed sample, whatever their number.
        """
        split, size, world = self._dataset.val, self._batch, self._world_size
        begin, count = (0, split.rows) if bucket is None else split.rows_of(bucket)
        chosen = np.arange(count)
        if max_batches is not None and max_batches * size < count:
            chosen = np.sort(permute(key(EVALUATION_STREAM), count, np.arange(max_batches * size)))
        rows = _padded(begin + chosen, world * size).reshape(-1, world, size)[:, self._rank]
        first = range(self._rank * size, len(rows) * world * size, world * size)
        return self._batches_of(split, rows, first)

    def batches(self, samples: I64) -> Iterator[Batch]:
        """These samples of the order, in this order, all of them on this process.

        The last batch is filled with rows without a target.
        """
        assert self._order is not None, "the caller has checked has_samples"
        if not len(samples):
            return iter(())
        ascending, place = np.unique(samples, return_inverse=True)
        rows = _padded(self._order.locate(ascending)[place], self._batch).reshape(-1, self._batch)
        return self._batches_of(self._dataset.train, rows, samples[:: self._batch].tolist())

    def _batches_of(self, split: Split, rows: I64, first: Sequence[int]) -> Iterator[Batch]:
        """Batches of these rows, shape [n, B], whose first samples have the numbers ``first``."""
        per_chunk = max(1, CHUNK_TOKENS // (self._batch * split.max_length))
        jobs = (partial(self._read, split, rows[i : i + per_chunk].reshape(-1)) for i in range(0, len(rows), per_chunk))
        numbers = iter(first)
        for chunk in self._prefetched(jobs):
            targets = (chunk[1] != IGNORED).view(-1, self._batch * split.max_length).sum(1).tolist()
            for (inputs, labels, positions, documents, _), count in zip(self._batches(chunk), targets, strict=True):
                yield Batch(inputs, labels, positions, documents, next(numbers), count)

    def close(self) -> None:
        """Stop the threads. Waits for the reads that have begun, not for those that are queued."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._steps = iter(())  # it refers to this loader, and its rows would stay on the device

    def _make_steps(self) -> Iterator[StepData]:
        stride = self._world_size * self._batch
        for chunk in self._prefetched(self._chunks()):
            if chunk is None:
                return
            (first, stage), batches = self.plan.at(chunk.first_step), self._batches(chunk.rows)
            for targets, total in zip(chunk.targets, chunk.step_targets, strict=True):
                begin = first + self._rank * self._batch
                own = tuple(
                    Batch(inputs, labels, positions, documents, begin + a * stride, count, weights)
                    for a, (count, (inputs, labels, positions, documents, weights)) in enumerate(
                        zip(targets, batches, strict=False)
                    )
                )
                yield StepData(own, first, stage.samples, stage.tokens, total)
                first += stage.samples

    def _batches(self, rows: Rows) -> Iterator[Rows]:
        """Views of one batch each, on the device; the copy does not wait."""
        count, length = rows[0].numel() // (self._batch * self._config.data.max_length), rows[0].shape[1]
        views = (
            itertools.repeat(None, count)
            if tensor is None
            else tensor.to(self._device, non_blocking=True).view(count, -1, length).unbind()
            for tensor in rows
        )
        return zip(*views, strict=True)

    def _chunks(self) -> Iterator[Callable[[], _Chunk | None]]:
        """Reads chunk after chunk of the plan; at the end of a stream the chunk is None."""
        stream, blocks = self._dataset.stream, None
        if stream is not None:
            sizes = (steps * self.plan.stage(first).samples for first, steps in self._chunk_steps())
            blocks = stream.blocks(self.plan.samples, sizes)
        for first, steps in self._chunk_steps():
            yield partial(self._chunk, first, steps) if blocks is None else partial(self._stream_chunk, blocks, first)

    def _chunk_steps(self) -> Iterator[tuple[int, int]]:
        """The first step of each chunk and its number of steps, which are of one stage."""
        last, step = self.last_step(), self.plan.step + 1
        while last is None or step <= last:
            end = step + steps_per_chunk(self.plan.stage(step).tokens // self._world_size)
            ends = (end, self.plan.stage_end(step), None if last is None else last + 1)
            end = min(each for each in ends if each is not None)
            yield step, end - step
            step = end

    def _chunk(self, first_step: int, steps: int) -> _Chunk:
        split, (first, stage) = self._dataset.train, self.plan.at(first_step)
        rows = self._rows_of(first, steps * stage.samples)
        shape = (steps, stage.accumulation, self._world_size, self._batch)
        targets = split.targets_of(rows).reshape(shape).sum(3)
        mine = self._read(split, rows.reshape(shape)[:, :, self._rank].reshape(-1), stage.length, weighed=True)
        return _Chunk(mine, first_step, targets[:, :, self._rank].tolist(), targets.sum((1, 2)).tolist())

    def _stream_chunk(self, blocks: Iterator[I64], first_step: int) -> _Chunk | None:
        block, stage = next(blocks, None), self.plan.stage(first_step)
        steps = 0 if block is None else len(block) // stage.samples
        if block is None or not steps:
            return None
        shape = (steps, stage.accumulation, self._world_size, self._batch, block.shape[1])
        mine = block[: steps * stage.samples].reshape(shape)[:, :, self._rank].reshape(-1, block.shape[1])
        inputs, labels, starts = self._empty(len(mine))
        inputs.numpy()[:], labels.numpy()[:] = mine[:, :-1], mine[:, 1:]
        if starts is not None:
            np.equal(mine[:, :-1], self._dataset.tokenizer.eod_id, out=starts)
        per_batch = self._batch * (block.shape[1] - 1)
        targets = [[per_batch] * stage.accumulation] * steps
        rows = self._cut(inputs, labels, starts, self._weights_of(inputs, labels), stage.length)
        return _Chunk(rows, first_step, targets, [stage.tokens] * steps)

    def _rows_of(self, first: int, count: int) -> I64:
        """The rows of samples, which are located many at once: one by one they cost several times as much."""
        blocks = range(first // LOCATED, -(-(first + count) // LOCATED))
        rows = np.concatenate([self._located(block) for block in blocks])
        return rows[first - blocks[0] * LOCATED :][:count]

    def _locate(self, block: int) -> I64:
        assert self._order is not None
        end, total = (block + 1) * LOCATED, self._order.total
        return self._order.locate(np.arange(block * LOCATED, end if total is None else min(end, total)))

    def _read(self, split: Split, rows: I64, length: int | None = None, *, weighed: bool = False) -> Rows:
        """Rows as tensors of their own, cut to ``length``; those that are ``PADDING`` have no target.

        ``weighed``: with the weights of the source, as in training.
        """
        inputs, labels, starts = self._empty(len(rows))
        split.read(np.maximum(rows, 0), inputs.numpy(), labels.numpy(), starts)
        labels.numpy()[rows == PADDING] = IGNORED
        weights = self._weights_of(inputs, labels) if weighed else None
        return self._cut(inputs, labels, starts, weights, length or split.max_length)

    def _empty(self, count: int) -> tuple[Tensor, Tensor, NDArray[np.bool_] | None]:
        """New inputs and labels of ``count`` rows, and, with a document mask, where documents start."""
        starts = np.empty((count, self._config.data.max_length), bool) if self._config.data.document_mask else None
        return self._tensor(count), self._tensor(count), starts

    def _tensor(self, count: int) -> Tensor:
        return host_tensor((count, self._config.data.max_length), torch.int64, pinned=self._device.type == "cuda")

    def _cut(
        self, inputs: Tensor, labels: Tensor, starts: NDArray[np.bool_] | None, weights: Tensor | None, length: int
    ) -> Rows:
        """Rows cut to ``length``, with positions that restart, and numbers that rise by one, where a document starts.

        A document that goes on in the next row starts again there: no row attends to another.
        """
        weights = None if weights is None else weights.view(-1, length)
        if starts is None:
            return inputs.view(-1, length), labels.view(-1, length), None, None, weights
        positions, documents = self._tensor(len(starts)), self._tensor(len(starts))
        starts = starts.reshape(-1, length)
        starts[:, 0] = True
        count = len(starts)
        begin = np.flatnonzero(starts)
        sizes = np.diff(begin, append=starts.size)
        first = np.searchsorted(begin, np.arange(count) * length)
        number = np.arange(len(begin)) - np.repeat(first, np.diff(first, append=len(begin)))
        documents.numpy().reshape(-1)[:] = np.repeat(number, sizes)
        positions.numpy().reshape(-1)[:] = np.arange(starts.size) - np.repeat(begin, sizes)
        inputs, labels, positions, documents = (x.view(-1, length) for x in (inputs, labels, positions, documents))
        return inputs, labels, positions, documents, weights

    def _weights_of(self, inputs: Tensor, labels: Tensor) -> Tensor | None:
        """The factors that the source gives the targets of whole rows."""
        if (weights := self._dataset.weights) is None:
            return None
        factors = host_tensor(labels.shape, torch.float32, pinned=self._device.type == "cuda")
        factors.numpy()[:] = weights(inputs.numpy(), labels.numpy(), self._dataset.tokenizer)
        return factors

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


def _padded(rows: I64, multiple: int) -> I64:
    """``rows`` and so much padding that their number is a multiple."""
    return np.pad(rows, (0, -len(rows) % multiple), constant_values=PADDING)
