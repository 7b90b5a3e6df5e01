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
        a: (..., n, 4) xyxy; n may be 0.
        b: (..., m, 4) xyxy, same unit; m may be 0.

    Returns:
        (..., n, m) in [0, 1); two boxes of zero area have 0.
    """
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])  # (..., n, m, 2)
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    overlap = (high - low).clamp_(min=0).prod(-1)  # (..., n, m)
    area_a, area_b = (a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    return overlap / (area_a[..., :, None] + area_b[..., None, :] - overlap + EPS)


class Columns:
    """Boxes as rows of coordinates, with what a complete IoU needs of each box by itself.

    Coordinates in rows keep each pass over millions of pairs contiguous. The angle, the dearest
    part, is computed once a box instead of once a pair.
    """

    def __init__(self, table: Tensor) -> None:
        """Take what `of` or `at` made: x1, y1, x2, y2, area, angle; (6, ...)."""
        self.table = table
        self.low, self.high = table[:2], table[2:4]  # (2, ...)
        self.area, self.angle = table[4], table[5]  # (...); angle: 2 / pi * atan(width / height)

    @classmethod
    def of(cls, boxes: Tensor) -> Columns:
        """Prepare (4, ...) xyxy boxes."""
        width, height = _size(boxes[:2], boxes[2:]).unbind(0)
        angle = (width / height).atan_().mul_(2 / math.pi)
        return cls(torch.cat((boxes, (width * height)[None], angle[None])))

    def at(self, index: Tensor) -> Columns:
        """Pick boxes from rows of shape (n,); what is returned has the index's shape."""
        picked = self.table.index_select(1, index.reshape(-1))
        return Columns(picked.view(6, *index.shape))


class Pairs(NamedTuple):
    """Boxes in pairs, and what their complete IoU is put together from; shapes broadcast.

    Where x and y are kept together, they are the first dimension.

    Source: Zheng et al. 2020, arXiv:1911.08287; placement of epsilons as ultralytics@8.4.190.
    """

    a: Columns
    b: Columns
    inner: Tensor  # (2, ...) width and height of the intersection
    union: Tensor
    iou: Tensor
    hull: Tensor  # (2, ...) width and height of the smallest box around both
    diagonal: Tensor  # squared
    shift: Tensor  # (2, ...) twice the way from a's centre to b's
    apart: Tensor  # squared length of `shift` / `diagonal`
    turn: Tensor  # b's angle less a's
    aspect: Tensor  # its square
    weight: Tensor  # of the aspect

    @classmethod
    def of(cls, a: Columns, b: Columns) -> Pairs:
        """Lay boxes over each other."""
        low = torch.maximum(a.low, b.low)
        inner = torch.minimum(a.high, b.high).sub_(low).clamp_(min=0)
        overlap = inner[0] * inner[1]
        union = (a.area + b.area).sub_(overlap).add_(EPS)
        iou = overlap.div_(union)
        hull = torch.maximum(a.high, b.high).sub_(torch.minimum(a.low, b.low, out=low))
        diagonal = _sum_of_squares(hull).add_(EPS)
        shift = (b.low + b.high) - (a.low + a.high)
        apart = _sum_of_squares(shift).div_(diagonal)
        turn = b.angle - a.angle
        aspect = turn.square()
        weight = aspect / (aspect - iou).add_(1 + EPS)
        return cls(a, b, inner, union, iou, hull, diagonal, shift, apart, turn, aspect, weight)

    def ciou(self) -> Tensor:
        """Return the complete IoU, in (-1.5, 1]; 1 for equal boxes, one without area allowed."""
        distant = torch.sub(self.iou, self.apart, alpha=0.25)
        # Not in place: dynamo would put three calls with other rounding in its stead.
        return torch.addcmul(distant, self.aspect, self.weight, value=-1)

    def by_sides(self) -> Tensor:
        """Return the derivative of `ciou` by a's left, top, right and bottom moved outwards.

        (4, ...). The aspect weight counts as a constant. Written out, it takes a quarter of the
        kernels that autograd would need.
        """
        a, b = self.a, self.b
        # By the intersection's sides, by the hull's, and by a's centre and shape.
        per_union = self.iou / self.union
        crossing = self.inner.flip(0) * (self.inner > 0)
        crossing.mul_(self.union.reciprocal().add_(per_union))
        half = self.diagonal.reciprocal().mul_(0.5)
        around = self.hull * (self.apart * half)
        towards = self.shift * half
        size = _size(a.low, a.high)
        turned = (self.weight * self.turn).mul_(4 / math.pi).div_(_sum_of_squares(size))
        across = size.flip(0)
        own = across * turned
        own[1].neg_()
        own = torch.addcmul(own, across, per_union, value=-1)
        cut = torch.stack((a.low > b.low, a.high < b.high))  # (2, 2, ...)
        slope = torch.where(cut, crossing, around).add_(own)
        slope[0].sub_(towards)
        slope[1].add_(towards)
        return slope.view(4, *towards.shape[1:])


def _size(low: Tensor, high: Tensor) -> Tensor:
    """Return (2, ...) widths, and heights with the epsilon that keeps them from 0."""
    size = high - low
    size[1].add_(EPS)
    return size


def _sum_of_squares(pair: Tensor) -> Tensor:
    squares = pair.square()
    return squares[0] + squares[1]
