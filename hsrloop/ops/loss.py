"""The detection loss of YOLOv8 as sums over samples, to be normalised once per optimizer step.

On CUDA `loss.cu` computes it; what is here serves other devices and types, and cards on which that
does not work.

Source: ultralytics@8.4.190, v8DetectionLoss; its terms are gain * sum / max(target_scores, 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hsrloop.ops.anchors import anchor_table, at_least_float32, mean_distances
from hsrloop.ops.assign import Assignment, assign
from hsrloop.ops.loss_gpu import SOURCE, kernel_loss
from hsrloop.ops.nvrtc import Kernels, proved_kernels
from hsrloop.ops.paths import on_cpu
from hsrloop.ops.ranges import named
from hsrloop.ops.targets import STRIDES, PaddedTargets, pad_targets
from hsrloop.records import RawPredictions

__all__ = ["GAINS", "LossGains", "LossSums", "PaddedTargets", "detection_loss", "pad_targets"]

_DFL_MARGIN = 0.01  # distances end this far below the last bin; ultralytics@8.4.190
_PROOF_APART = 1e-3  # of half precision's gradients
_CHUNK_CPU = 1 << 20  # logits at a time: need no fresh memory each time (measured)


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the images of a micro-batch, gains not applied; 0-dim, float32 or float64.

    The sums of two halves of a batch add up to those of the batch.
    """

    box: Tensor
    cls: Tensor
    dfl: Tensor
    target_scores: Tensor  # S, without gradient; not yet bounded from below

    @property
    def parts(self) -> list[Tensor]:
        """All four."""
        return [self.box, self.cls, self.dfl, self.target_scores]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossGains:
    """Weight of each term; defaults of ultralytics@8.4.190."""

    box: float = 7.5
    cls: float = 0.5
    dfl: float = 1.5

    def weigh(self, sums: LossSums) -> Tensor:
        """Return the weighted sum, 0-dim, that `backward` starts from."""
        box_and_cls = torch.add(self.box * sums.box, sums.cls, alpha=self.cls)
        return torch.add(box_and_cls, sums.dfl, alpha=self.dfl)


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
            Without segments it is computed by `loss_kernels`.
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
    if targets.segments is None:
        kernels = loss_kernels(device)
        assert kernels is not None, "pad_targets was told to leave the segments out"
        return LossSums(*kernel_loss(raw, strides, targets, reg_max=reg_max, kernels=kernels))
    with torch.autocast(device.type, enabled=False):
        dtype = at_least_float32(raw.class_logits[:0]).dtype
        cells = anchor_table(raw.shapes, strides, device=device, dtype=dtype)
        with named("assign"):
            boxes = _decoded_columns(raw.box_logits.detach(), cells, reg_max=reg_max)
            chosen = assigner(boxes, raw.class_logits.detach(), targets)
        with named("loss"):
            box, dfl = _box_terms(raw.box_logits, cells, chosen, reg_max=reg_max)
            cls = sparse_bce_sum(raw.class_logits, chosen.logit, chosen.weight)
    return LossSums(box=box, cls=cls, dfl=dfl, target_scores=chosen.weight.sum())


def loss_kernels(device: torch.device) -> Kernels | None:
    """Return what computes the loss of float32 and half precision in one go; None: nothing does."""
    return proved_kernels(SOURCE, device, _proves) if device.type == "cuda" else None


def _proves(kernels: Kernels, device: torch.device) -> bool:
    """Return whether they give the sums and gradients that torch's operators give of a crowd.

    The operators compute on the CPU, in float64: on a GPU they would have to be loaded for this.
    """
    g = torch.Generator().manual_seed(0)
    shapes, boxes = ((20, 20), (10, 10), (5, 5)), 60
    side = 0.02 + 0.6 * torch.rand(boxes, 2, generator=g) ** 2
    centre = side / 2 + (1 - side) * torch.rand(boxes, 2, generator=g)
    truth = torch.cat((centre, side), 1), torch.arange(boxes) % 5, torch.arange(boxes) // 25
    noise = [torch.randn(4, channels, 525, generator=g) for channels in (64, 5)]
    targets = pad_targets(*truth, images=4, imgsz=160, places=40)
    bare = dataclasses.replace(targets, segments=None).to(device)
    for kind in (torch.float32, torch.float16):
        rounded = [logits.to(kind) for logits in noise]
        own = _raw([logits.to(device) for logits in rounded], shapes)
        sums = LossSums(*kernel_loss(own, STRIDES, bare, reg_max=16, kernels=kernels))
        exact = _raw([logits.double() for logits in rounded], shapes)
        wanted = detection_loss(exact, STRIDES, targets)
        pairs = zip(_numbers(sums, own), _numbers(wanted, exact), strict=True)
        if not all(bool((a - b).norm() <= _PROOF_APART * b.norm()) for a, b in pairs):
            return False
    return True


