"""Average precision, as Ultralytics 8.4.190 defines it.

Source: ultralytics@8.4.190, metrics.ap_per_class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsrloop.ops.matching import IOUS, match_all
from hsrloop.ops.nms import Found
from hsrloop.records import ClassScore, Metrics

Floats = NDArray[np.float64]
Hits = NDArray[np.uint16]

_EPS = 1e-16
_LEVELS = np.arange(len(IOUS), dtype=np.uint16)
_RECALLS = np.linspace(0, 1, 101)  # COCO's points of interpolation
_CONFS = np.linspace(0, 1, 1000)  # where precision and recall are read over confidence
_SMOOTHING = 0.1  # width of the box filter over the mean F1, as a fraction of the confidences


def average_precision(hits: Hits, boxes: int) -> Floats:
    """Area under the precision envelope over recall, joined by lines, read at 101 recalls.

    Recall rises only where a detection is right, and between two of these precision falls. So the
    envelope is read from them alone, a few of thousands of detections.

    Args:
        hits: (n,) of a class's detections, best first: the thresholds of `IOUS` reached, as bits.
        boxes: there are of the class, at least 1.

    Returns:
        (10,) in [0, 1].
    """
    right = np.flatnonzero(hits)
    level, which = np.nonzero(hits[right] >> _LEVELS[:, None] & 1)
    place = right[which]  # of what is right at a level, level by level
    counts = np.bincount(level, minlength=len(IOUS))
    number = np.arange(len(place)) - np.repeat(counts.cumsum() - counts, counts)
    most = int(counts.max())
    # Columns: recall 0, the first that is right, the second, ..., and where there are no more.
    at = np.full((len(IOUS), most + 2), -1)
    at[level, number + 1] = place
    best = np.zeros(at.shape)
    best[level, number + 1] = (number + 1) / (place + 1)
    best = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
    recall = np.arange(most + 2) / (boxes + _EPS)
    # Each point that is read lies between a right one and the next. Wrong ones between them have
    # the recall of the first and, in the envelope, the precision of the second.
    first = np.minimum(np.searchsorted(recall, _RECALLS, side="right") - 1, most)
    after = best[:, first + 1]
    before = np.where(at[:, first + 1] == at[:, first] + 1, best[:, first], after)
    slope = (after - before) / (recall[first + 1] - recall[first])
    read = np.ascontiguousarray(before + slope * (_RECALLS - recall[first]))
    areas: Floats = (read[:, :-1] + read[:, 1:]).mean(axis=1) / 2
    return areas


def _curves(hits: Hits, conf: Floats, boxes: int) -> tuple[Floats, Floats]:
    """Return precision and recall at IoU 0.5 over `_CONFS`, of (n,) detections, best first."""
    if not len(conf):
        return np.zeros_like(_CONFS), np.zeros_like(_CONFS)
    right = (hits & 1).cumsum()
    return (
        np.interp(-_CONFS, -conf, right / np.arange(1, len(conf) + 1), left=1),
        np.interp(-_CONFS, -conf, right / (boxes + _EPS), left=0),
    )


def _smooth(y: Floats) -> Floats:
    """Mean of (k, n) values over a window along n, the ends repeated."""
    width = round(y.shape[1] * _SMOOTHING * 2) // 2 + 1
    padded = np.pad(y, ((0, 0), (width // 2, width // 2)), mode="edge")
    window = np.ones(width) / width
    return np.stack([np.convolve(row, window, mode="valid") for row in padded])


@dataclass(frozen=True, slots=True)
class _Batch:
    """Detections of B images, on the device, and their ground truth, on the host."""

    found: Found
    boxes: Tensor  # (N, 4)
    labels: Tensor  # (N,)
    counts: NDArray[np.int64]  # (B,) boxes of each image
    places: NDArray[np.int64]  # (B,) in the order of adding


class Evaluator:
    """Collects detections and ground truth, and scores all images together.

    Nothing is read from the device before `settle`, which reads once.

    Args:
        names: class names; class numbers are places in it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._waiting: list[_Batch] = []
        self._taken = 0  # images added so far, each counted once
        self._image: list[NDArray[np.int64]] = []  # of each detection, as is what follows
        self._hits: list[Hits] = []  # thresholds reached, as bits
        self._conf: list[NDArray[np.float32]] = []
        self._predicted: list[NDArray[np.int64]] = []
        self._boxes = np.zeros(len(names), dtype=np.int64)
        self._images = np.zeros(len(names), dtype=np.int64)

    def add(
        self,
        found: Found,
        gt_boxes_xyxy: Tensor,
        gt_labels: Tensor,
        image_index: Tensor,
        *,
        places: Sequence[int] | None = None,
    ) -> None:
        """Take the images of a batch.

        Args:
            found: of B images.
            gt_boxes_xyxy: (N, 4) in the same frame, on the host; N may be 0.
            gt_labels: (N,) class numbers.
            image_index: (N,) in [0, B), in rising order.
            places: of images that `settle` named; not given for new ones.
        """
        images = len(found.rows)
        counts = np.bincount(image_index.numpy(), minlength=images)
        if places is None:
            places = range(self._taken, self._taken + images)
            self._taken += images
        own = np.asarray(places, dtype=np.int64)
        self._waiting.append(_Batch(found, gt_boxes_xyxy, gt_labels, counts, own))

    def settle(self) -> list[int]:
        """Match the images added since the last call, and count those that are settled.

        Returns:
            Places of the others, in the order of adding; to be added again, with what `nms` finds.
            Metrics are then those of all images in their first order, which breaks ties.
        """
        if not self._waiting:
            return []
        batches, self._waiting = self._waiting, []
        counts = np.concatenate([batch.counts for batch in batches])
        places = np.concatenate([batch.places for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        boxes = torch.cat([batch.boxes for batch in batches])
        found, settled = match_all([batch.found for batch in batches], boxes, labels, counts)
        conf, predicted, hits = found[settled].reshape(-1, 3).T
        used = conf > 0
        self._image.append(np.repeat(places[settled], found.shape[1])[used])
        self._hits.append(hits[used].astype(np.uint16))
        self._conf.append(conf[used])
        self._predicted.append(predicted[used].astype(np.int64))
        image = np.repeat(np.arange(len(counts)), counts)
        self._count(image[settled[image]], labels.numpy()[settled[image]])
        return [int(place) for place in places[~settled]]

    def _count(self, image: NDArray[np.int64], label: NDArray[np.int64]) -> None:
        """Count boxes by class, and images that hold a class; (N,) each."""
        classes = len(self._names)
        self._boxes += np.bincount(label, minlength=classes)
        self._images += np.bincount(np.unique(image * classes + label) % classes, minlength=classes)

    def compute(self) -> Metrics:
        """Return the metrics of all images so far.

        Means go over the classes that have ground truth, and only those are listed. Precision and
        recall are those at the confidence where the smoothed mean F1 is highest. Without any
        ground truth everything is 0 and no class is listed.
        """
        unsettled = self.settle()
        assert not unsettled, "settle() names images that must be added again"
        present = np.flatnonzero(self._boxes)
        if not len(present):
            return Metrics(ap50=0.0, ap50_95=0.0, precision=0.0, recall=0.0, best_conf=0.0)
        ap, precision, recall = self._curves(present)
        f1 = 2 * precision * recall / (precision + recall + _EPS)
        best = int(_smooth(f1.mean(0, keepdims=True)).argmax())
        best_confs = _CONFS[_smooth(f1).argmax(1)]
        classes = tuple(
            ClassScore(
                name=self._names[label],
                images=int(self._images[label]),
                boxes=int(self._boxes[label]),
                precision=float(precision[row, best]),
                recall=float(recall[row, best]),
                ap50=float(ap[row, 0]),
                ap50_95=float(ap[row].mean()),
                best_conf=float(best_confs[row]),
            )
            for row, label in enumerate(present)
        )
        return Metrics(
            ap50=float(np.mean([c.ap50 for c in classes])),
            ap50_95=float(np.mean([c.ap50_95 for c in classes])),
            precision=float(np.mean([c.precision for c in classes])),
            recall=float(np.mean([c.recall for c in classes])),
            best_conf=float(_CONFS[best]),
            classes=classes,
        )

    def _curves(self, present: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
        """Return AP, (C, 10), and precision and recall over `_CONFS`, of the classes `present`."""
        hits, conf = np.concatenate(self._hits), np.concatenate(self._conf)
        predicted = np.concatenate(self._predicted)
        order = _in_order(np.concatenate(self._image), conf, predicted)
        hits, predicted = hits[order], predicted[order]
        falling = conf[order].astype(np.float64)
        firsts, ends = (np.searchsorted(predicted, present, side=s) for s in ("left", "right"))
        ap, curves = [], []
        for label, first, end in zip(present, firsts, ends, strict=True):
            own, boxes = hits[first:end], int(self._boxes[label])
            ap.append(average_precision(own, boxes))
            curves.append(_curves(own, falling[first:end], boxes))
        precision, recall = zip(*curves, strict=True)
        return np.stack(ap), np.stack(precision), np.stack(recall)


def _in_order(
    image: NDArray[np.int64], conf: NDArray[np.float32], predicted: NDArray[np.int64]
) -> NDArray[np.intp]:
    """Return the places of (n,) detections by class, then by falling confidence, then by image.

    NumPy sorts numbers of 16 bits four times as fast as floats; those of a float above 0 rank as it
    does. So there may be 65,536 classes.
    """
    falling = ~conf.view(np.uint32)
    low, high = falling.astype(np.uint16), (falling >> np.uint32(16)).astype(np.uint16)
    return np.lexsort((image, low, high, predicted.astype(np.uint16)))
