"""Hold out validation images so that no look-alike of one stays in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hsrloop.data.sets.alike import group_alike

SHARE = 0.1


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
