"""Order and randomness of the training stream, as pure functions of (seed, epoch, index)."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


class _Key(ISeedSequence):
    """A key given as it is, which spares numpy the entropy it would gather and not use."""

    def __init__(self, low: int, high: int) -> None:
        self._words = np.array((low, high), dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return the two words of a Philox key."""
        assert n_words == 2 and dtype is np.uint64
        return self._words


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the permutation of 0..n-1 in which an epoch visits the images; (n,) int64."""
    return sample_rng(seed, epoch, 0, "order").permutation(n)


def sample_rng(seed: int, epoch: int, index: int, name: str) -> np.random.Generator:
    """Return the generator of one augmentation of one sample.

    A function of its place in the run, so that a restart needs no state of workers; each name has
    its own, so that one augmentation drawing more or less does not move the others.

    Args:
        seed, epoch, index: each in [0, 2**32).

    Source: Philox4x64-10, Salmon et al. 2011; the key is (CRC-32 of the name, seed, epoch, index).
    """
    key = _Key(zlib.crc32(name.encode()) << 32 | seed, epoch << 32 | index)
    return np.random.Generator(np.random.Philox(key))  # type: ignore[arg-type]
