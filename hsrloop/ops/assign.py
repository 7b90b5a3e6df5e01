"""Task-aligned assignment of anchor points to ground truth boxes.

Nothing here waits for the device, and no tensor is as large as boxes times anchor points: only
cells inside a box are looked at, in blocks of bounded size.

Source: Feng et al. 2021, arXiv:2108.07755; constants and order of the decisions as
ultralytics@8.4.190, TaskAlignedAssigner with topk 10, alpha 0.5, beta 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsrloop.ops.anchors import at_least_float32
from hsrloop.ops.boxes import Columns, ciou_of_columns
from hsrloop.ops.targets import PaddedTargets

TOPK = 10
"""Anchor points that each box may have."""

_EPS = 1e-9
_PLACE_BITS = 20  # low bits of a ranking key: place of the box in its image, so below 2**20 boxes
_PLACES = (1 << _PLACE_BITS) - 1

# (pairs, padding) at which a block ends. On the CPU temporaries then stay in cache, and padding
# costs no more than the 45 calls of one more block (measured). On a GPU kernels are few and large;
# 100 bytes of temporaries a pair (measured) then make 105 MB, while all activations are alive.
_BLOCK_CPU = (1 << 15, 1 << 12)
_BLOCK_GPU = (1 << 20, 1 << 20)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Foreground anchor points, as T slots of which those of weight 0 are unused.

    T depends on the number of boxes only. Each used anchor point stands in one slot.
    """

    image: Tensor  # (T,) int64
    anchor: Tensor  # (T,) int64, 0..A-1
    box: Tensor  # (T,) int64: image * M + place, into the flattened (B, M) targets
    weight: Tensor  # (T,) target score in [0, 1]


