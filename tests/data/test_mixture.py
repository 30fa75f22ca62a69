"""Which row is sample i: proportions, phases, epochs and the end of the data."""

from __future__ import annotations

import random
import time
from collections import Counter

import numpy as np
import pytest

from gpt_simple.config.schema import Phase
from gpt_simple.data.mixture import SLOTS, Mixture, mixture
from gpt_simple.errors import ConfigError, DataError

T = 16
BUCKETS = {"books": 30, "code": 50, "wiki": 70}


def phase(samples: int, **mix: float) -> Phase:
    return Phase(samples * T, mix)


def order(*phases: Phase, on_exhaustion: str = "repeat", buckets: dict[str, int] = BUCKETS, seed: int = 5) -> Mixture:
    return mixture(buckets, phases, on_exhaustion, max_length=T, seed=seed)


def bucket_of(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(list(BUCKETS.values())), rows, side="right")


def test_without_a_curriculum_every_epoch_has_a_new_order() -> None:
    rows = order().locate(np.arange(450)).reshape(3, 150)
    assert [sorted(epoch) for epoch in rows.tolist()] == [list(range(150))] * 3
    assert not np.array_equal(rows[0], rows[1])


def test_the_order_is_pinned() -> None:
    two = {"a": 100, "b": 50}
    assert order(buckets=two, seed=42).locate(np.arange(148, 156)).tolist() == [137, 102, 73, 0, 149, 101, 14, 120]
    mixed = mixture(two, (Phase(800, {"a": 3, "b": 1}), Phase(1, {"b": 1})), "repeat", max_length=8, seed=42)
    located = mixed.locate(np.arange(92, 108)).tolist()
    assert located == [113, 0, 2, 15, 90, 17, 84, 125, 101, 108, 115, 111, 112, 116, 106, 102]


