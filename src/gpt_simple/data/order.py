"""The order of samples: a keyed permutation that needs no memory and no state.

``permute(key, n, index)`` is a bijection of ``0 .. n - 1`` for every key: a balanced Feistel network of six rounds on
pairs of digits in base ``ceil(sqrt(n))``; the few outputs beyond ``n`` are sent through it again until they fall inside
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Its rounds mix with splitmix64 (Steele, Lea and
Flood, "Fast Splittable Pseudorandom Number Generators", 2014). Index 10^12 costs what index 0 costs. The values are
pinned by a test: they are the order of every run that was ever made.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


def splitmix64(x: U64) -> U64:
    """A bijection of 64-bit words that scrambles them; elementwise, wrapping."""
    x = x + _GOLDEN
    x ^= x >> np.uint64(30)
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)
    return x


@lru_cache(maxsize=256)
def key(*parts: int) -> U64:
    """One word, shape [1], from several numbers in order: ``key(stream, seed, bucket)``."""
    word = np.zeros(1, np.uint64)
    for part in parts:
        word = subkeys(word, np.array([part], np.int64))
    return word


def subkeys(key: U64, numbers: I64) -> U64:
    """``key(*parts, number)`` for each number, where ``key`` is ``key(*parts)``."""
    return splitmix64(key ^ numbers.astype(np.uint64))


def permute(key: U64, n: int, index: I64) -> I64:
    """Where ``index`` (each in ``0 .. n - 1``) goes under the permutation of ``n`` <= 2^63 that ``key`` names.

    ``key`` has shape [1], or that of ``index`` where elements belong to several permutations.
    """
    base = np.uint64(math.isqrt(n - 1) + 1 if n > 1 else 1)
    keys = splitmix64(key + np.arange(ROUNDS, dtype=np.uint64)[:, None])
    value = _feistel(index.astype(np.uint64), base, keys)
    while (outside := np.flatnonzero(value >= np.uint64(n))).size:
        value[outside] = _feistel(value[outside], base, keys if keys.shape[1] == 1 else keys[:, outside])
    return value.astype(np.int64)


def _feistel(value: U64, base: np.uint64, keys: U64) -> U64:
    left, right = np.divmod(value, base)
    for each in keys:
        # The high 32 bits, scaled to the base: cheaper than a remainder, and as even.
        mixed = (splitmix64(right ^ each) >> _HALF) * base >> _HALF
        mixed += left
        np.subtract(mixed, base, out=mixed, where=mixed >= base)
        left, right = right, mixed
    return left * base + right