def _raw(logits: Sequence[Tensor], shapes: tuple[tuple[int, int], ...]) -> RawPredictions:
    box, cls = (part.requires_grad_() for part in logits)
    return RawPredictions(box, cls, shapes)


def _numbers(sums: LossSums, raw: RawPredictions) -> list[Tensor]:
    """Return sums and gradients, float64 on the CPU."""
    gradients = torch.autograd.grad(GAINS.weigh(sums), (raw.box_logits, raw.class_logits))
    return [part.detach().double().cpu() for part in (*sums.parts, *gradients)]


def _decoded_columns(box_logits: Tensor, cells: Tensor, *, reg_max: int) -> Tensor:
    """Return decoded boxes as (4, B, A) px: a contiguous plane for each coordinate."""
    distances = mean_distances(box_logits, reg_max=reg_max).transpose(0, 1) * cells[2]
    centre = cells[:2, None]  # (2, 1, A)
    return torch.cat((centre - distances[:2], centre + distances[2:]))


def _box_terms(
    box_logits: Tensor, cells: Tensor, chosen: Assignment, *, reg_max: int
) -> tuple[Tensor, Tensor]:
    """Return the sums of weighted 1 - CIoU and of the distribution focal loss.

    Both are computed only at the T slots of the assignment, which knows the CIoU already.
    """
    own, truth = cells.index_select(1, chosen.anchor), chosen.truth
    point, size = own[:2], own[2]  # (2, T), (T,) px
    aim = torch.cat((point - truth[:2], truth[2:] - point)).div_(size)  # (4, T) in cells
    slope = chosen.slope * (size * chosen.weight)
    aim = aim.clamp_(0, reg_max - 1 - _DFL_MARGIN)
    logits = box_logits.contiguous()
    found = aim, chosen.weight, chosen.ciou, slope
    if on_cpu(logits.device) and logits.dtype == torch.float32:
        from hsrloop.ops.loss_cpu import BoxTerms  # compiles, which a GPU need not wait for

        box, dfl = BoxTerms.apply(logits, chosen.image, chosen.anchor, *found)
        return box, dfl
    _, channels, anchors = logits.shape
    first = torch.add(chosen.anchor, chosen.image, alpha=channels * anchors)  # (T,)
    steps = torch.arange(0, channels * anchors, anchors, device=first.device)
    box, dfl = _BoxTerms.apply(logits, (first + steps[:, None]).view(-1), *found)
    return box, dfl


class _BoxTerms(torch.autograd.Function):
    """Both terms of T slots of box logits.

    Takes where the logits of each lie among all, (4R * T,); what sides should say, (4, T), in bins;
    weight and CIoU, (T,); the derivative of weighted CIoU by distances, (4, T).
    """

    @staticmethod
    def forward(ctx: Any, box_logits: Tensor, *slots: Tensor) -> tuple[Tensor, Tensor]:
        index, aim, weight, overlap, slope = slots
        logits = at_least_float32(box_logits.view(-1).index_select(0, index))
        shape = 4, box_logits.shape[1] // 4, len(weight)
        log_p = F.log_softmax(logits.view(shape), 1)
        below = aim[:, None].long()  # (4, 1, T)
        share = aim[:, None] - below
        above = below + 1
        nearest = log_p.gather(1, below).lerp_(log_p.gather(1, above), share)
        bins = torch.arange(shape[1], device=log_p.device, dtype=log_p.dtype)[:, None]
        ctx.save_for_backward(log_p, bins, below, above, share, weight, slope, index)
        ctx.like = box_logits.new_empty(0), box_logits.shape
        dfl = torch.mv(nearest.view_as(aim), weight).mean()
        return torch.dot(1 - overlap, weight), -dfl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_p, bins, below, above, share, weight, slope, index = ctx.saved_tensors
        by_box, by_dfl = grads
        like, shape = ctx.like
        out = like.new_zeros(shape)
        p = log_p.exp()  # (4, R, T)
        slope, quarter = slope * by_box, weight * (by_dfl / 4)  # (4, T), (T,)
        distance = torch.matmul(bins.t(), p)  # (4, 1, T)
        grad = (distance - bins).mul_(slope[:, None]).add_(quarter).mul_(p)
        part = share * quarter
        grad.scatter_add_(1, below, part - quarter)
        grad.scatter_add_(1, above, part.neg_())
        out.view(-1).index_add_(0, index, grad.view(-1).to(out.dtype))
        return (out, *[None] * 5)


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
        chunk = _CHUNK_CPU if on_cpu(flat.device) else max(flat.numel(), 1)
        parts = [F.softplus(at_least_float32(part)).sum() for part in torch.split(flat, chunk)]
        total = torch.stack(parts).sum() if len(parts) > 1 else parts[0]
        return total - torch.dot(at_least_float32(flat.index_select(0, index)), target)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, index, target = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = at_least_float32(logits).contiguous().sigmoid()
        grad.view(-1).index_add_(0, index, -target)
        return grad.mul_(grads[0]).to(logits.dtype), None, None