@dataclass(frozen=True, slots=True)
class _Scene:
    """What every pair of a box and an anchor point is computed from."""

    predicted: Columns  # (B * A,)
    logits: Tensor  # (B * C * A,)
    truth: Columns  # (B * M,)
    labels: Tensor  # (B * M,)
    images: int
    classes: int
    anchors: int  # A
    places: int  # M

    def align(self, image: Tensor, anchor: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
        """Return metric and overlap of pairs; `image` and `box` broadcast to `anchor`."""
        truth = self.truth.at(box)
        overlap = ciou_of_columns(truth, self.predicted.at(image * self.anchors + anchor))
        overlap.clamp_(min=0)
        first = (image * self.classes + self.labels[box]) * self.anchors
        index = (first + anchor).view(-1)
        score = at_least_float32(self.logits.index_select(0, index)).sigmoid_().view(anchor.shape)
        cube = overlap * overlap * overlap
        return score.sqrt_().mul_(cube).mul_(cube), overlap


@torch.no_grad()
def assign(boxes: Tensor, class_logits: Tensor, targets: PaddedTargets) -> Assignment:
    """Give each ground truth box the anchor points that fit it best.

    Of the points inside a box the 10 with the highest score ** 0.5 * CIoU ** 6 are its own. A
    point wanted by several boxes goes to the one it overlaps most, even one that did not want it.
    Target scores are metrics scaled so that the best point of a box gets its best overlap.

    Args:
        boxes: (4, B, A) decoded predictions, x1 y1 x2 y2 in px, float32 or float64.
        class_logits: (B, C, A).
        targets: of the same B images and A points; M may be 0, then T is 0.
    """
    images, classes, anchors = class_logits.shape
    places = targets.boxes_xyxy_px.shape[1]
    scene = _Scene(
        predicted=Columns.of(boxes.reshape(4, -1)),
        logits=class_logits.reshape(-1),
        truth=Columns.of(targets.boxes_xyxy_px.to(boxes.dtype).view(-1, 4).t()),
        labels=targets.labels.view(-1),
        images=images,
        classes=classes,
        anchors=anchors,
        places=places,
    )
    metric, anchor, ranking = _candidates(scene, targets)  # (N, 10), (N, 10), (B * A,)
    own = targets.rows[:, None].expand_as(anchor).reshape(-1)  # (N * 10,)
    return _resolve(scene, metric.view(-1) > 0, anchor.view(-1), own, ranking)


def _candidates(scene: _Scene, targets: PaddedTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Return metric and anchor point of each box's best 10, and who overlaps each point most.

    Unused places have metric 0. The ranking is a key per (image, point): overlap, then the lowest
    place, so that a maximum over boxes finds both.
    """
    levels = len(targets.shapes)
    device, dtype = targets.rows.device, scene.predicted.area.dtype
    best = torch.zeros((len(targets.rows) * levels, TOPK), device=device, dtype=dtype)
    where = torch.zeros((len(targets.rows) * levels, TOPK), device=device, dtype=torch.int64)
    ranking = torch.zeros(scene.images * scene.anchors, device=device, dtype=torch.int64)
    for block, longest in _blocks(targets.cells, *_limits(device)):
        segment, first, width, skip, cells = targets.segments[:, block, None].unbind(0)  # (g, 1)
        box = targets.rows[segment // levels]
        image = box // scene.places
        k = torch.arange(longest, device=device)  # (K,)
        inside = k < cells  # (g, K)
        k = torch.minimum(k, cells - 1).float()  # padding repeats the last cell
        line = ((k + 0.5) * (1 / width.float())).floor_()  # exact: no rectangle has 2**20 cells
        anchor = line.mul_(skip.float()).add_(k).to(torch.int64).add_(first)
        metric, overlap = scene.align(image, anchor, box)
        keys = _keys(overlap, box - image * scene.places)
        ranking.scatter_reduce_(0, (image * scene.anchors + anchor).view(-1), keys.view(-1), "amax")
        top, index = (metric * inside).topk(TOPK, dim=1)
        best[segment.squeeze(1)] = top
        where[segment.squeeze(1)] = anchor.gather(1, index)
    best, where = best.view(-1, levels * TOPK), where.view(-1, levels * TOPK)
    best, index = best.topk(TOPK, dim=1)
    return best, where.gather(1, index), ranking


def _limits(device: torch.device) -> tuple[int, int]:
    return _BLOCK_CPU if device.type == "cpu" else _BLOCK_GPU


def _blocks(cells: Sequence[int], pairs: int, padding: int) -> Iterator[tuple[slice, int]]:
    """Cut segments of falling size into blocks, each padded to its first segment.

    A block holds at most `pairs` padded cells and `padding` cells of padding, but at least one
    segment.
    """
    start, wasted = 0, 0
    for i, count in enumerate(cells):
        longest = max(cells[start], TOPK)
        wasted += longest - count
        if i > start and ((i - start + 1) * longest > pairs or wasted > padding):
            yield slice(start, i), longest
            start, wasted = i, max(count, TOPK) - count
    if cells:
        yield slice(start, len(cells)), max(cells[start], TOPK)


def _keys(overlap: Tensor, place: Tensor) -> Tensor:
    """Return integers ordered by overlap, and among equals by falling place.

    A float that is not negative orders as its bits do. float32 is kept whole; of float64 the
    lowest 20 bits of 52 give way to the place.
    """
    if overlap.dtype == torch.float64:
        bits = overlap.view(torch.int64) & ~_PLACES
    else:
        bits = overlap.view(torch.int32).to(torch.int64) << _PLACE_BITS
    return bits.add_(_PLACES - place)


def _resolve(
    scene: _Scene, wanted: Tensor, anchor: Tensor, own: Tensor, ranking: Tensor
) -> Assignment:
    """Settle points wanted by several boxes and score what remains; all (N * 10,)."""
    total = scene.images * scene.anchors
    image = own // max(scene.places, 1)
    point = image * scene.anchors + anchor
    claims = torch.zeros(total, device=own.device, dtype=torch.int32)
    claims.index_add_(0, point, wanted.int())
    slot = torch.arange(len(own), device=own.device)
    first = torch.full((total,), len(own), device=own.device)
    first.scatter_reduce_(0, point, torch.where(wanted, slot, len(own)), "amin")
    nearest = image * scene.places + (_PLACES - (ranking[point] & _PLACES))
    box = torch.where(claims[point] > 1, nearest, own)
    used = wanted & (first[point] == slot)
    if len(own) > total:  # more slots than points: the used ones come first and all fit
        order = used.int().argsort(descending=True, stable=True)[:total]
        image, anchor, box, used = image[order], anchor[order], box[order], used[order]
    box = torch.where(used, box, 0)  # unused slots hold any pair; keep them in range
    metric, overlap = (value * used for value in scene.align(image, anchor, box))
    highest = torch.zeros((2, len(scene.labels)), device=box.device, dtype=metric.dtype)
    highest[0].scatter_reduce_(0, box, metric, "amax")
    highest[1].scatter_reduce_(0, box, overlap, "amax")
    weight = metric * highest[1][box] / (highest[0][box] + _EPS)
    return Assignment(image=image, anchor=anchor, box=box, weight=weight)
