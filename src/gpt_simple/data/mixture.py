"""Which row is sample number ``i`` of a run: a pure function, without state.

Without a curriculum, all rows of all buckets are one permuted epoch after another. With one, samples are dealt to
buckets by their weights, in periods of 65,536 slots. The ``k``-th of a bucket's ``c`` slots in a period is put at
``(k + u) / c`` of it, with ``u`` drawn for every slot from -1/2 to 3/2 (places outside of the period are folded back),
and samples come in the order of these places. So before any place in a period a bucket is less than 1.5 samples off its
due. After any number of samples, wherever a phase ends, a bucket with share ``w`` among ``B`` >= 2 is off by less than
``1.5 * (1 + w * (B - 2))``, and by nothing at the end of a period. The draws of neighbours overlap because with ``u``
from 0 to 1, weights like 1:3 would give each of 4 ranks other shares.

A sample's number inside its bucket is the period times the bucket's slots plus the slots before it: buckets are read in
their own permuted epochs and the next phase goes on where the last one stopped. When a bucket ends, or the run does,
follows from the weights alone and is known before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from gpt_simple.config.schema import Phase
from gpt_simple.data.order import I64, key, permute, subkeys
from gpt_simple.errors import ConfigError, DataError, did_you_mean

SLOTS = 1 << 16

ROWS_STREAM, SLOTS_STREAM = 1, 2
"""Keys of the two kinds of permutation, so that they never share one."""


@frozen
class Segment:
    """A stretch of samples with one set of weights: slots per bucket, and each bucket's samples before ``begin``."""

    number: int
    begin: int
    end: int | None
    slots: tuple[int, ...]
    given: tuple[int, ...]


