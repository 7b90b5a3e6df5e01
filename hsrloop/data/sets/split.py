"""Hold out validation images so that no look-alike of one stays in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from hsrloop.data.sets.alike import group_alike

SHARE = 0.1


def hold_out(
    paths: Sequence[Path],
    *,
    seed: int,
    shown: Sequence[Collection[int]] | None = None,
    threads: int = 4,
) -> list[int]:
    """Return the indices of a tenth of the images, whole groups of look-alikes at a time.

    A tenth of those that show objects, and of the others. Repeatable for a seed and a list of
    names. Every class keeps an image to train on, and one at least of those returned shows an
    object; none are returned where that cannot be. Where look-alikes chain so many into groups too
    large to be taken that half of what is wanted is missing, a run of neighbours is cut from the
    largest.

    Args:
        shown: classes in each image; if not given, all show the same.
    """
    count = len(paths)
    shown = [{0}] * count if shown is None else [set(classes) for classes in shown]
    left = Counter(number for classes in shown for number in classes)
    groups = group_alike(paths, threads=threads)
    order = [groups[int(i)] for i in np.random.default_rng(seed).permutation(len(groups))]

    def spared(taken: Sequence[int]) -> bool:
        """Return whether every class keeps an image without those."""
        times = Counter(number for i in taken for number in shown[i])
        return all(left[number] > gone for number, gone in times.items())

    showing = [group for group in order if any(shown[i] for i in group)]
    chosen = _some(showing, spared)
    wanted = _target(showing)
    if 2 * len(chosen) < wanted:
        rest = [group for group in showing if not set(group).intersection(chosen)]
        for i in reversed(max(rest, key=len, default=[])):
            if len(chosen) < wanted and shown[i] and spared([*chosen, i]):
                chosen.append(i)
    if chosen:
        chosen += _some([group for group in order if not any(shown[i] for i in group)], spared)
    return sorted(chosen)


def _target(groups: Sequence[Sequence[int]]) -> int:
    count = sum(map(len, groups))
    return max(min(count, 1), round(SHARE * count))


def _some(groups: Sequence[Sequence[int]], spared: Callable[[Sequence[int]], bool]) -> list[int]:
    """Return the members of the first groups that make a tenth, or half as many again at most."""
    target, chosen = _target(groups), list[int]()
    most = max(target, int(1.5 * target))
    for group in groups:
        if len(chosen) < target and len(chosen) + len(group) <= most and spared([*chosen, *group]):
            chosen += group
    return chosen
