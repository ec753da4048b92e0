"""The order of a pass: a keyed permutation, each index computed from its position alone.

A Feistel network over the bits of an index permutes 0 .. 2**bits - 1. Walking the cycle until the value is below `n` makes it a permutation
of 0 .. n - 1. Nothing is stored, whatever `n` is.
"""

from __future__ import annotations

import numpy as np

from fnrun.core.counts import count
from fnrun.core.key import Key

#: Half-rounds. Four suffice for many bits; small domains need more.
ROUNDS = 8


def permutation(key: Key, n: int, positions: np.ndarray) -> np.ndarray:
    """The images of `positions` (ints in 0 .. n - 1) under the permutation of 0 .. n - 1 with this key, as int64.

    It is the same for ever, on every machine: the tests hold golden values.

    >>> permutation(Key(0), 5, np.arange(5)).tolist()
    [4, 3, 1, 2, 0]
    """
    n = count("permutation: n", n)
    if len(positions) and (positions.min() < 0 or positions.max() >= n):
        raise ValueError(f"positions must lie in 0 .. {n - 1}")
    bits = (n - 1).bit_length()
    constants = np.frombuffer(b"".join(k.path for k in key.split(ROUNDS)), dtype="<u8").astype(np.uint64)
    values = _scramble(positions.astype(np.uint64), bits, constants)
    while len(outside := np.flatnonzero(values >= n)):
        values[outside] = _scramble(values[outside], bits, constants)
    return values.astype(np.int64)


def _scramble(values: np.ndarray, bits: int, constants: np.ndarray) -> np.ndarray:
    """The Feistel network: each half in turn is xored with a hash of the other, which is invertible."""
    low_bits, high_bits = (bits + 1) // 2, bits // 2
    low, high = values & np.uint64(2**low_bits - 1), values >> np.uint64(low_bits)
    for i in range(0, len(constants), 2):
        low ^= _hash(high, constants[i], low_bits)
        high ^= _hash(low, constants[i + 1], high_bits)
    return (high << np.uint64(low_bits)) | low


def _hash(x: np.ndarray, constant: np.uint64, bits: int) -> np.ndarray:
    """`bits` bits of x, mixed as in murmur3's finalizer."""
    if not bits:
        return np.zeros_like(x)
    h = x + constant
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    h >>= np.uint64(64 - bits)
    return h
