"""NMS against the peer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from ultralytics.utils.nms import non_max_suppression

from hsrloop.ops.boxes import cxcywh_to_xyxy
from hsrloop.ops.nms import nms


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
