"""The CPU's loop and the GPU's kernels give the same points to the same boxes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hsrloop.ops.anchors import anchor_table
from hsrloop.ops.assign import Assignment, assign
from hsrloop.ops.loss import _decoded_columns, pad_targets
from hsrloop.ops.paths import as_on_a_gpu
from tests.ops.peer import STRIDES, Scene, scene


def assigned(s: Scene) -> Assignment:
    cells = anchor_table(s.shapes, STRIDES, device="cpu", dtype=s.box_logits.dtype)
    boxes = _decoded_columns(s.box_logits, cells, reg_max=16)
    targets = pad_targets(s.boxes, s.labels, s.image, images=len(s.box_logits), imgsz=s.imgsz)
    return assign(boxes, s.class_logits, targets)


def used(a: Assignment) -> tuple[Tensor, Tensor]:
    """Return (image, anchor, box, logit) of the slots in use, in order, and their weights."""
    rows = torch.stack((a.image, a.anchor, a.box, a.logit))[:, a.weight > 0]
    order = (rows[0] * 10**6 + rows[1]).argsort()
    return rows[:, order], a.weight[a.weight > 0][order]


def assert_same(s: Scene) -> int:
    ours, weights = used(assigned(s))
    with as_on_a_gpu():
        theirs, expected = used(assigned(s))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)
    return ours.shape[1]


@pytest.mark.parametrize("size", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("seed", range(8))
def test_both_ways_choose_the_same_points(size: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 60, (4,), generator=g).tolist()
    assert assert_same(scene(counts, size=size, imgsz=320, nc=1 + 7 * seed, seed=seed)) > 10


def test_nothing_to_assign() -> None:
    assert assert_same(scene([0, 0])) == 0


def test_equal_boxes_are_told_apart_by_their_place() -> None:
    s = scene([6], seed=21)
    assert assert_same(replace(s, boxes=s.boxes[[0, 1, 0, 2, 1, 0]])) > 10


def test_half_precision_scores_go_either_way() -> None:
    s = scene([20, 20], seed=3)
    assert assert_same(replace(s, class_logits=s.class_logits.half())) > 50
