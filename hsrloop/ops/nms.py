"""Non-maximum suppression, class by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

CLASS_OFFSET_PX = 7680
"""Classes are laid side by side at this distance, so that they cannot suppress each other.

Source: ultralytics@8.4.190 (max_wh). Boxes must be smaller than it.
"""

_FIRST_TRIED, _MORE_TRIED = 1024, 4
"""Rows of an image tried first, and the factor after that (a guess)."""

CANDIDATES = 1536
"""Rows of an image that `nms_ahead` looks at (measured: 1,418 were enough for every image of a set
fine-tuned for an epoch, and for all of 64 images of COCO but one)."""

ROUNDS = 12
"""Rounds that `nms_ahead` takes to settle who suppresses whom (measured: 10 were enough)."""

_PAIRS = 1 << 23
"""Pairs of boxes laid over each other at a time; 14 bytes of temporaries each (a guess)."""


@dataclass(frozen=True, slots=True)
class Found:
    """Detections of B images, each padded to D."""

    rows: Tensor  # (B, D, 6) float: x1 y1 x2 y2 in px, score, class; best first, 0 where padded
    settled: Tensor  # (B,) bool; False: the image needs `nms`

    @classmethod
    def of(cls, detections: list[Tensor]) -> Found:
        """Pad what `nms` returns for at least one image."""
        rows = pad_sequence(detections, batch_first=True)
        return cls(rows, torch.ones(len(rows), dtype=torch.bool, device=rows.device))


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
    shifted = rows[:, :4] + rows[:, 5:6] * CLASS_OFFSET_PX
    tried = min(len(rows), _FIRST_TRIED)
    while True:
        kept = torchvision.ops.nms(shifted[:tried], rows[:tried, 4], iou)
        if len(kept) >= max_det or tried == len(rows):
            return rows[kept[:max_det]]
        tried = min(len(rows), tried * _MORE_TRIED)


def nms_ahead(
    boxes_xyxy_px: Tensor,
    scores: Tensor,
    *,
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    candidates: int = CANDIDATES,
    rounds: int = ROUNDS,
) -> Found:
    """Do what `nms` does with `multi_label`, without waiting for the device.

    All shapes are known ahead: of each image the best `candidates` are tried, and suppression is
    repeated `rounds` times for all at once. Either may not be enough for an image; it is then not
    settled, and its detections mean nothing.

    Args:
        boxes_xyxy_px, scores, conf, iou, max_det: as for `nms`; at least one anchor point.
    """
    classes, anchors = scores.shape[2], scores.shape[1]
    flat = scores.transpose(1, 2).reshape(-1, classes * anchors)
    flat = torch.where(flat > conf, flat, 0)
    score, place = _in_order(*flat.topk(min(candidates, flat.shape[1]), dim=1))  # (B, K)
    label = place // anchors
    anchor = place - label * anchors
    boxes = boxes_xyxy_px.gather(1, anchor[..., None].expand(-1, -1, 4))  # (B, K, 4)
    rows = torch.cat((boxes, torch.stack((score, label.to(score.dtype)), 2)), 2)
    shifted = boxes + rows[..., 5:] * CLASS_OFFSET_PX
    kept, decided = _survivors(shifted, score > 0, iou, rounds)
    tried = kept.shape[1]
    falling = torch.arange(tried, 0, -1, device=kept.device, dtype=torch.float32)
    first, index = (kept * falling).topk(min(max_det, tried), dim=1)  # in their own order
    rows = rows.gather(1, index[..., None].expand(-1, -1, 6))
    rows = torch.where((first > 0)[..., None], rows, 0)
    all_tried = (flat > 0).sum(1) <= tried
    # Rows as good as the last one tried may be missing.
    enough = (kept & (score > score[:, -1:])).sum(1) >= max_det
    return Found(rows, decided & (all_tried | enough))


def _in_order(score: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Sort (B, K) scores, best first, equal ones by place, which `topk` leaves open."""
    place, order = place.sort(dim=1)
    score, order = score.gather(1, order).sort(dim=1, descending=True, stable=True)
    return score, place.gather(1, order)


def _survivors(shifted: Tensor, wanted: Tensor, iou: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Return who is kept of (B, K) rows, best first, and for each image whether that is settled.

    A row is dropped when a better one that is itself kept overlaps it. Starting from all rows, each
    round settles at least the best one not settled yet; once a round changes nothing, all are.
    """
    images, tried = wanted.shape
    over = torch.zeros((images, tried, tried), dtype=torch.bool, device=wanted.device)
    step = max(1, _PAIRS // max(images * tried, 1))
    for start in range(0, tried, step):  # a row meets only those before it
        stop = min(start + step, tried)
        over[:, start:stop, :stop] = _overlapping(shifted[:, start:stop], shifted[:, :stop], iou)
    over.tril_(-1)
    now = before = wanted
    for _ in range(rounds):
        before = now
        now = wanted & ~(over & now[:, None]).any(2)
    return now, (now == before).all(1)


def _overlapping(a: Tensor, b: Tensor, iou: float) -> Tensor:
    """Return (B, n, m) bool: which of (B, n, 4) and (B, m, 4) boxes overlap by more than `iou`.

    In the order of torchvision's kernel for the CPU, so that rounding is the same there.
    """
    x1, y1, x2, y2 = a[:, :, None].unbind(3)  # (B, n, 1)
    u1, v1, u2, v2 = b[:, None].unbind(3)  # (B, 1, m)
    width = torch.minimum(x2, u2).sub_(torch.maximum(x1, u1)).clamp_(min=0)
    inner = torch.minimum(y2, v2).sub_(torch.maximum(y1, v1)).clamp_(min=0).mul_(width)
    areas = (x2 - x1) * (y2 - y1), (u2 - u1) * (v2 - v1)
    union = torch.add(*areas, out=width).sub_(inner)
    return inner.div_(union).gt(iou)
