"""Random numbers that depend on (seed, sequence index, position) and on nothing else: no state, no batch.

Philox4x32-10 ("Parallel random numbers: as easy as 1, 2, 3", 2011) as a hash. Key: the low and the high half of the
seed (taken modulo 2^64). Counter words: position low, position high, index low, index high. A draw is the top 53 bits
of the first two output words, so it lies in [0, 1). ``position`` counts a sequence's generated tokens from 0.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW_32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox on arrays of 32-bit words held in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ k0,
            product1 & _LOW_32,
            (product0 >> _32) ^ c3 ^ k1,
            product0 & _LOW_32,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_32, (k1 + _KEY_STEPS[1]) & _LOW_32
    return c0, c1, c2, c3


def uniforms(seeds: Sequence[int], indices: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, sequence index, position)."""
    seed = np.array([value % 2**64 for value in seeds], dtype=np.uint64)
    index = np.array(indices, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    words = philox4x32(
        (position & _LOW_32, position >> _32, index & _LOW_32, index >> _32), (seed & _LOW_32, seed >> _32)
    )
    bits = ((words[0] << _32) | words[1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
