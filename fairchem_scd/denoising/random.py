"""Random numbers that depend only on what they are drawn for, not on what ran before."""

from __future__ import annotations

import hashlib

import numpy as np

_WORD = 2**64 - 1


def stream(seed: int, step: int, name: str) -> np.random.Generator:
    """An independent stream of random numbers for (seed, step, name).

    Philox with (seed, step) as its key and a hash of the name as the upper half of its counter.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    low, high = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    # As arrays: numpy 1 reads a list with integers above 2^63 as floats.
    key = np.array([seed & _WORD, step & _WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, low, high], dtype=np.uint64)))
