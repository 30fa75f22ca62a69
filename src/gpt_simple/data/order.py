"""The order of samples: a keyed permutation that needs no memory and no state.

``permute(key, n, index)`` is a bijection of ``0 .. n - 1`` for every key: a balanced Feistel network of six
rounds over the next even number of bits, whose outputs beyond ``n`` are sent through it again until they fall
inside (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The rounds mix with
the finaliser of splitmix64 (Steele, Lea and Flood, 2014). Index 10^12 costs what index 0 costs. The values
are pinned by a test: they are the order of every run that was ever made.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


def splitmix64(x: U64) -> U64:
    """A bijection of 64-bit words that scrambles them; elementwise, wrapping."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def key(*parts: int | I64) -> U64:
    """One word from several numbers, in order: ``key(seed, stream, epoch)``. Arrays broadcast."""
    word = np.zeros(1, np.uint64)
    for part in parts:
        word = splitmix64(word ^ np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64))
    return word


def permute(key: U64, n: int, index: I64) -> I64:
    """Where ``index`` (each in ``0 .. n - 1``) goes under the permutation of ``n`` that ``key`` names.

    ``key`` has shape [1], or that of ``index`` where elements belong to several permutations.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [splitmix64(key + np.uint64(i)) for i in range(ROUNDS)]
    value = _feistel(index.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(value >= np.uint64(n))).size:
        some = [each if each.size == 1 else each[outside] for each in keys]
        value[outside] = _feistel(value[outside], half, some)
    return value.astype(np.int64)


def _feistel(value: U64, half: int, keys: list[U64]) -> U64:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for each in keys:
        left, right = right, left ^ (splitmix64(right ^ each) & mask)
    return (left << bits) | right
