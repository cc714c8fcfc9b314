"""Every random decision of the loader, as a function of the seed, the epoch and the sample's number."""

import random

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 12
_SMALLEST_DOMAIN_BITS = 6
_GOLDEN = 0x9E3779B97F4A7C15


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """Start the stream of random numbers that belongs to one sample, by its number, in one epoch.

    Whoever reads the sample, on whatever rank or thread, draws the same, whatever happened to other samples.
    """
    # Fields side by side, so that no two combinations meet below 2^32 epochs and 2^64 seeds.
    high, low = index >> 40, index & ((1 << 40) - 1)
    return random.Random(high << 144 | ((seed << 32 | epoch) << 40 | low) << 8)


def shuffled(num: int, seed: int, epoch: int, *, positions: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Say which sample stands at each position of an epoch's order.

    The order is a permutation of the whole data set: every sample once, whichever shard it lies in. It is
    computed, not stored (a keyed Feistel network on the smallest power of two that holds `num`, walked until
    it lands inside): any position costs the same, no memory grows with the data set, and nothing has to be
    drawn up before the first batch of an epoch or after a restart.

    Args:
        num: samples in the data set, at least 1.
        seed: of the run.
        epoch: from 0.
        positions: int64 in [0, num), (n,); all of them by default.

    Returns:
        Sample numbers, int64, (n,).

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002 (cycle walking).
    """
    if positions is None:
        positions = np.arange(num, dtype=np.int64)
    keys = _round_keys(seed, epoch)
    bits = max(_SMALLEST_DOMAIN_BITS, (num - 1).bit_length())
    indices = _feistel(positions.astype(np.uint64), keys, bits)
    while (outside := indices >= num).any():
        indices[outside] = _feistel(indices[outside], keys, bits)
    return indices.astype(np.int64)


def scattered(num: int, seed: int, epoch: int, salt: int) -> NDArray[np.int64]:
    """Shuffle a few things at once, with one table instead of a calculation for each.

    Args:
        num: samples, from 0.
        seed: of the run.
        epoch: from 0.
        salt: tells apart what is shuffled in an epoch, at least 0.

    Returns:
        A permutation, int64, (num,); 8 bytes a sample.
    """
    key = random.Random(((seed << 32 | epoch) << 48 | salt) << 16 | 0x5CA7).getrandbits(64)
    counters = np.arange(num, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    return np.argsort(_hash(counters), kind="stable")


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    source = random.Random((seed << 32 | epoch) << 48 | 0x5EED)
    return np.array([source.getrandbits(64) for _ in range(_NUM_ROUNDS)], dtype=np.uint64)


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Permute the integers below 2^bits; each round changes one half by a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for i in range(0, _NUM_ROUNDS, 2):
        low ^= _hash(high + keys[i]) & low_mask
        high ^= _hash(low + keys[i + 1]) & high_mask
    return high << low_bits | low


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits (the finaliser of SplitMix64; wraps around)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
