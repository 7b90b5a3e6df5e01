"""Which anchor points boxes get, for the CPU: a loop over boxes and the cells inside them.

It decides what `assign` decides on a GPU, a line of cells at a time. A score is looked up only
where the overlap is large enough for the best ten.

What is ranked is a key: a float that is not negative, whose bits order as it does, above 32 bits
that tell whose it is, the lower the first. So a maximum of integers finds both, without a branch.
"""

from __future__ import annotations

import numba
import numpy as np

from hsrloop.ops.native import compiled, exp, share
from hsrloop.ops.targets import SEGMENT

_ZERO, _QUARTER, _HALF, _ONE = (np.float32(number) for number in (0, 0.25, 0.5, 1))
_FOUR_BY_PI = np.float32(4 / np.pi)
_EPS, _SCORE_EPS = np.float32(1e-7), np.float32(1e-9)  # as in `boxes` and `assign`
_HIGHEST = np.float32(87)  # of what `exp` takes; a score is 0 beyond (torch: beyond 104)
_LAST, _IMAGE = SEGMENT.index("last"), SEGMENT.index("image")
_OWNER = (1 << 32) - 1  # bits of a key that tell whose it is, as the difference to this
_LANES = 8  # cells at a time; of what a narrow line fills up, no more than that is for nothing
# 0.4 ms of work, five times what a thread costs (measured).
_PAIRS_OF_A_THREAD, _POINTS_OF_A_THREAD = 20_000, 12_000


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
                for k in range(count):
                    cube = overlaps[k] * overlaps[k] * overlaps[k]
                    metrics[k] = cube * cube  # a score is at most 1
                bound, most = np.int32(top[-1] >> 32), np.int32(0)
                for k in range(count):
                    most = max(most, metric_bits[k])
                if most <= bound:
                    continue
                own = scores[start : start + count]
                for k in range(count):
                    score = _ONE / (_ONE + exp(min(-own[k], _HIGHEST)))
                    metrics[k] *= np.sqrt(score) if own[k] > -_HIGHEST else _ZERO
                found = 0
                for k in range(count):
                    cells[found] = k
                    found += metric_bits[k] > bound
                for i in range(found):
                    k = cells[i]
                    _insert((np.int64(metric_bits[k]) << 32) | (_OWNER - start - k), top)
        _give(best, nearest, owner[image])


_TABLES = "f4[:,::1], f4[::1], f4[:,::1]"  # predicted, logits, truth
search = compiled(_search, f"void({_TABLES}, i8[:,::1], i8[::1], i8[:,::1])")


def _score(
    predicted: np.ndarray,
    logits: np.ndarray,
    truth: np.ndarray,
    labels: np.ndarray,
    anchor: np.ndarray,
    place: np.ndarray,
    ends: np.ndarray,
    ciou: np.ndarray,
    slope: np.ndarray,
    weight: np.ndarray,
    images: np.ndarray,
) -> None:
    """Lay points over the boxes they are given to, and score them; see `scored_pairs`.

    Args:
        ends: (B,) of each image's points, which begin where those of the one before end.
        images: (2,) from one to another, without the latter. Others' points are left alone.
    """
    count, places = len(ends), truth.shape[1] // len(ends)
    anchors = predicted.shape[1] // count
    classes = len(logits) // predicted.shape[1]
    highest = np.empty((2, places), np.float32)
    for image in range(images[0], images[1]):
        start, stop = ends[image - 1] if image else 0, ends[image]
        at, of = anchor[start:stop].astype(np.uint32), place[start:stop].astype(np.uint32)
        a, b = np.empty((2, 6, len(at)), np.float32)
        for row in range(6):
            numbers, own = predicted[row, image * anchors : (image + 1) * anchors], a[row]
            for t in range(len(at)):
                own[t] = numbers[at[t]]
            numbers, own = truth[row, image * places : (image + 1) * places], b[row]
            for t in range(len(at)):
                own[t] = numbers[of[t]]
        own, outwards = ciou[start:stop], slope[:, start:stop]
        _slopes(a, b, own, outwards[0], outwards[1], outwards[2], outwards[3])
        metric = weight[start:stop]
        for t in range(len(at)):
            label = labels[image * places + of[t]]
            metric[t] = logits[(image * classes + label) * anchors + at[t]]
        for t in range(len(at)):
            overlap = max(own[t], _ZERO)
            cube = overlap * overlap * overlap
            score = _ONE / (_ONE + exp(min(-metric[t], _HIGHEST)))
            metric[t] = np.sqrt(score) * cube * cube if metric[t] > -_HIGHEST else _ZERO
        highest[:] = _ZERO
        for t in range(len(at)):
            highest[0, of[t]] = max(highest[0, of[t]], metric[t])
            highest[1, of[t]] = max(highest[1, of[t]], own[t])
        for t in range(len(at)):
            metric[t] *= highest[1, of[t]] / (highest[0, of[t]] + _SCORE_EPS)


