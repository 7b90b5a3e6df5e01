"""Order and randomness of the training stream, as pure functions of (seed, epoch, index)."""

from __future__ import annotations

import zlib

import numpy as np

_ORDER = "order"


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the permutation of 0..n-1 in which an epoch visits the images; (n,) int64."""
    return sample_rng(seed, epoch, 0, _ORDER).permutation(n)


def sample_rng(seed: int, epoch: int, index: int, name: str) -> np.random.Generator:
    """Return the generator of one augmentation of one sample.

    A function of its place in the run, so that a restart needs no state of workers; each name has
    its own, so that one augmentation drawing more or less does not move the others.

    Args:
        seed, epoch, index: each in [0, 2**32).

    Source: Philox4x64-10, Salmon et al. 2011. The key is (index, epoch, seed), the counter starts
    at the name's CRC in its second word, so streams of two names are 2**64 blocks apart.
    """
    key = (seed << 64) | (epoch << 32) | index
    counter = zlib.crc32(name.encode()) << 64
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
