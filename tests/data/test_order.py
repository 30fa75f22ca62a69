"""The permutation that every run's order is made of."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from gpt_simple.data.order import key, permute, splitmix64, subkeys


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 4097])
def test_every_index_goes_to_one_place(n: int) -> None:
    for seed in range(5):
        assert sorted(permute(key(seed), n, np.arange(n))) == list(range(n))


def test_the_values_of_the_permutation_are_pinned() -> None:
    # The first is the first output of the published generator for seed 0.
    assert splitmix64(np.array([0, 1, 2**63], np.uint64)).tolist() == [
        0xE220A8397B1DCDAF,
        10451216379200822465,
        5196802822362493915,
    ]
    assert key(42, 1, 3).tolist() == [10717792572613970916]
    assert permute(key(42, 0, 0), 10, np.arange(10)).tolist() == [3, 1, 0, 7, 4, 6, 2, 8, 5, 9]
    assert permute(key(42, 0, 1), 1000, np.arange(8)).tolist() == [980, 838, 767, 939, 336, 830, 760, 545]
    assert permute(key(7), 10**12, np.array([0, 1, 10**12 - 1])).tolist() == [709694027294, 480244286628, 69689572660]


def test_keys_depend_on_the_order_of_their_parts() -> None:
    assert len({int(key(*parts)[0]) for parts in itertools.product(range(8), repeat=3)}) == 512


def test_an_array_of_keys_is_many_permutations() -> None:
    index, epoch = np.arange(300) % 100, np.arange(300) // 100
    together = permute(subkeys(key(3), epoch), 100, index)
    apart = [permute(key(3, e), 100, np.arange(100)) for e in range(3)]
    assert together.tolist() == np.concatenate(apart).tolist()


def test_all_permutations_of_four_are_about_equally_likely() -> None:
    draws = 4800
    counts = Counter(tuple(permute(key(seed), 4, np.arange(4)).tolist()) for seed in range(draws))
    expected = draws / 24
    chi_square = sum((counts[p] - expected) ** 2 / expected for p in itertools.permutations(range(4)))
    assert chi_square < 57  # 23 degrees of freedom: 0.9999


@pytest.mark.parametrize("n", [1000, 1025, 65536, 100_003])
def test_neighbours_are_as_far_apart_as_in_a_random_permutation(n: int) -> None:
    chi_squares = []
    for seed in range(10):
        order = permute(key(seed, n), n, np.arange(n))
        distance = np.diff(order) % n
        counts, _ = np.histogram(distance, bins=20, range=(0, n))
        expected = (n - 1) / 20
        chi_squares.append(((counts - expected) ** 2 / expected).sum())
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 5 / n**0.5
    assert 10 < np.mean(chi_squares) < 31  # 19 degrees of freedom, mean of ten: 19 +- 2


def test_epochs_and_seeds_are_unrelated() -> None:
    n = 5000
    first = permute(key(1, 0), n, np.arange(n))
    for other in (key(1, 1), key(2, 0), key(0, 1)):
        assert (permute(other, n, np.arange(n)) == first).sum() < 12  # Poisson of mean 1


def test_far_ahead_costs_what_the_beginning_costs() -> None:
    def seconds(n: int, start: int) -> float:
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            permute(key(1), n, np.arange(start, start + 1000))
            times.append(time.perf_counter() - begin)
        return min(times)

    assert seconds(1 << 40, 10**12) < 5 * seconds(1 << 20, 0) + 1e-3
