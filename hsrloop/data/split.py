"""Hold out validation images so that no look-alike of one stays in training."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hsrloop.data.scan import thumbnail

SHARE = 0.1
NEAR = 4  # of 64 bits: the same picture anywhere in the set; a guess
BURST = 12  # of 64 bits: neighbours by file name; a guess


def hold_out(
    paths: list[Path], *, seed: int, useful: list[bool] | None = None, threads: int = 4
) -> list[int]:
    """Return the indices of a tenth of the images, whole groups of look-alikes at a time.

    Repeatable for a seed and a list of names; at least one image and never all of them, for two or
    more. When look-alikes chain most of the set into one group, a run of neighbours is cut from it.

    Args:
        useful: which images show an object; the first group taken has one, if any has.
    """
    count = len(paths)
    target = max(1, round(SHARE * count))
    if count < 2:
        return []
    groups = group_alike(paths, threads=threads)
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(groups))]
    if useful is not None:
        first = next((g for g in order if any(useful[i] for i in groups[g])), order[0])
        order = [first, *(g for g in order if g != first)]
    chosen: list[int] = []
    for which in order:
        if len(chosen) >= target:
            break
        if len(chosen) + len(groups[which]) <= max(target, int(1.5 * target)):
            chosen += groups[which]
    if not chosen:
        largest = max(groups, key=len)
        chosen = largest[-target:]
    return sorted(chosen)


def group_alike(paths: list[Path], *, threads: int = 4) -> list[list[int]]:
    """Return groups of indices: near-duplicates, bursts, and Roboflow's copies of one picture."""
    with ThreadPoolExecutor(threads) as pool:
        hashes = np.array(list(pool.map(difference_hash, paths)), dtype=np.uint64)
    parent = list(range(len(paths)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    by_stem: dict[tuple[Path, str], int] = {}
    for i, path in enumerate(paths):
        stem = re.sub(r"\.rf\.[0-9a-f]{8,}$", "", path.stem)
        parent[find(i)] = find(by_stem.setdefault((path.parent, stem), i))
        apart = differing_bits(hashes[i + 1 :], hashes[i])
        for j in np.flatnonzero(apart <= NEAR) + i + 1:
            parent[find(i)] = find(int(j))
        if len(apart) and apart[0] <= BURST and _consecutive(path, paths[i + 1]):
            parent[find(i)] = find(i + 1)
    groups: dict[int, list[int]] = {}
    for i in range(len(paths)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def differing_bits(words: np.ndarray, word: np.uint64) -> np.ndarray:
    """Return in how many bits each uint64 differs from one; (n,)."""
    apart = (words ^ word).view(np.uint8).reshape(-1, 8)
    total: np.ndarray = np.unpackbits(apart, axis=1).sum(axis=1)
    return total


def difference_hash(path: Path) -> int:
    """Return 64 bits: whether each cell of a 9 x 8 grid is darker than its right neighbour."""
    small = thumbnail(path).astype(np.int16)
    bits = (small[:, 1:] > small[:, :-1] + 1).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _consecutive(a: Path, b: Path) -> bool:
    """Return whether two names differ by a small step of their last number, as a camera counts."""
    first, second = re.findall(r"\d+", a.stem), re.findall(r"\d+", b.stem)
    if a.parent != b.parent or not first or len(first) != len(second) or first[:-1] != second[:-1]:
        return False
    return 0 < int(second[-1]) - int(first[-1]) <= 2
