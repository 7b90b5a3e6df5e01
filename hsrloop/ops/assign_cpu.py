"""Which anchor points boxes get, for the CPU: one loop over boxes and the cells inside them.

It decides what `assign` decides on a GPU, a pair at a time: so a score is looked up only where the
overlap is large enough for the best ten.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from hsrloop.ops.native import compiled

_ZERO, _QUARTER, _ONE = (np.float32(number) for number in (0, 0.25, 1))
_EPS = np.float32(1e-7)  # as in `boxes`
_PAIRS = "UniTuple(i8[::1], 2)"
_SIGNATURE = f"{_PAIRS}(f4[:,::1], f4[::1], f4[:,::1], i8[:,::1], i8[::1], i8, i8, i8, i8)"


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
    """Put a metric larger than the last one into its place among `top`, which falls."""
    place = len(top) - 1
    while place > 0 and top[place - 1] < metric:
        top[place], at[place] = top[place - 1], at[place - 1]
        place -= 1
    top[place], at[place] = metric, p


@numba.njit(inline="always")
def _owners(
    best: np.ndarray, where: np.ndarray, rows: np.ndarray, nearest: np.ndarray
) -> np.ndarray:
    """Return the box that each point is given to, -1 for none."""
    owner = np.full(len(nearest), -1)
    for box in range(len(rows)):
        for rank in range(best.shape[1]):
            if best[box, rank] > _ZERO:
                p = where[box, rank]
                owner[p] = rows[box] if owner[p] < 0 else nearest[p]
    return owner


def _settled_pairs(
    predicted: np.ndarray,
    logits: np.ndarray,
    truth: np.ndarray,
    segments: np.ndarray,
    rows: np.ndarray,
    levels: int,
    anchors: int,
    classes: int,
    topk: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that are given to a box, rising, and the box of each.

    Args:
        predicted: (6, B * A) float32 `Columns` of the decoded predictions.
        logits: (B * C * A,) float32.
        truth: (6, B * M) float32 `Columns` of the boxes.
        segments, rows: of `PaddedTargets`, with L levels; labels are classes.
        topk: points that a box may have.

    Returns:
        (T,) image * A + anchor; (T,) image * M + place.
    """
    best = np.zeros((len(rows), topk), np.float32)  # metrics, falling
    where = np.zeros((len(rows), topk), np.int64)  # their points
    highest = np.zeros(predicted.shape[1], np.float32)  # overlap that a point has with any box,
    nearest = np.zeros(predicted.shape[1], np.int64)  # and with which: the first among equals
    overlaps = np.empty(anchors, np.float32)
    for s in range(segments.shape[1]):
        slot, first, width, skipped, last, row, image, label = segments[:, s]
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
    owner = _owners(best, where, rows, nearest)
    given = np.flatnonzero(owner >= 0)
    return given, owner[given]


settled_pairs = compiled(_settled_pairs, _SIGNATURE)
