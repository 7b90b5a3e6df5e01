"""Which anchor points boxes get, for the CPU: a loop over boxes and the cells inside them.

It decides what `assign` decides on a GPU, a pair at a time: so a score is looked up only where the
overlap is large enough for the best ten.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from hsrloop.ops.native import compiled, share
from hsrloop.ops.targets import SEGMENT

_ZERO, _QUARTER, _ONE = (np.float32(number) for number in (0, 0.25, 1))
_EPS = np.float32(1e-7)  # as in `boxes`
_LAST = SEGMENT.index("last")
_PAIRS_OF_A_THREAD = 100_000  # 0.5 ms of work, five times what a thread costs (measured)


@numba.njit(inline="always", error_model="numpy")
def _ciou(predicted: np.ndarray, p: int, truth: np.ndarray, row: int) -> Any:
    """Return the complete IoU of a prediction and a box; see `boxes.Pairs`."""
    ax1, ay1, ax2, ay2 = predicted[0, p], predicted[1, p], predicted[2, p], predicted[3, p]
    bx1, by1, bx2, by2 = truth[0, row], truth[1, row], truth[2, row], truth[3, row]
    inner = max(min(ax2, bx2) - max(ax1, bx1), _ZERO)
    inner *= max(min(ay2, by2) - max(ay1, by1), _ZERO)
    iou = inner / (predicted[4, p] + truth[4, row] - inner + _EPS)
    wide, high = max(ax2, bx2) - min(ax1, bx1), max(ay2, by2) - min(ay1, by1)
    right, down = (bx1 + bx2) - (ax1 + ax2), (by1 + by2) - (ay1 + ay2)
    apart = (right * right + down * down) / (wide * wide + high * high + _EPS)
    turn = truth[5, row] - predicted[5, p]
    aspect = turn * turn
    weight = aspect / (aspect - iou + (_ONE + _EPS))
    return iou - _QUARTER * apart - aspect * weight


@numba.njit(inline="always")
def _insert(metric: Any, p: int, top: np.ndarray, at: np.ndarray) -> None:
    """Put a metric into its place among `top`, which falls; after equal ones.

    Each place keeps the larger of what it has and what comes down to it: nothing to be guessed.
    """
    for place in range(len(top)):
        held, point = top[place], at[place]
        larger = metric > held
        top[place] = metric if larger else held
        at[place] = p if larger else point
        metric = held if larger else metric
        p = point if larger else p


def _search(
    predicted: np.ndarray,
    logits: np.ndarray,
    truth: np.ndarray,
    segments: np.ndarray,
    sizes: np.ndarray,
    best: np.ndarray,
    where: np.ndarray,
    highest: np.ndarray,
    nearest: np.ndarray,
) -> None:
    """Look at all pairs of some images' boxes and points; see `settled_pairs`.

    Args:
        sizes: (6,) levels, anchors, classes; the images from one to another, without the latter.
            Other images' rows are left alone.
        best, where: (N, topk) metrics, falling, and their points; at first 0.
        highest, nearest: (B * A,) overlap that a point has with any box, and with which: the first
            among equals; at first 0.
    """
    levels, anchors, classes, start_image, stop_image = sizes
    overlaps = np.empty(anchors, np.float32)
    for s in range(segments.shape[1]):
        slot, first, width, skipped, last, row, image, label = segments[:, s]
        if image < start_image or image >= stop_image:
            continue
        top, at = best[slot // levels], where[slot // levels]
        for line in range((last + 1) // width):
            start = image * anchors + first + line * (width + skipped)
            to_logit = (image * (classes - 1) + label) * anchors
            for k in range(width):  # by itself, so that it is vectorised
                overlaps[k] = _ciou(predicted, start + k, truth, row)
            for k in range(width):
                p, overlap = start + k, overlaps[k]
                if not overlap > _ZERO:  # nor if it is no number
                    continue
                if overlap > highest[p] or (overlap == highest[p] and row < nearest[p]):
                    highest[p], nearest[p] = overlap, row
                cube = overlap * overlap * overlap
                if cube * cube <= top[-1]:  # a score is at most 1
                    continue
                score = _ONE / (_ONE + np.exp(-logits[to_logit + p]))
                metric = np.sqrt(score) * cube * cube
                if metric > top[-1]:
                    _insert(metric, p, top, at)


def _owned(
    best: np.ndarray, where: np.ndarray, rows: np.ndarray, nearest: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that are given to a box, rising, and the box of each."""
    owner = np.full(len(nearest), -1)
    for box in range(len(rows)):
        for rank in range(best.shape[1]):
            if best[box, rank] > _ZERO:
                p = where[box, rank]
                owner[p] = rows[box] if owner[p] < 0 else nearest[p]
    given = np.flatnonzero(owner >= 0)
    return given, owner[given]


_TABLES = "f4[:,::1], i8[:,::1], f4[::1], i8[::1]"
_INPUTS = "f4[:,::1], f4[::1], f4[:,::1], i8[:,::1], i8[::1]"
search = compiled(_search, f"void({_INPUTS}, {_TABLES})")
owned = compiled(_owned, "UniTuple(i8[::1], 2)(f4[:,::1], i8[:,::1], i8[::1], i8[::1])")


def settled_pairs(
    predicted: np.ndarray,
    logits: np.ndarray,
    truth: np.ndarray,
    segments: np.ndarray,
    rows: np.ndarray,
    *,
    levels: int,
    images: int,
    classes: int,
    topk: int,
    threads: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that are given to a box, rising, and the box of each.

    Args:
        predicted: (6, B * A) float32 `Columns` of the decoded predictions.
        logits: (B * C * A,) float32.
        truth: (6, B * M) float32 `Columns` of the boxes.
        segments, rows: of `targets.Segments`, with L levels; labels are classes.
        topk: points that a box may have.
        threads: that share the images, where there is enough to do.

    Returns:
        (T,) image * A + anchor; (T,) image * M + place.
    """
    points = predicted.shape[1]
    tables = (
        np.zeros((len(rows), topk), np.float32),
        np.zeros((len(rows), topk), np.int64),
        np.zeros(points, np.float32),
        np.zeros(points, np.int64),
    )
    best, where, _, nearest = tables

    def look(start: int, stop: int) -> None:
        sizes = np.array([levels, points // max(images, 1), classes, start, stop])
        search(predicted, logits, truth, segments, sizes, *tables)

    enough = int(segments[_LAST].sum() // _PAIRS_OF_A_THREAD)
    share(look, images, threads=min(threads, enough))
    point, box = owned(best, where, rows, nearest)
    return point, box
