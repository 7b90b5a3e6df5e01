"""NMS against the peer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from ultralytics.utils.nms import non_max_suppression

from hsrloop.ops import nms as module
from hsrloop.ops.boxes import cxcywh_to_xyxy
from hsrloop.ops.nms import Found, nms, nms_ahead


def crowd(images: int, anchors: int, nc: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (B, 4, A) cxcywh px around few centres, and (B, C, A) scores, all distinct."""
    g = torch.Generator().manual_seed(seed)
    centre = 40 + 80 * torch.randint(0, 7, (images, 2, anchors), generator=g)
    size = 60 + 20 * torch.rand(images, 2, anchors, generator=g)
    boxes = torch.cat((centre + 6 * torch.randn(images, 2, anchors, generator=g), size), 1)
    places = torch.randperm(images * nc * anchors, generator=g).view(images, nc, anchors)
    return boxes, ((places + 0.5) / places.numel()) ** 8


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize(("nc", "max_nms"), [(1, 30000), (4, 30000), (20, 500), (20, 30000)])
def test_equal_to_the_peer(nc: int, max_nms: int, multi_label: bool) -> None:
    boxes, scores = crowd(3, 700, nc, seed=nc)
    scores[1] = 0  # an image without detections
    expected = non_max_suppression(
        torch.cat((boxes, scores), 1),
        0.001,
        0.7,
        multi_label=multi_label,
        max_det=300,
        max_nms=max_nms,
        max_time_img=60,
    )
    got = nms(
        cxcywh_to_xyxy(boxes.transpose(1, 2)),
        scores.transpose(1, 2),
        max_nms=max_nms,
        multi_label=multi_label,
    )
    assert len(got) == 3 and got[1].shape == (0, 6)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_hand_made() -> None:
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 6], [50, 50, 60, 60]]]).float()
    scores = torch.tensor([[[0.9, 0.0], [0.8, 0.7], [0.6, 0.0], [0.001, 0.3]]])
    (found,) = nms(boxes, scores)
    # the second box overlaps the first by 0.9 in class 0; the third by 0.6; 0.001 is not above conf
    assert found[:, 4].tolist() == pytest.approx([0.9, 0.7, 0.6, 0.3])
    assert found[:, 5].tolist() == [0, 1, 0, 1]
    (best,) = nms(boxes, scores, max_det=1)
    assert best[:, :4].tolist() == [[0, 0, 10, 10]]


def test_no_anchor_points_and_no_images() -> None:
    assert nms(torch.zeros(1, 0, 4), torch.zeros(1, 0, 3))[0].shape == (0, 6)
    assert nms(torch.zeros(0, 5, 4), torch.zeros(0, 5, 3)) == []


def both(boxes: Tensor, scores: Tensor, **more: int) -> tuple[list[Tensor], Found]:
    """Return what `nms` and `nms_ahead` find among (B, 4, A) cxcywh and (B, C, A)."""
    given = cxcywh_to_xyxy(boxes.transpose(1, 2)), scores.transpose(1, 2)
    return nms(*given), nms_ahead(*given, **more)


@pytest.mark.parametrize("pairs", [1, 1 << 24])
@pytest.mark.parametrize("nc", [1, 4, 20])
def test_ahead_finds_the_same_to_the_bit(
    nc: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAIRS", pairs)  # image by image, and all at once
    boxes, scores = crowd(3, 700, nc, seed=nc)
    scores[1] = 0
    scores[2, :, 5] = float("nan")
    expected, got = both(boxes, scores, candidates=700 * nc)
    assert got.settled.all()
    for rows, wanted in zip(got.rows, expected, strict=True):
        assert torch.equal(rows[: len(wanted)], wanted)
        assert not rows[len(wanted) :].any()


@pytest.mark.parametrize("levels", [3, 50])
def test_ahead_keeps_the_order_of_equal_scores(levels: int) -> None:
    """In half precision many scores are equal; those that come first are better."""
    boxes, scores = crowd(4, 700, 5, seed=3)
    scores = (scores * levels).ceil() / levels * (scores > 0.2)
    expected, got = both(boxes, scores, candidates=3500)
    assert got.settled.all()
    for rows, wanted in zip(got.rows, expected, strict=True):
        assert len(set(wanted[:, 4].tolist())) < len(wanted) / 3
        assert torch.equal(rows[: len(wanted)], wanted)


def test_ahead_is_not_settled_while_rows_as_good_as_the_last_are_missing() -> None:
    boxes, scores = crowd(1, 700, 1, seed=0)
    boxes[0, :2] = 60 + 40 * torch.arange(700)  # nobody overlaps
    scores[:] = 0.5
    assert not both(boxes, scores, candidates=400)[1].settled.any()
    scores[..., :300] = 0.6
    assert both(boxes, scores, candidates=400)[1].settled.all()


def test_ahead_says_which_images_it_cannot_settle() -> None:
    boxes, scores = crowd(4, 700, 4, seed=0)
    scores[0, :, 100:] = 0  # few are left
    scores[1, :, 100:] *= 1e-9
    boxes[2, :2, :] = 60 + 40 * torch.arange(700)  # nobody overlaps: 300 soon found
    expected, got = both(boxes, scores, candidates=400)
    assert got.settled.tolist() == [True, True, True, False]
    for image in range(3):
        wanted = expected[image]
        assert torch.equal(got.rows[image][: len(wanted)], wanted)
    assert not both(boxes, scores, rounds=1)[1].settled[:2].any()


def chain(length: int) -> tuple[Tensor, Tensor]:
    """Return boxes of which each overlaps just its neighbours: every second one is kept."""
    boxes = torch.tensor([[[2.0 * i, 0, 2.0 * i + 15, 10] for i in range(length)]])
    return boxes, torch.linspace(0.9, 0.5, length).view(1, -1, 1)


def test_a_chain_takes_a_round_for_each_link() -> None:
    boxes, scores = chain(12)
    (kept,) = nms(boxes, scores, iou=0.7)
    assert len(kept) == 6
    settled = [bool(nms_ahead(boxes, scores, rounds=n).settled) for n in (10, 11, 12, 13)]
    assert settled == [False, False, True, True]
    rows = nms_ahead(boxes, scores, rounds=12).rows[0]
    assert torch.equal(rows[:6], kept) and not rows[6:].any()
