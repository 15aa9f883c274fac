"""A seeded permutation of range(n) that is computed where it is asked, never stored.

A Feistel network over the smallest square that holds n, walked until it lands below n (Black & Rogaway 2002, "Ciphers
with arbitrary finite domains"); its round function is the finaliser of SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 scrambled bits for every element of an array (not a scalar: scalars warn on overflow)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: NDArray[np.uint64], n: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where `index` [B], all below n, lands; `key` [B] chooses the permutation of each."""
    side = np.uint64(math.isqrt(n - 1) + 1)  # side * side >= n: hardly any element is walked twice
    out = _feistel(index, side, key)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], side, key[outside])
    return out


def _feistel(x: NDArray[np.uint64], side: np.uint64, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left, right = np.divmod(x, side)
    for _ in range(ROUNDS):
        key = mix(key)
        left, right = right, (left + mix(right ^ key) % side) % side
    return left * side + right
