"""Boxes: formats, IoU, complete IoU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

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


class Columns:
    """Boxes as rows of coordinates, with what a complete IoU needs of each box by itself.

    Coordinates in rows keep each pass over millions of pairs contiguous. The angle, the dearest
    part, is computed once a box instead of once a pair.
    """

    def __init__(self, table: Tensor) -> None:
        """Take what `of` or `at` made: x1, y1, x2, y2, area, angle; (6, ...)."""
        self._table = table
        self.low, self.high = table[:2], table[2:4]  # (2, ...)
        self.area, self.angle = table[4], table[5]  # (...); angle: 2 / pi * atan(width / height)

    @classmethod
    def of(cls, boxes: Tensor) -> Columns:
        """Prepare (4, ...) xyxy boxes."""
        width, height = _size(boxes)
        angle = (width / height).atan_().mul_(2 / math.pi)
        return cls(torch.cat((boxes, (width * height)[None], angle[None])))

    def at(self, index: Tensor) -> Columns:
        """Pick boxes from rows of shape (n,); what is returned has the index's shape."""
        picked = self._table.index_select(1, index.reshape(-1))
        return Columns(picked.view(6, *index.shape))


def _size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return widths, and heights with the epsilon that keeps them from 0."""
    width, height = (boxes[2:] - boxes[:2]).unbind(0)
    return width, height.add_(EPS)


class _Overlap(NamedTuple):
    """What a complete IoU is put together from; x and y together are (2, ...)."""

    inner: Tensor  # (2, ...) width and height of the intersection
    union: Tensor
    iou: Tensor
    hull: Tensor  # (2, ...) width and height of the smallest box around both
    diagonal: Tensor  # squared
    shift: Tensor  # (2, ...) twice the way from a's centre to b's
    apart: Tensor  # squared length of `shift` / `diagonal`
    turn: Tensor  # b's angle less a's
    weight: Tensor  # of the squared turn

    @classmethod
    def of(cls, a: Columns, b: Columns) -> _Overlap:
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
        return cls(inner, union, iou, hull, diagonal, shift, apart, turn, weight)

    def ciou(self) -> Tensor:
        """Return the complete IoU."""
        aspect = self.turn.square().mul_(self.weight)
        return torch.sub(self.iou, self.apart, alpha=0.25).sub_(aspect)


def _sum_of_squares(pair: Tensor) -> Tensor:
    squares = pair.square()
    return squares[0] + squares[1]


def ciou_of_columns(a: Columns, b: Columns) -> Tensor:
    """Return `ciou` of boxes that are already prepared; the shapes broadcast. No gradient."""
    return _Overlap.of(a, b).ciou()


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of boxes taken in pairs.

    Args:
        a, b: (4, n) xyxy, one unit; a box of zero area is allowed, and so is none.

    Returns:
        (n,) in (-1.5, 1]; 1 for equal boxes. The gradient, once, flows to `a` alone, and none
        through the aspect weight.

    Source: Zheng et al. 2020, arXiv:1911.08287; placement of epsilons as ultralytics@8.4.190.
    """
    total: Tensor = _Ciou.apply(a, b)
    return total


class _Ciou(torch.autograd.Function):
    """The derivative written out: a quarter of the kernels that autograd would need."""

    @staticmethod
    def forward(ctx: FunctionCtx, *args: Tensor) -> Tensor:
        a, b = args
        parts = _Overlap.of(Columns.of(a), Columns.of(b))
        ctx.save_for_backward(a, b, *parts)
        return parts.ciou()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        a, b, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        o = _Overlap(*saved)
        width, height = size = _size(a)
        # By the corners of the intersection, of the hull, by a's area, centre and shape. Lower
        # corners are differentiated with their sign turned, as both kinds then look alike.
        per_union = o.iou / o.union
        corner = (o.inner.flip(0) * (o.inner > 0)).mul_(o.union.reciprocal().add_(per_union))
        edge = o.hull * (o.apart / o.diagonal).mul_(0.5)
        towards = o.shift * (0.5 / o.diagonal)
        own = torch.stack((height, width)).mul_(per_union)
        turned = (o.weight * o.turn).mul_(4 / math.pi) / _sum_of_squares(torch.stack(size))
        shape = torch.stack((height * turned, -width * turned))
        own = shape.sub_(own)
        high = torch.where(a[2:] < b[2:], corner, edge).add_(own).add_(towards)
        low = torch.where(a[:2] > b[:2], corner, edge).add_(own).sub_(towards)
        return torch.cat((low.neg_(), high)).mul_(grads[0]), None