@numba.njit(inline="always", error_model="numpy")
def _slopes(
    a: np.ndarray,
    b: np.ndarray,
    ciou: np.ndarray,
    left: np.ndarray,
    top: np.ndarray,
    right: np.ndarray,
    bottom: np.ndarray,
) -> None:
    """Write the complete IoU of boxes in pairs and its derivatives; see `boxes.Pairs`."""
    ax1, ay1, ax2, ay2, a_area, a_angle = a
    bx1, by1, bx2, by2, b_area, b_angle = b
    for t in range(len(ciou)):
        inner_x = max(min(ax2[t], bx2[t]) - max(ax1[t], bx1[t]), _ZERO)
        inner_y = max(min(ay2[t], by2[t]) - max(ay1[t], by1[t]), _ZERO)
        inner = inner_x * inner_y
        union = a_area[t] + b_area[t] - inner + _EPS
        iou = inner / union
        hull_x = max(ax2[t], bx2[t]) - min(ax1[t], bx1[t])
        hull_y = max(ay2[t], by2[t]) - min(ay1[t], by1[t])
        diagonal = hull_x * hull_x + hull_y * hull_y + _EPS
        shift_x = (bx1[t] + bx2[t]) - (ax1[t] + ax2[t])
        shift_y = (by1[t] + by2[t]) - (ay1[t] + ay2[t])
        apart = (shift_x * shift_x + shift_y * shift_y) / diagonal
        turn = b_angle[t] - a_angle[t]
        aspect = turn * turn
        weight = aspect / (aspect - iou + (_ONE + _EPS))
        ciou[t] = iou - _QUARTER * apart - aspect * weight
        # By the intersection's sides, by the hull's, and by a's centre and shape.
        per_union, half = iou / union, _HALF / diagonal
        crossing = _ONE / union + per_union
        crossing_x = inner_y * crossing if inner_x > _ZERO else _ZERO
        crossing_y = inner_x * crossing if inner_y > _ZERO else _ZERO
        around = apart * half
        wide, high = ax2[t] - ax1[t], ay2[t] - ay1[t] + _EPS
        turned = weight * turn * _FOUR_BY_PI / (wide * wide + high * high)
        own_x, own_y = high * (turned - per_union), -wide * (turned + per_union)
        left[t] = (crossing_x if ax1[t] > bx1[t] else hull_x * around) + own_x - shift_x * half
        top[t] = (crossing_y if ay1[t] > by1[t] else hull_y * around) + own_y - shift_y * half
        right[t] = (crossing_x if ax2[t] < bx2[t] else hull_x * around) + own_x + shift_x * half
        bottom[t] = (crossing_y if ay2[t] < by2[t] else hull_y * around) + own_y + shift_y * half


score = compiled(
    _score,
    f"void({_TABLES}, i8[::1], i8[::1], i8[::1], i8[::1], f4[::1], f4[:,::1], f4[::1], i8[::1])",
)


def scored_pairs(
    predicted: np.ndarray,
    logits: np.ndarray,
    truth: np.ndarray,
    labels: np.ndarray,
    image: np.ndarray,
    anchor: np.ndarray,
    place: np.ndarray,
    *,
    images: int,
    threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `assign` says of points and the boxes they are given to.

    Args:
        predicted, logits, truth, images, threads: as for `settled_pairs`.
        labels: (B * M,) classes.
        image, anchor, place: (T,), of `settled_pairs`.

    Returns:
        (T,) complete IoU; (4, T) its derivative by sides; (T,) target scores.
    """
    ciou, weight = np.empty((2, len(image)), np.float32)
    slope = np.empty((4, len(image)), np.float32)
    if images:
        ends = np.searchsorted(image, np.arange(images), side="right")
        given = predicted, logits, truth, labels, anchor, place, ends, ciou, slope, weight

        def some(start: int, stop: int) -> None:
            score(*given, np.array((start, stop)))

        share(some, images, threads=min(threads, len(image) // _POINTS_OF_A_THREAD))
    return ciou, slope, weight


def settled_pairs(
    predicted: np.ndarray,
    logits: np.ndarray,
    truth: np.ndarray,
    segments: np.ndarray,
    *,
    images: int,
    topk: int,
    threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the points that are given to a box, image by image, and the box of each.

    Args:
        predicted: (6, B * A) float32 `Columns` of the decoded predictions.
        logits: (B * C * A,) float32.
        truth: (6, B * M) float32 `Columns` of the boxes.
        segments: table of `targets.Segments`; labels are classes.
        images: B.
        topk: points that a box may have.
        threads: that share the images, where there is enough to do.

    Returns:
        (T,) image, rising; (T,) anchor; (T,) place of the box among the image's.
    """
    if not images:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    owner = np.empty((images, predicted.shape[1] // images), np.int64)

    def look(start: int, stop: int) -> None:
        search(predicted, logits, truth, segments, np.array([topk, start, stop]), owner)

    enough = int(segments[_LAST].sum() // _PAIRS_OF_A_THREAD)
    share(look, images, threads=min(threads, enough))
    taken = owner >= 0
    image, point = np.repeat(np.arange(images), taken.sum(1)), np.flatnonzero(taken)
    return image, point - image * owner.shape[1], owner.ravel()[point]
