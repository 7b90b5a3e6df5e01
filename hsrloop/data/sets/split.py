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
    more. Where look-alikes chain all that show an object into groups too large to be taken, a run
    of neighbours is cut from the largest.

    Args:
        useful: which images show an object, all if not given; the first taken is such a one, if any
            is.
    """
    count = len(paths)
    target = max(1, round(SHARE * count))
    if count < 2:
        return []
    groups = group_alike(paths, threads=threads)
    order = [groups[int(i)] for i in np.random.default_rng(seed).permutation(len(groups))]
    most = max(target, int(1.5 * target))
    small = [group for group in order if len(group) <= most]
    show = set(range(count)) if useful is None else {i for i in range(count) if useful[i]}
    first = next((group for group in small if show.intersection(group)), None)
    if first is None:
        largest = max(groups, key=lambda group: len(show.intersection(group)))
        run = [i for i in largest if i in show] or largest
        chosen = run[-min(target, max(1, len(run) // 2)) :]
    else:
        chosen = list(first)
    for group in small:
        if len(chosen) < target and group is not first and len(chosen) + len(group) <= most:
            chosen += group
    return sorted(chosen)
