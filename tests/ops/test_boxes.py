"""Boxes and anchors against the peer's."""

from __future__ import annotations

import pytest
import torch
from ultralytics.utils.metrics import bbox_iou, box_iou
from ultralytics.utils.tal import dist2bbox, make_anchors

from hsrloop.ops.anchors import anchor_points, decode, predictions
from hsrloop.ops.boxes import (
    Columns,
    Pairs,
    cxcywh_to_xyxy,
    iou_matrix,
    xyxy_to_cxcywh,
)
from hsrloop.records import RawPredictions

SHAPES, STRIDES = ((4, 6), (2, 3)), (8, 16)


def boxes(n: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    low = 50 * torch.rand(n, 2, generator=g, dtype=dtype)
    size = 60 * torch.rand(n, 2, generator=g, dtype=dtype) ** 2
    size[: n // 10] = 0  # no area
    return torch.cat((low, low + size), 1)


def test_formats_are_inverse() -> None:
    b = boxes(20, 0)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(b)), b)
    assert cxcywh_to_xyxy(torch.tensor([5.0, 5, 2, 4])).tolist() == [4, 3, 6, 7]


def test_iou_matrix() -> None:
    a, b = boxes(30, 1), boxes(20, 2)
    torch.testing.assert_close(iou_matrix(a, b), box_iou(a, b), rtol=1e-6, atol=1e-7)
    assert iou_matrix(a, b[:0]).shape == (30, 0)
    assert iou_matrix(a[:0], b).shape == (0, 20)


def pairs(a: torch.Tensor, b: torch.Tensor) -> Pairs:
    return Pairs.of(Columns.of(a.t()), Columns.of(b.t()))


def test_ciou_and_its_derivative_equal_the_peers() -> None:
    a, b = boxes(200, 3).requires_grad_(), boxes(200, 4)
    expected = bbox_iou(a, b, xywh=False, CIoU=True).squeeze(-1)
    (wanted,) = torch.autograd.grad(expected.sum(), a)
    ours = pairs(a.detach(), b)
    torch.testing.assert_close(ours.ciou(), expected, rtol=1e-6, atol=1e-6)
    outwards = wanted * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    assert (ours.by_sides().t() - outwards).norm() <= 1e-5 * wanted.norm()


def test_ciou_by_hand() -> None:
    a = torch.tensor([[0.0, 0, 10, 10]])
    assert float(pairs(a, a).ciou()) == pytest.approx(1, abs=1e-5)
    # same shape, apart by 10 in x: no overlap, centres 10 apart, hull 20 x 10
    moved = a + torch.tensor([10.0, 0, 10, 0])
    assert float(pairs(a, moved).ciou()) == pytest.approx(-100 / 500, abs=1e-5)
    none = pairs(a[:0], a[:0])
    assert none.ciou().shape == (0,) and none.by_sides().shape == (4, 0)


def test_the_derivative_of_ciou_by_differences() -> None:
    """In float64; boxes apart, inside each other, and crossing in each way."""
    b = torch.tensor([[0, 0, 10, 8], [0, 0, 10, 8], [0, 0, 10, 8], [3, 2, 5, 9]]).double()
    a = torch.tensor([[20, 30, 25, 41], [2, 1, 7, 5], [-3, 2, 4, 12], [0, 1, 9, 4]]).double()
    base, size = pairs(a, b), 1e-6
    for side, sign in enumerate((-1, -1, 1, 1)):
        ends = []
        for way in (size, -size):
            moved = a.clone()
            moved[:, side] += sign * way
            # The aspect's weight counts as a constant: the one of the unmoved boxes.
            ends.append(pairs(moved, b)._replace(weight=base.weight).ciou())
        got = (ends[0] - ends[1]) / (2 * size)
        torch.testing.assert_close(base.by_sides()[side], got, rtol=1e-5, atol=1e-8)


def test_anchor_points_equal_the_peers() -> None:
    points, sizes = anchor_points(SHAPES, STRIDES, device="cpu")
    feats = [torch.zeros(1, 1, *s) for s in SHAPES]
    expected, stride = make_anchors(feats, torch.tensor([8.0, 16.0]), 0.5)
    assert torch.equal(points, expected * stride) and torch.equal(sizes, stride)


def test_decode_equals_softmax_mean_and_inference_shapes() -> None:
    g = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(2, 64, 30, generator=g)
    points, sizes = anchor_points(SHAPES, STRIDES, device="cpu")
    mean = logits.view(2, 4, 16, 30).softmax(2).mul(torch.arange(16.0)[:, None]).sum(2)
    expected = dist2bbox(mean.transpose(1, 2), points / sizes, xywh=False) * sizes
    torch.testing.assert_close(decode(logits, points, sizes), expected)
    raw = RawPredictions(logits.half(), torch.zeros(2, 3, 30).half(), SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        xyxy, scores = predictions(raw, STRIDES)
    assert xyxy.dtype == scores.dtype == torch.float32
    assert scores.shape == (2, 30, 3) and bool((scores == 0.5).all())
    torch.testing.assert_close(xyxy, expected, rtol=1e-2, atol=0.05)
