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
Bools = NDArray[np.bool_]

_EPS = 1e-16
_RECALLS = np.linspace(0, 1, 101)  # COCO's points of interpolation
_CONFS = np.linspace(0, 1, 1000)  # where precision and recall are read over confidence
_SMOOTHING = 0.1  # width of the box filter over the mean F1, as a fraction of the confidences


def average_precision(recall: Floats, precision: Floats) -> Floats:
    """Area under the precision envelope, read at 101 recalls.

    Args:
        recall, precision: (n, L) over detections by falling confidence, at L thresholds; n at
            least 1.

    Returns:
        (L,) in [0, 1].
    """
    levels, count = recall.T.shape
    x, y = np.zeros((levels, count + 3)), np.ones((levels, count + 3))
    x[:, 1:-2], x[:, -2], x[:, -1] = recall.T, recall[-1], 1.0
    y[:, 1:-2], y[:, -2:] = precision.T, 0.0
    envelope = np.maximum.accumulate(y[:, ::-1], axis=1)[:, ::-1]
    read = np.stack([np.interp(_RECALLS, *points) for points in zip(x, envelope, strict=True)])
    areas: Floats = (read[:, :-1] + read[:, 1:]).mean(axis=1) / 2
    return areas


@dataclass(frozen=True, slots=True)
class _Curves:
    """Average precision of one class, and its curves at IoU 0.5 over `_CONFS`."""

    ap: Floats  # (10,)
    precision: Floats  # (1000,)
    recall: Floats

    @property
    def f1(self) -> Floats:
        return 2 * self.precision * self.recall / (self.precision + self.recall + _EPS)


def _curves(right: Bools, conf: Floats, boxes: int) -> _Curves:
    """Return the curves of a class with `boxes` > 0, from its (n, 10) detections, best first."""
    if not len(conf):
        flat = np.zeros_like(_CONFS)
        return _Curves(np.zeros(len(IOUS)), flat, flat)
    hits = right.cumsum(0)  # (n, 10)
    recall = hits / (boxes + _EPS)
    precision = hits / np.arange(1, len(conf) + 1)[:, None]
    return _Curves(
        average_precision(recall, precision),
        np.interp(-_CONFS, -conf, precision[:, 0], left=1),
        np.interp(-_CONFS, -conf, recall[:, 0], left=0),
    )


def _smooth(y: Floats) -> Floats:
    """Mean of (n,) values over a window, the ends repeated."""
    width = round(len(y) * _SMOOTHING * 2) // 2 + 1
    padded = np.pad(y, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


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
        self._right: list[Bools] = []
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
        which = hits[used].astype(np.int64)[:, None] >> np.arange(len(IOUS))
        self._image.append(np.repeat(places[settled], found.shape[1])[used])
        self._right.append((which & 1).astype(bool))
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
        curves = self._class_curves(present)
        best = int(_smooth(np.mean([c.f1 for c in curves], 0)).argmax())
        classes = tuple(
            ClassScore(
                name=self._names[label],
                images=int(self._images[label]),
                boxes=int(self._boxes[label]),
                precision=float(c.precision[best]),
                recall=float(c.recall[best]),
                ap50=float(c.ap[0]),
                ap50_95=float(c.ap.mean()),
                best_conf=float(_CONFS[_smooth(c.f1).argmax()]),
            )
            for label, c in zip(present, curves, strict=True)
        )
        return Metrics(
            ap50=float(np.mean([c.ap50 for c in classes])),
            ap50_95=float(np.mean([c.ap50_95 for c in classes])),
            precision=float(np.mean([c.precision for c in classes])),
            recall=float(np.mean([c.recall for c in classes])),
            best_conf=float(_CONFS[best]),
            classes=classes,
        )

    def _class_curves(self, present: NDArray[np.int64]) -> list[_Curves]:
        """Return the curves of each class in `present`."""
        right, conf = np.concatenate(self._right), np.concatenate(self._conf)
        predicted = np.concatenate(self._predicted)
        order = np.lexsort((np.concatenate(self._image), -conf, predicted))  # equal ones by image
        right, predicted = right[order], predicted[order]
        falling = conf[order].astype(np.float64)
        firsts, ends = (np.searchsorted(predicted, present, side=s) for s in ("left", "right"))
        return [
            _curves(right[first:end], falling[first:end], int(self._boxes[label]))
            for label, first, end in zip(present, firsts, ends, strict=True)
        ]
