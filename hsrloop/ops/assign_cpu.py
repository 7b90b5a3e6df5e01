"""Which anchor points boxes get, for the CPU: one loop over boxes and the cells inside them.

It decides what `assign` decides on a GPU, a pair at a time: so a score is looked up only where the
overlap is large enough for the best 10.
"""

from __future__ import annotations

import numpy as np

from hsrloop.ops.native import compiled

_ZERO, _QUARTER, _ONE = (np.float32(number) for number in (0, 0.25, 1))
_EPS = np.float32(1e-7)  # of `boxes`
_SIGNATURE = (
    "UniTuple(i8[::1], 2)(f4[:,::1], f4[::1], f4[:,::1], i8[:,::1], i8[::1], i8, i8, i8, i8)"
)


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
        predicted: (6, B * A) `Columns` of the decoded predictions.
        logits: (B * C * A,)
        truth: (6, B * M) `Columns` of the boxes.
        segments, rows: of `PaddedTargets`.
        levels, anchors, classes: L, A and C.
        topk: points that a box may have.

    Returns:
        (T,) image * A + anchor; (T,) image * M + place.
    """
    points = predicted.shape[1]
    best = np.zeros((len(rows), topk), np.float32)  # metrics, falling
    where = np.zeros((len(rows), topk), np.int64)  # their points
    highest = np.zeros(points, np.float32)  # overlap that a point has with any box,
    nearest = np.zeros(points, np.int64)  # and with which, the lowest place among equals
    overlaps = np.empty(anchors, np.float32)
    for s in range(segments.shape[1]):
        slot, first, width, skipped, last, row, image, label = segments[:, s]
        top, at = best[slot // levels], where[slot // levels]
        x1, y1, x2, y2, area, angle = truth[:, row]
        x, y = x1 + x2, y1 + y2
        for line in range((last + 1) // width):
            start = image * anchors + first + line * (width + skipped)
            for k in range(width):
                p = start + k
                px1, py1, px2, py2 = (
                    predicted[0, p],
                    predicted[1, p],
                    predicted[2, p],
                    predicted[3, p],
                )
                inner = max(min(px2, x2) - max(px1, x1), _ZERO)
                inner *= max(min(py2, y2) - max(py1, y1), _ZERO)
                iou = inner / (predicted[4, p] + area - inner + _EPS)
                wide, high = max(px2, x2) - min(px1, x1), max(py2, y2) - min(py1, y1)
                right, down = x - (px1 + px2), y - (py1 + py2)
                apart = (right * right + down * down) / (wide * wide + high * high + _EPS)
                turn = angle - predicted[5, p]
                aspect = turn * turn
                weight = aspect / (aspect - iou + (_ONE + _EPS))
                overlaps[k] = iou - _QUARTER * apart - aspect * weight
            score_at = (image * (classes - 1) + label) * anchors + start
            for k in range(width):
                overlap = overlaps[k]
                if not overlap > _ZERO:  # nor if it is no number
                    continue
                p = start + k
                if overlap > highest[p] or (overlap == highest[p] and row < nearest[p]):
                    highest[p] = overlap
                    nearest[p] = row
                cube = overlap * overlap * overlap
                if cube * cube <= top[-1]:  # a score is at most 1
                    continue
                score = _ONE / (_ONE + np.exp(-logits[score_at + k]))
                metric = np.sqrt(score) * cube * cube
                if not metric > top[-1]:
                    continue
                place = topk - 1
                while place > 0 and top[place - 1] < metric:
                    top[place], at[place] = top[place - 1], at[place - 1]
                    place -= 1
                top[place], at[place] = metric, p
    owner = np.full(points, -1)
    for box in range(len(rows)):
        for rank in range(topk):
            if best[box, rank] > _ZERO:
                p = where[box, rank]
                owner[p] = rows[box] if owner[p] < 0 else nearest[p]
    given = np.flatnonzero(owner >= 0)
    return given, owner[given]


settled_pairs = compiled(_settled_pairs, _SIGNATURE)
