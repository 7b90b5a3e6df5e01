"""Non-maximum suppression, class by class."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

_CLASS_OFFSET_PX = 7680
"""Classes are laid side by side at this distance, so that they cannot suppress each other.

Source: ultralytics@8.4.190 (max_wh). Boxes must be smaller than it.
"""

_FIRST_TRIED, _MORE_TRIED = 1024, 4
"""Rows of an image tried first, and the factor after that (a guess)."""


def nms(
    boxes_xyxy_px: Tensor,
    scores: Tensor,
    *,
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    max_nms: int = 30000,
    multi_label: bool = True,
) -> list[Tensor]:
    """Keep the best of boxes that overlap and have the same class.

    Args:
        boxes_xyxy_px: (B, A, 4) float.
        scores: (B, A, C) in [0, 1]; fastest as a view of (B, C, A) memory, as the head gives it.
        conf: a score must be higher than this.
        iou: boxes that overlap a better one by more than this are dropped.
        max_det: most detections an image.
        max_nms: most candidates an image, the best of them.
        multi_label: a box counts once for each class above `conf`, else for its best class only.

    Returns:
        For each image (n, 6): x1, y1, x2, y2, score, class; best first; n may be 0. Waits for the
        device.

    Source: ultralytics@8.4.190, non_max_suppression, without its time limit.
    """
    images = len(scores)
    if multi_label:
        by_class = scores.transpose(1, 2)  # (B, C, A)
        image, label, anchor = (by_class > conf).nonzero(as_tuple=True)
        score = by_class[image, label, anchor]
    else:
        best, classes = scores.max(2)
        image, anchor = (best > conf).nonzero(as_tuple=True)
        score, label = best[image, anchor], classes[image, anchor]
    rows = torch.cat(
        (boxes_xyxy_px[image, anchor], score[:, None], label[:, None].to(score.dtype)), 1
    )
    counts = torch.bincount(image, minlength=images).tolist()
    return [_suppress(part, iou, max_det, max_nms) for part in torch.split(rows, counts)]


def _suppress(rows: Tensor, iou: float, max_det: int, max_nms: int) -> Tensor:
    """Return the rows of one image that remain, best first.

    What happens to a row depends on better rows only, so the best few thousand are tried first:
    as soon as they hold `max_det`, the rest cannot matter. Suppression is quadratic in rows.
    """
    order = rows[:, 4].argsort(descending=True, stable=True)[:max_nms]
    rows = rows[order]
    shifted = rows[:, :4] + rows[:, 5:6] * _CLASS_OFFSET_PX
    tried = min(len(rows), _FIRST_TRIED)
    while True:
        kept = torchvision.ops.nms(shifted[:tried], rows[:tried, 4], iou)
        if len(kept) >= max_det or tried == len(rows):
            return rows[kept[:max_det]]
        tried = min(len(rows), tried * _MORE_TRIED)
