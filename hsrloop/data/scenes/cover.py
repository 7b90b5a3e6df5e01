"""Which pixels of a scene each pasted object shows: the labels that pasting makes and changes.

Outlines are filled into a map in the order they are painted, no pixels of pictures needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from hsrloop.data.plan import SMALLEST_PX, Affine, AugmentPlan, Paste, plan_labels
from hsrloop.data.scenes.cutouts import Cutout
from hsrloop.data.sets.dataset import ImageRef

SHIFT = 6  # fractional bits of outlines
LEAST_VISIBLE = 0.25  # objects of which less shows have no label. A guess
NO_SOURCE = -1  # of labels that no image file carries


def labels_of(
    plan: AugmentPlan, refs: Sequence[ImageRef], cutouts: Sequence[Cutout], imgsz: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the labels of a plan from geometry alone; as `plan_labels`, with pastes.

    Objects of images below are tightened to what pastes leave of them, or lose their label.
    """
    below = plan_labels(plan, refs, imgsz)
    if not plan.pastes:
        return below
    owners = owner_map(plan.pastes, cutouts, imgsz)
    boxes, labels, sources = uncovered(*below, owners)
    found, kept = pasted_labels(plan.pastes, cutouts, owners)
    return (
        np.concatenate((boxes, found)),
        np.concatenate((labels, kept)),
        np.concatenate((sources, np.full(len(kept), NO_SOURCE))),
    )


def owner_map(pastes: Sequence[Paste], cutouts: Sequence[Cutout], side: int) -> np.ndarray:
    """Return (side, side) uint8: 0 where no paste shows, else 1 + the index of the one that does.

    At most 255 pastes.
    """
    owners = np.zeros((side, side), np.uint8)
    for i, paste in enumerate(pastes):
        fill(owners, outline_px(cutouts[paste.cutout], paste.affine, side), i + 1)
    return owners


def outline_px(cutout: Cutout, affine: Affine, side: int) -> list[np.ndarray]:
    """Return a cut-out's contours in px of an output of that side; (k, 2) float64 each."""
    matrix = np.array(affine).reshape(2, 3) * side
    return [points @ matrix[:, :2].T + matrix[:, 2] for points in cutout.contours]


def fill(owners: np.ndarray, contours: Sequence[np.ndarray], value: int) -> None:
    """Fill contours (px, corners of pixels at whole numbers) into a map, in place."""
    fixed = [np.rint((points - 0.5) * (1 << SHIFT)).astype(np.int32) for points in contours]
    cv2.fillPoly(owners, fixed, value, shift=SHIFT)


def pasted_labels(
    pastes: Sequence[Paste], cutouts: Sequence[Cutout], owners: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, 4) xyxy px float32 and (n,) int64 of pastes that show enough and have a label."""
    side = len(owners)
    boxes, labels = [], []
    for i, paste in enumerate(pastes):
        if paste.label < 0:
            continue
        cutout = cutouts[paste.cutout]
        points = np.concatenate(outline_px(cutout, paste.affine, side))
        low, high = np.maximum(points.min(0), 0), np.minimum(points.max(0), side)
        box, visible = _shown(owners, low, high, functools.partial(np.equal, i + 1))
        a, b, _, d, e, _ = paste.affine
        whole = cutout.area * abs(a * e - b * d) * side**2
        if visible >= LEAST_VISIBLE * whole and _large_enough(box):
            boxes.append(box)
            labels.append(paste.label)
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


def uncovered(
    boxes: np.ndarray, labels: np.ndarray, sources: np.ndarray, owners: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tighten boxes to what no paste covers, drop those of which too little is left."""
    kept, tight = [], []
    for row, box in enumerate(boxes):
        low, high = box[:2].astype(np.float64), box[2:].astype(np.float64)
        left, visible = _shown(owners, low, high, functools.partial(np.equal, 0))
        if visible >= LEAST_VISIBLE * float(np.prod(high - low)) and _large_enough(left):
            kept.append(row)
            tight.append(left)
    return np.array(tight, np.float32).reshape(-1, 4), labels[kept], sources[kept]


def _shown(
    owners: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    mine: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, int]:
    """Return the box (4,) of the pixels in a box that are `mine`, and their number."""
    x0, y0 = np.floor(low).astype(int)
    x1, y1 = np.ceil(high).astype(int)
    if x0 >= x1 or y0 >= y1:
        return np.zeros(4), 0
    part = mine(owners[y0:y1, x0:x1])
    visible = int(np.count_nonzero(part))
    if not visible:
        return np.zeros(4), 0
    columns, rows = np.flatnonzero(part.any(0)), np.flatnonzero(part.any(1))
    return np.array(
        (
            max(low[0], x0 + columns[0]),
            max(low[1], y0 + rows[0]),
            min(high[0], x0 + columns[-1] + 1),
            min(high[1], y0 + rows[-1] + 1),
        )
    ), visible


def _large_enough(box: np.ndarray) -> bool:
    return bool(min(box[2] - box[0], box[3] - box[1]) > SMALLEST_PX)