@frozen(eq=False)
class Mixture:
    """The order of a run over buckets of ``rows[b]`` rows each; rows are numbered through all buckets.

    ``total`` is the number of samples there are; None: endless.
    """

    rows: tuple[int, ...]
    seed: int
    segments: tuple[Segment, ...]
    total: int | None

    def locate(self, samples: I64) -> I64:
        """The row of each of these samples, which ascend."""
        if not self.segments:
            return self._in_epochs(0, sum(self.rows), samples)
        first_row = np.cumsum(self.rows) - self.rows
        located = np.empty_like(samples)
        for segment in self.segments:
            low = int(np.searchsorted(samples, segment.begin))
            high = len(samples) if segment.end is None else int(np.searchsorted(samples, segment.end))
            if low == high:
                continue
            bucket, number = _deal(segment, self.seed, samples[low:high] - segment.begin)
            for b in np.unique(bucket):
                mine = bucket == b
                located[low:high][mine] = first_row[b] + self._in_epochs(int(b) + 1, self.rows[b], number[mine])
        return located

    def taken(self, samples: int) -> tuple[int, ...]:
        """How many of the first ``samples`` each bucket gives; without a curriculum, in proportion to its rows."""
        if not self.segments:
            return tuple(samples * rows // max(1, sum(self.rows)) for rows in self.rows)
        last = max((s for s in self.segments if s.begin <= samples), key=lambda s: s.begin)
        dealt = _dealt(last, self.seed, samples - last.begin)
        return tuple((np.array(last.given) + dealt).tolist())

    def _in_epochs(self, stream: int, n: int, number: I64) -> I64:
        """Sample ``number`` (ascending) of ``n`` rows that are read in permuted epochs."""
        epoch, index = np.divmod(number, n)
        if epoch[0] == epoch[-1]:
            epoch = epoch[:1]
        return permute(subkeys(key(ROWS_STREAM, self.seed, stream), epoch), n, index)


def mixture(
    buckets: Mapping[str, int], curriculum: Sequence[Phase], on_exhaustion: str, *, max_length: int, seed: int
) -> Mixture:
    """The order over ``buckets`` (name -> rows).

    ``on_exhaustion``: ``repeat`` reads a bucket again in a new order; ``halt`` ends before the first sample
    that would be a repetition; ``renormalise`` goes on with the other buckets, in the same proportions, until
    none is left. The last phase of a curriculum goes on for as long as there are steps.
    """
    rows = tuple(buckets.values())
    if not curriculum:
        return Mixture(rows, seed, (), None if on_exhaustion == "repeat" else sum(rows))
    segments: list[Segment] = []
    given, begin = np.zeros(len(rows), np.int64), 0
    for number, phase in enumerate(curriculum, 1):
        weights = _weights(buckets, phase, f"phase {number}")
        end = None if number == len(curriculum) else begin + round(phase.duration_tokens / max_length)
        while end is None or begin < end:
            if on_exhaustion == "renormalise":
                weights = np.where(given < rows, weights, 0)
                if not weights.any():
                    break
            segment = Segment(len(segments), begin, end, _slots(weights), tuple(given.tolist()))
            if on_exhaustion != "repeat":
                exhausted = begin + _exhausted(segment, seed, rows)
                segment = evolve(segment, end=exhausted if end is None else min(exhausted, end))
            segments.append(segment)
            if segment.end is None or (on_exhaustion == "halt" and segment.end != end):
                return Mixture(rows, seed, tuple(segments), segment.end)
            given, begin = given + _dealt(segment, seed, segment.end - begin), segment.end
    return Mixture(rows, seed, tuple(segments), begin)


def _weights(buckets: Mapping[str, int], phase: Phase, where: str) -> NDArray[np.float64]:
    """The weight of every bucket over the largest, those that the phase does not name 0."""
    if not phase.mix:
        raise ConfigError(
            f"{where}: the mix names no bucket", key="data.curriculum", hint=f"the data have {', '.join(buckets)}"
        )
    largest = max(phase.mix.values())
    shares = {name: weight / largest if largest else 0.0 for name, weight in phase.mix.items()}
    least = sum(shares.values()) / SLOTS
    for name, weight in phase.mix.items():
        if name not in buckets:
            raise ConfigError(
                f"{where}: there is no bucket {name!r}{did_you_mean(name, buckets)}",
                key="data.curriculum",
                hint=f"the data have {', '.join(buckets)}",
            )
        if not weight > 0 or not math.isfinite(weight) or shares[name] < least:
            raise ConfigError(
                f"{where}: bucket {name!r} has weight {weight}",
                key="data.curriculum",
                hint=f"expected at least 1/{SLOTS:,} of the phase's sum, or leave it out",
            )
        if not buckets[name]:
            raise DataError(f"{where}: bucket {name!r} is empty", key="data.curriculum", hint="leave it out of the mix")
    return np.array([shares.get(name, 0.0) for name in buckets])


def _slots(weights: NDArray[np.float64]) -> tuple[int, ...]:
    """``SLOTS`` shared out by weight; what rounding down leaves goes to the largest remainders, the first of equals."""
    exact = weights / weights.sum() * SLOTS
    slots = np.floor(exact)
    rest = SLOTS - int(slots.sum())
    slots[np.argsort(slots - exact, kind="stable")[:rest]] += 1
    return tuple(slots.astype(int).tolist())


@lru_cache(maxsize=16)
def _period(slots: tuple[int, ...], seed: int, segment: int, period: int) -> tuple[I64, I64]:
    """The bucket of each of a period's samples, and how many of that bucket come before it in the period."""
    count = np.repeat(slots, slots)
    bits = subkeys(key(SLOTS_STREAM, seed, segment, period), np.arange(SLOTS)) >> np.uint64(32)
    # Exact up to the quotient, which IEEE 754 rounds alike on all platforms.
    place = np.abs(np.concatenate([np.arange(each) for each in slots]) - 0.5 + bits * 2.0**-31)
    order = np.argsort((count - np.abs(count - place)) / count, kind="stable")
    bucket = np.repeat(np.arange(len(slots)), slots)[order]
    before = np.empty(SLOTS, np.int64)
    before[np.argsort(bucket, kind="stable")] = np.concatenate([np.arange(each) for each in slots])
    return bucket, before


def _deal(segment: Segment, seed: int, samples: I64) -> tuple[I64, I64]:
    """The bucket of each of the segment's samples (ascending), and its number inside the bucket."""
    period, slot = np.divmod(samples, SLOTS)
    bucket, number = np.empty_like(samples), np.empty_like(samples)
    for each in np.unique(period):
        mine = period == each
        buckets, before = _period(segment.slots, seed, segment.number, int(each))
        bucket[mine], number[mine] = buckets[slot[mine]], before[slot[mine]]
    return bucket, number + period * np.array(segment.slots)[bucket] + np.array(segment.given)[bucket]


def _dealt(segment: Segment, seed: int, samples: int) -> I64:
    """How many of the segment's first samples each bucket gives."""
    periods, rest = divmod(samples, SLOTS)
    bucket, _ = _period(segment.slots, seed, segment.number, periods)
    counts = np.bincount(bucket[:rest], minlength=len(segment.slots))
    return np.array(segment.slots) * periods + counts


def _exhausted(segment: Segment, seed: int, rows: Sequence[int]) -> int:
    """The segment's first sample for which its bucket has no unread row."""
    firsts: list[int] = []
    for b, (slots, left) in enumerate(zip(segment.slots, np.subtract(rows, segment.given).tolist(), strict=True)):
        if slots:
            periods, rest = divmod(left, slots)
            bucket, _ = _period(segment.slots, seed, segment.number, periods)
            firsts.append(periods * SLOTS + int(np.flatnonzero(bucket == b)[rest]))
    return min(firsts)
