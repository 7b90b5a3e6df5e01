"""The peer's criterion and random scenes for it and for ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsrloop.bench.criterion import peers_loss
from hsrloop.ops.loss import GAINS, LossSums, detection_loss, pad_targets
from hsrloop.records import RawPredictions

STRIDES = (8, 16, 32)


@dataclass
class Scene:
    """Logits of B images and boxes for them."""

    box_logits: Tensor  # (B, 64, A)
    class_logits: Tensor  # (B, C, A)
    boxes: Tensor  # (N, 4) cxcywh in [0, 1]
    labels: Tensor  # (N,)
    image: Tensor  # (N,)
    imgsz: int

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.imgsz // s, self.imgsz // s) for s in STRIDES)

    def part(self, start: int, stop: int) -> Scene:
        own = (self.image >= start) & (self.image < stop)
        return Scene(
            self.box_logits[start:stop],
            self.class_logits[start:stop],
            self.boxes[own],
            self.labels[own],
            self.image[own] - start,
            self.imgsz,
        )


def scene(
    counts: list[int],
    *,
    imgsz: int = 160,
    nc: int = 5,
    size: float = 0.25,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Scene:
    """Return random logits and boxes; `size` is the median side as a fraction of imgsz."""
    g = torch.Generator().manual_seed(seed)
    images, boxes = len(counts), sum(counts)
    points = sum((imgsz // s) ** 2 for s in STRIDES)
    side = (size * torch.exp(0.6 * torch.randn(boxes, 2, generator=g))).clamp(max=1.0)
    centre = side / 2 + (1 - side) * torch.rand(boxes, 2, generator=g)
    return Scene(
        torch.randn(images, 64, points, generator=g, dtype=torch.float64).to(dtype),
        (torch.randn(images, nc, points, generator=g, dtype=torch.float64) - 2).to(dtype),
        torch.cat((centre, side), 1),
        torch.randint(0, nc, (boxes,), generator=g),
        torch.repeat_interleave(torch.arange(images), torch.tensor(counts)),
        imgsz,
    )


def ours(s: Scene) -> tuple[LossSums, Tensor, Tensor]:
    """Return sums and the gradients of the normalised, weighted loss."""
    box, cls = s.box_logits.clone().requires_grad_(), s.class_logits.clone().requires_grad_()
    targets = pad_targets(s.boxes, s.labels, s.image, images=len(box), imgsz=s.imgsz)
    sums = detection_loss(RawPredictions(box, cls, s.shapes), STRIDES, targets)
    (GAINS.weigh(sums) / sums.target_scores.clamp(min=1)).backward()
    assert box.grad is not None and cls.grad is not None
    return sums, box.grad, cls.grad


def peers(s: Scene, *, settle_zeros: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the peer's three terms, gains applied, and its gradients, not times batch.

    A box with fewer than 10 points of positive metric fills up with points of metric 0, whichever
    `torch.topk` happens to name. `settle_zeros` lets it do without, as ours does.
    """
    box, cls = s.box_logits.clone().requires_grad_(), s.class_logits.clone().requires_grad_()
    feats = [torch.zeros(len(box), 1, *shape, dtype=box.dtype) for shape in s.shapes]
    batch = {"batch_idx": s.image.float(), "cls": s.labels.float(), "bboxes": s.boxes}
    criterion = peers_loss(classes=cls.shape[1], device=box.device)
    if settle_zeros:
        select = criterion.assigner.select_topk_candidates
        criterion.assigner.select_topk_candidates = lambda metrics, topk_mask: (
            select(metrics, topk_mask) * (metrics > 0)
        )
    loss, terms = criterion({"boxes": box, "scores": cls, "feats": feats}, batch)
    (loss.sum() / len(box)).backward()
    assert box.grad is not None and cls.grad is not None
    return torch.stack(list(terms.values())), box.grad, cls.grad