def test_shares_are_exact_over_a_period() -> None:
    rows = order(phase(1, books=1, code=2, wiki=1)).locate(np.arange(3 * SLOTS))
    counts = Counter(bucket_of(rows[SLOTS : 2 * SLOTS]).tolist())
    assert counts == {0: SLOTS // 4, 1: SLOTS // 2, 2: SLOTS // 4}


def test_after_any_number_of_samples_every_bucket_has_its_share() -> None:
    """Off by less than 1.5 (1 + w (B - 2)) for a share w among B buckets."""
    phases = (phase(100, books=0.5, code=0.3, wiki=0.2), phase(37, books=1, wiki=9), phase(1, books=1, code=1, wiki=1))
    mixed = order(*phases)
    rows = bucket_of(mixed.locate(np.arange(137 + 2 * SLOTS)))
    assert np.abs(np.bincount(rows[:100]) - [50, 30, 20]).max() <= 2
    for segment, end in zip(mixed.segments, (100, 137, len(rows)), strict=True):
        shares = np.array(segment.slots) / SLOTS
        dealt = np.cumsum(rows[segment.begin : end, None] == np.arange(3), axis=0)
        due = np.arange(1, len(dealt) + 1)[:, None] * shares
        assert (np.abs(dealt - due) < 1.5 * (1 + shares * ((shares > 0).sum() - 2))).all()


@pytest.mark.parametrize("mix", [(1, 1, 2), (1, 3, 0), (3, 5, 8), (5, 3, 2)])
def test_no_rank_and_no_place_in_a_batch_sees_a_pattern(mix: tuple[int, ...]) -> None:
    named = {name: weight for name, weight in zip(BUCKETS, mix, strict=True) if weight}
    rows = bucket_of(order(phase(1, **named)).locate(np.arange(SLOTS)))
    for places in (2, 4, 8, 10, 16):
        seen = [np.bincount(rows[place::places], minlength=3) / len(rows[place::places]) for place in range(places)]
        noise = 5 * 0.5 * (places / SLOTS) ** 0.5
        assert np.abs(np.array(seen) - np.array(mix) / sum(mix)).max() < 0.02 + noise


def test_uneven_weights_are_off_by_less_than_one_slot() -> None:
    (segment,) = order(phase(1, books=1, code=1, wiki=1)).segments
    assert sum(segment.slots) == SLOTS
    assert max(segment.slots) - min(segment.slots) == 1


def test_a_phase_continues_each_bucket_where_the_last_stopped() -> None:
    mixed = order(phase(70, books=1, wiki=3), phase(90, code=1, wiki=1), phase(1, books=1, code=1, wiki=1))
    rows = mixed.locate(np.arange(600))
    for number, name in enumerate(BUCKETS):
        alone = order(phase(1, **{name: 1.0})).locate(np.arange(600))
        mine = rows[bucket_of(rows) == number]
        assert mine.tolist() == alone[: len(mine)].tolist()
    assert set(bucket_of(rows[:70])) == {0, 2}
    assert set(bucket_of(rows[70:160])) == {1, 2}


def test_any_cut_gives_the_same_samples() -> None:
    rng = random.Random(0)
    for mixed in (order(), order(phase(100, books=2, wiki=1), phase(300, code=1, wiki=1), phase(1, wiki=1))):
        whole = mixed.locate(np.arange(1000))
        at = 0
        while at < 1000:
            size = min(rng.randrange(1, 200), 1000 - at)
            assert mixed.locate(np.arange(at, at + size)).tolist() == whole[at : at + size].tolist()
            at += size
        some = np.sort(np.array(rng.sample(range(1000), 100)))
        assert mixed.locate(some).tolist() == whole[some].tolist()


def test_halt_ends_before_the_first_repetition() -> None:
    for phases in ((), (phase(40, books=1, wiki=1), phase(1, code=3, books=1)), (phase(1, wiki=1),)):
        halting = order(*phases, on_exhaustion="halt")
        assert halting.total is not None
        endless = order(*phases).locate(np.arange(halting.total + 1)).tolist()
        assert halting.locate(np.arange(halting.total)).tolist() == endless[:-1]
        assert len(set(endless[:-1])) == halting.total
        assert endless[-1] in endless[:-1]


def test_halt_may_come_in_an_earlier_phase_than_the_last() -> None:
    halting = order(phase(1000, books=1), phase(1, wiki=1), on_exhaustion="halt")
    assert halting.total == 30


def test_renormalise_reads_every_row_once_in_proportion() -> None:
    mixed = order(phase(1, books=4, code=1, wiki=1), on_exhaustion="renormalise")
    assert mixed.total == 150
    rows = mixed.locate(np.arange(150))
    assert sorted(rows.tolist()) == list(range(150))
    after = bucket_of(rows[mixed.segments[1].begin : mixed.segments[1].begin + 60])
    assert set(after) == {1, 2}
    assert abs(int((after == 1).sum()) - 30) < 16


def test_renormalise_leaves_a_phase_whose_buckets_are_read() -> None:
    mixed = order(phase(1000, books=1), phase(1, code=1, wiki=1), on_exhaustion="renormalise")
    rows = mixed.locate(np.arange(150))
    assert sorted(rows[:30].tolist()) == list(range(30))
    assert mixed.total == 150


def test_far_ahead_costs_what_the_beginning_costs() -> None:
    begin = time.perf_counter()
    mixed = order(phase(10**11, books=1, wiki=2), phase(1, code=1, wiki=1))
    rows = mixed.locate(np.arange(10**12, 10**12 + 64))
    assert time.perf_counter() - begin < 2
    assert set(bucket_of(rows)) == {1, 2}


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"book": 1.0}, r"phase 1: there is no bucket 'book' \(did you mean 'books'\?\)"),
        ({"books": 0.0, "wiki": 1.0}, "'books' has weight 0"),
        ({"books": -1.0, "wiki": 3.0}, "'books' has weight -1"),
        ({"books": 1e-6, "wiki": 1.0}, "at least 1/65,536"),
        ({"books": float("nan")}, "weight nan"),
        ({"books": float("inf")}, "weight inf"),
        ({}, "names no bucket"),
    ],
)
def test_bad_mixes_are_named(mix: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        order(Phase(16, mix))


def test_an_empty_bucket_is_named() -> None:
    with pytest.raises(DataError, match="bucket 'code' is empty"):
        order(phase(1, code=1), buckets={"code": 0, "wiki": 3})


def test_weights_may_have_a_sum_beyond_a_float() -> None:
    (segment,) = order(phase(1, books=1e308, wiki=1e308)).segments
    assert segment.slots == (SLOTS // 2, 0, SLOTS // 2)


def test_the_smallest_weight_gets_a_slot() -> None:
    (segment,) = order(phase(1, books=1, wiki=SLOTS - 1)).segments
    assert segment.slots == (1, 0, SLOTS - 1)
