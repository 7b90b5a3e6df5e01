"""Which anchor points boxes get, for the CPU: a loop over boxes and the cells inside them.

It decides what `assign` decides on a GPU, a line of cells at a time. A score is looked up only
where the overlap is large enough for the best ten.

What is ranked is a key: a float that is not negative, whose bits order as it does, above 32 bits
that tell whose it is, the lower the first. So a maximum of integers finds both, without a branch.
"""

from __future__ import annotations

import numba
import numpy as np

from hsrloop.ops.native import compiled, share
from hsrloop.ops.targets import SEGMENT

_ZERO, _QUARTER, _ONE = (np.float32(number) for number in (0, 0.25, 1))
_EPS = np.float32(1e-7)  # as in `boxes`
_LAST, _IMAGE = SEGMENT.index("last"), SEGMENT.index("image")
_OWNER = (1 << 32) - 1  # bits of a key that tell whose it is, as the difference to this
_LANES = 8  # cells at a time; of what a narrow line fills up, no more than that is for nothing
_PAIRS_OF_A_THREAD = 20_000  # 0.4 ms of work, five times what a thread costs (measured)


@numba.njit(inline="always", error_model="numpy")
def _overlaps(
    predicted: np.ndarray, start: int, count: int, truth: np.ndarray, row: int, out: np.ndarray
) -> None:
    """Write the complete IoU of a box with predictions in a row, at least 0; see `boxes.Pairs`.

    Rows are cut out before: an index that might be negative keeps a loop from being vectorised.
    """
    stop = start + count
    x1, y1, x2 = predicted[0, start:stop], predicted[1, start:stop], predicted[2, start:stop]
    y2, areas, angles = predicted[3, start:stop], predicted[4, start:stop], predicted[5, start:stop]
    bx1, by1, bx2, by2 = truth[0, row], truth[1, row], truth[2, row], truth[3, row]
    area, angle = truth[4, row], truth[5, row]
    for k in range(count):
        ax1, ay1, ax2, ay2 = x1[k], y1[k], x2[k], y2[k]
        inner = max(min(ax2, bx2) - max(ax1, bx1), _ZERO)
        inner *= max(min(ay2, by2) - max(ay1, by1), _ZERO)
        iou = inner / (areas[k] + area - inner + _EPS)
        wide, high = max(ax2, bx2) - min(ax1, bx1), max(ay2, by2) - min(ay1, by1)
        right, down = (bx1 + bx2) - (ax1 + ax2), (by1 + by2) - (ay1 + ay2)
        apart = (right * right + down * down) / (wide * wide + high * high + _EPS)
        turn = angle - angles[k]
        aspect = turn * turn
        weight = aspect / (aspect - iou + (_ONE + _EPS))
        ciou = iou - _QUARTER * apart - aspect * weight
        out[k] = ciou if ciou > _ZERO else _ZERO  # nor if it is no number


@numba.njit(inline="always", error_model="numpy")
def _insert(key: int, top: np.ndarray) -> None:
    """Put a key into its place among `top`, which falls."""
    for place in range(len(top)):
        held = top[place]
        top[place] = max(held, key)
        key = min(held, key)


@numba.njit(inline="always", error_model="numpy")
def _give(best: np.ndarray, nearest: np.ndarray, owner: np.ndarray) -> None:
    """Write the place of the box that each point of an image is given to; -1: none.

    A point that several boxes want goes to the one it overlaps most, even one that does not.
    """
    owner[:] = -1
    for place in range(len(best)):
        for key in best[place]:
            if key > _OWNER:
                point = _OWNER - (key & _OWNER)
                own = owner[point] < 0
                owner[point] = place if own else _OWNER - (nearest[point] & _OWNER)


def _search(
    predicted: np.ndarray,
    logits: np.ndarray,
    truth: np.ndarray,
    segments: np.ndarray,
    sizes: np.ndarray,
    owner: np.ndarray,
) -> None:
    """Look at all pairs of some images' boxes and points; see `settled_pairs`.

    Args:
        sizes: (3,) topk; the images from one to another, without the latter.
        owner: (B, A) place of the box that a point is given to, -1: none. Other images' are left
            alone.
    """
    topk, start_image, stop_image = sizes
    images, anchors = owner.shape
    classes, places = len(logits) // owner.size, truth.shape[1] // images
    overlaps, metrics = np.empty((2, anchors + _LANES), np.float32)
    bits, metric_bits = overlaps.view(np.int32), metrics.view(np.int32)
    bound = np.empty(1, np.float32)
    bound_bits = bound.view(np.int32)
    cells = np.empty(anchors + _LANES, np.int64)
    nearest = np.empty(anchors + _LANES, np.int64)
    best = np.empty((places, topk), np.int64)
    for image in range(start_image, stop_image):
        best[:], nearest[:] = 0, _OWNER
        for s in np.flatnonzero(segments[_IMAGE] == image):
            _, first, width, skipped, last, row, _, label = segments[:, s]
            place, before = row - image * places, image * anchors
            top = best[place]
            scores = logits[(image * classes + label) * anchors :]
            for line in range((last + 1) // width):
                start = first + line * (width + skipped)
                count = min(-(-width // _LANES) * _LANES, owner.size - before - start)
                _overlaps(predicted, before + start, count, truth, row, overlaps)
                overlaps[width:count] = _ZERO
                near = nearest[start : start + count]
                for k in range(count):
                    near[k] = max(near[k], (np.int64(bits[k]) << 32) | (_OWNER - place))
                bound_bits[0] = top[-1] >> 32
                found = 0
                for k in range(count):
                    cells[found] = k
                    cube = overlaps[k] * overlaps[k] * overlaps[k]
                    found += cube * cube > bound[0]  # a score is at most 1
                for i in range(found):
                    k = cells[i]
                    cube = overlaps[k] * overlaps[k] * overlaps[k]
                    score = _ONE / (_ONE + np.exp(-scores[start + k]))
                    metrics[i] = np.sqrt(score) * cube * cube
                for i in range(found):
                    _insert((np.int64(metric_bits[i]) << 32) | (_OWNER - start - cells[i]), top)
        _give(best, nearest, owner[image])


search = compiled(_search, "void(f4[:,::1], f4[::1], f4[:,::1], i8[:,::1], i8[::1], i8[:,::1])")


def settled_pairs(
    predicted: np.ndarray,
    logits: np.ndarray,
    truth: np.ndarray,
    segments: np.ndarray,
    *,
    images: int,
    topk: int,
    threads: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that are given to a box, rising, and the box of each.

    Args:
        predicted: (6, B * A) float32 `Columns` of the decoded predictions.
        logits: (B * C * A,) float32.
        truth: (6, B * M) float32 `Columns` of the boxes.
        segments: table of `targets.Segments`; labels are classes.
        images: B.
        topk: points that a box may have.
        threads: that share the images, where there is enough to do.

    Returns:
        (T,) image * A + anchor; (T,) image * M + place.
    """
    if not images:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    owner = np.empty((images, predicted.shape[1] // images), np.int64)

    def look(start: int, stop: int) -> None:
        search(predicted, logits, truth, segments, np.array([topk, start, stop]), owner)

    enough = int(segments[_LAST].sum() // _PAIRS_OF_A_THREAD)
    share(look, images, threads=min(threads, enough))
    point = np.flatnonzero(owner >= 0)
    places = truth.shape[1] // images
    return point, owner.ravel()[point] + point // owner.shape[1] * places
