"""Boxes: formats, IoU, complete IoU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-7
"""Guards every division. Added to heights but not to widths, as in ultralytics@8.4.190."""


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turn (..., 4) centre and size into two corners, in the same unit."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Turn (..., 4) corners into centre and size, in the same unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def iou_matrix(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every box of `a` with every box of `b`.

    Args:
        a: (n, 4) xyxy; n may be 0.
        b: (m, 4) xyxy, same unit; m may be 0.

    Returns:
        (n, m) in [0, 1); two boxes of zero area have 0.
    """
    low = torch.maximum(a[:, None, :2], b[None, :, :2])  # (n, m, 2)
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = (high - low).clamp_(min=0).prod(-1)  # (n, m)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    return overlap / (area_a[:, None] + area_b[None, :] - overlap + EPS)


class Columns(NamedTuple):
    """Boxes as one tensor a coordinate, all of one shape, and the angle of the diagonal.

    Coordinates in columns keep each pass over millions of pairs contiguous, and the angle, the
    dearest part of a complete IoU, is computed once a box instead of once a pair.
    """

    x1: Tensor
    y1: Tensor
    x2: Tensor
    y2: Tensor
    angle: Tensor  # atan(width / height)

    @classmethod
    def of(cls, boxes: Tensor, *, dim: int = -1) -> Columns:
        """Split xyxy boxes along the dimension of length 4."""
        x1, y1, x2, y2 = boxes.unbind(dim)
        return cls(x1, y1, x2, y2, ((x2 - x1) / (y2 - y1 + EPS)).atan())

    def at(self, index: Tensor) -> Columns:
        """Pick boxes from columns of shape (n,); the columns returned have the index's shape."""
        flat = index.reshape(-1)
        return Columns(*(column.index_select(0, flat).view(index.shape) for column in self))


def ciou_of_columns(a: Columns, b: Columns) -> Tensor:
    """Return `ciou` of boxes that are already split; the shapes broadcast."""
    width_a, height_a = a.x2 - a.x1, a.y2 - a.y1 + EPS
    width_b, height_b = b.x2 - b.x1, b.y2 - b.y1 + EPS
    overlap_w = (a.x2.minimum(b.x2) - a.x1.maximum(b.x1)).clamp_(min=0)
    overlap = overlap_w * (a.y2.minimum(b.y2) - a.y1.maximum(b.y1)).clamp_(min=0)
    iou = overlap / (width_a * height_a + width_b * height_b - overlap + EPS)
    hull_w = a.x2.maximum(b.x2) - a.x1.minimum(b.x1)
    hull_h = a.y2.maximum(b.y2) - a.y1.minimum(b.y1)
    diagonal = hull_w.square() + hull_h.square() + EPS
    shift_x, shift_y = b.x1 + b.x2 - a.x1 - a.x2, b.y1 + b.y2 - a.y1 - a.y2
    shift = (shift_x.square() + shift_y.square()) / 4
    aspect = (b.angle - a.angle).square() * (4 / math.pi**2)
    with torch.no_grad():
        weight = aspect / (1 - iou + aspect + EPS)
    return iou - (shift / diagonal + aspect * weight)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of boxes taken in pairs.

    Args:
        a, b: (..., 4) xyxy, one unit, broadcastable; a box of zero area is allowed, and so is none.

    Returns:
        (...,) in (-1.5, 1]; 1 for equal boxes. No gradient flows through the aspect weight.

    Source: Zheng et al. 2020, arXiv:1911.08287; placement of epsilons as ultralytics@8.4.190.
    """
    return ciou_of_columns(Columns.of(a), Columns.of(b))
