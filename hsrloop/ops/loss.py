"""The detection loss of YOLOv8 as sums over samples, to be normalised once per optimizer step.

Source: ultralytics@8.4.190, v8DetectionLoss; its terms are gain * sum / max(target_scores, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hsrloop.ops.anchors import anchor_points, at_least_float32, mean_distances
from hsrloop.ops.assign import Assignment, assign
from hsrloop.ops.boxes import ciou
from hsrloop.ops.ranges import named
from hsrloop.ops.targets import PaddedTargets, pad_targets
from hsrloop.records import RawPredictions

__all__ = ["GAINS", "LossGains", "LossSums", "PaddedTargets", "detection_loss", "pad_targets"]

_DFL_MARGIN = 0.01  # distances end this far below the last bin; ultralytics@8.4.190
_CHUNK_CPU = 1 << 16  # logits at a time: stay in cache (measured)


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the images of a micro-batch, gains not applied; 0-dim, float32 or float64.

    The sums of two halves of a batch add up to those of the batch.
    """

    box: Tensor
    cls: Tensor
    dfl: Tensor
    target_scores: Tensor  # S, without gradient; not yet bounded from below


@dataclass(frozen=True, slots=True, kw_only=True)
class LossGains:
    """Weight of each term; defaults of ultralytics@8.4.190."""

    box: float = 7.5
    cls: float = 0.5
    dfl: float = 1.5

    def weigh(self, sums: LossSums) -> Tensor:
        """Return the weighted sum, 0-dim, that `backward` starts from."""
        return self.box * sums.box + self.cls * sums.cls + self.dfl * sums.dfl


GAINS = LossGains()


def detection_loss(
    raw: RawPredictions,
    strides: Sequence[int],
    targets: PaddedTargets,
    *,
    reg_max: int = 16,
    assigner: Callable[[Tensor, Tensor, PaddedTargets], Assignment] = assign,
) -> LossSums:
    """Compare what the head says with the ground truth.

    Args:
        raw: logits of B images, any float type; half precision is computed in float32.
        strides: px, one a level.
        targets: of the same images, on the same device; images without boxes are allowed, and so
            is a batch without any (then box, dfl and S are 0, and cls has its background part).
        reg_max: bins of a side's distribution, at least 2.
        assigner: `assign`, or it kept from being compiled.

    Returns:
        Sums with a gradient to both kinds of logits. Nothing here waits for the device.

    Raises:
        ValueError: the targets were made for another input size or other levels.
    """
    if tuple(raw.shapes) != targets.shapes:
        raise ValueError(
            f"the predictions have levels of {raw.shapes} cells, the targets {targets.shapes}; "
            "call pad_targets with the imgsz and strides of the forward pass"
        )
    device = raw.class_logits.device
    with torch.autocast(device.type, enabled=False):
        dtype = at_least_float32(raw.class_logits[:0]).dtype
        points, sizes = anchor_points(raw.shapes, strides, device=device, dtype=dtype)
        with named("assign"):
            boxes = _decoded_columns(raw.box_logits.detach(), points, sizes, reg_max=reg_max)
            chosen = assigner(boxes, raw.class_logits.detach(), targets)
        with named("loss"):
            box, dfl = _box_terms(raw.box_logits, points, sizes, targets, chosen, reg_max=reg_max)
            _, classes, anchors = raw.class_logits.shape
            labels = targets.labels.view(-1)[chosen.box]
            index = (chosen.image * classes + labels) * anchors + chosen.anchor
            cls = sparse_bce_sum(raw.class_logits, index, chosen.weight)
    return LossSums(box=box, cls=cls, dfl=dfl, target_scores=chosen.weight.sum())


def _decoded_columns(box_logits: Tensor, points: Tensor, sizes: Tensor, *, reg_max: int) -> Tensor:
    """Return decoded boxes as (4, B, A) px: a contiguous plane for each coordinate."""
    distances = mean_distances(box_logits, reg_max=reg_max).transpose(0, 1) * sizes.view(-1)
    centre = points.t()[:, None]  # (2, 1, A)
    return torch.cat((centre - distances[:2], centre + distances[2:]))


def _box_terms(
    box_logits: Tensor,
    points: Tensor,
    sizes: Tensor,
    targets: PaddedTargets,
    chosen: Assignment,
    *,
    reg_max: int,
) -> tuple[Tensor, Tensor]:
    """Return the sums of weighted 1 - CIoU and of the distribution focal loss.

    Both are computed in units of the stride, and only at the T slots of the assignment.
    """
    _, channels, anchors = box_logits.shape
    first = (chosen.image * channels) * anchors + chosen.anchor  # (T,)
    index = first + torch.arange(channels, device=first.device)[:, None] * anchors  # (4R, T)
    logits = box_logits.reshape(-1).index_select(0, index.view(-1))
    log_p = F.log_softmax(at_least_float32(logits).view(4, reg_max, -1), 1)  # (4, R, T)

    point = (points / sizes)[chosen.anchor].t()  # (2, T)
    truth = targets.boxes_xyxy_px.to(log_p.dtype).view(-1, 4)[chosen.box]
    truth = (truth / sizes[chosen.anchor]).t()  # (4, T)
    bins = torch.arange(reg_max, device=log_p.device, dtype=log_p.dtype)[:, None]
    distances = (log_p.exp() * bins).sum(1)  # (4, T)
    boxes = torch.cat((point - distances[:2], point + distances[2:]))
    box = ((1 - ciou(boxes, truth)) * chosen.weight).sum()

    aim = torch.cat((point - truth[:2], truth[2:] - point))
    aim = aim.clamp_(0, reg_max - 1 - _DFL_MARGIN)[:, None]  # (4, 1, T)
    below = aim.long()
    share = aim - below
    nearest = log_p.gather(1, below) * (1 - share) + log_p.gather(1, below + 1) * share
    return box, -(nearest.squeeze(1).mean(0) * chosen.weight).sum()


def sparse_bce_sum(logits: Tensor, index: Tensor, target: Tensor) -> Tensor:
    """Sum of binary cross-entropy over all logits, for targets that are 0 nearly everywhere.

    Args:
        logits: any shape and float type; half precision is computed in float32.
        index: (T,) int64 into the flattened logits. A place that occurs twice has the sum of its
            targets.
        target: (T,) in [0, 1], no gradient.

    Returns:
        0-dim. Equals `binary_cross_entropy_with_logits(..., reduction="sum")` against the dense
        targets, without building them; differentiable once.
    """
    total: Tensor = _SparseBce.apply(logits, index, target)
    return total


class _SparseBce(torch.autograd.Function):
    """softplus(x) summed, less x * t where t is not 0; the gradient is sigmoid(x) - t."""

    @staticmethod
    def forward(ctx: FunctionCtx, *args: Tensor) -> Tensor:
        logits, index, target = args
        ctx.save_for_backward(logits, index, target)
        flat = logits.reshape(-1)
        chunk = _CHUNK_CPU if flat.device.type == "cpu" else max(flat.numel(), 1)
        parts = [-F.logsigmoid(-at_least_float32(part)).sum() for part in torch.split(flat, chunk)]
        return torch.stack(parts).sum() - (flat[index] * target).sum()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, index, target = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = at_least_float32(logits).sigmoid()
        grad.view(-1).index_add_(0, index, -target)
        return grad.mul_(grads[0]).to(logits.dtype), None, None
