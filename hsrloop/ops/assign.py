"""Task-aligned assignment of anchor points to ground truth boxes.

Only cells inside a box are looked at: no tensor is as large as boxes times anchor points. A GPU
looks at them in blocks of bounded size, without ever being waited for; what the CPU does instead
is in `assign_cpu` (float64 goes the GPU's way).

Source: Feng et al. 2021, arXiv:2108.07755; constants and order of the decisions as
ultralytics@8.4.190, TaskAlignedAssigner with topk 10, alpha 0.5, beta 6. One thing differs: a box
with fewer than 10 points of positive metric has those alone. There it is filled up with points of
metric 0, whichever `torch.topk` names, and these may take a point from a box beside it
(noise and 300 boxes in 160 px: losses a thousandth apart; in 640 px none; measured).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsrloop.ops.anchors import at_least_float32
from hsrloop.ops.boxes import Columns, Pairs
from hsrloop.ops.paths import on_cpu
from hsrloop.ops.targets import SEGMENT, PaddedTargets, Segments

TOPK = 10
"""Anchor points that each box may have."""

_EPS = 1e-9
_ROW_BITS = 28  # low bits of a ranking key: row of the box, image * M + place
_ROWS = (1 << _ROW_BITS) - 1

# Pairs at which a block ends. Kernels are few and large; 100 bytes of temporaries a pair (measured)
# then make 210 MB, while all activations are alive.
_BLOCK = 1 << 21


@dataclass(frozen=True, slots=True)
class Assignment:
    """Foreground anchor points, as T slots of which those of weight 0 are unused.

    On a GPU T depends on the number of boxes only. Each used anchor point stands in one slot.
    """

    image: Tensor  # (T,) int64
    anchor: Tensor  # (T,) int64, 0..A-1
    box: Tensor  # (T,) int64: image * M + place, into the flattened (B, M) targets
    logit: Tensor  # (T,) int64, into the flattened (B, C, A) class logits
    weight: Tensor  # (T,) target score in [0, 1]
    truth: Tensor  # (4, T) the box it was given, xyxy px
    ciou: Tensor  # (T,) complete IoU of the anchor point's decoded box with it
    slope: Tensor  # (4, T) its derivative by left, top, right and bottom moved outwards, per px


# Image, anchor point, row of the box, and whether the slot is used; (T,) each.
_Slots = tuple[Tensor, Tensor, Tensor, Tensor]


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

    def pairs(self, point: Tensor, box: Tensor) -> Pairs:
        """Return predictions and boxes in pairs; `point` is image * A + anchor."""
        return Pairs.of(self.predicted.at(point), self.truth.at(box))

    def logit(self, image: Tensor, anchor: Tensor, label: Tensor) -> Tensor:
        """Return the places of classes at points; `image` and `label` broadcast to `anchor`."""
        row = torch.add(label, image, alpha=self.classes)
        return torch.add(anchor, row, alpha=self.anchors)

    def metric(self, logit: Tensor, overlap: Tensor) -> Tensor:
        """Return score ** 0.5 * overlap ** 6."""
        chosen = self.logits.index_select(0, logit.view(-1)).view(logit.shape)
        score = at_least_float32(chosen).sigmoid_()
        cube = overlap * overlap * overlap
        return score.sqrt_().mul_(cube).mul_(cube)


@torch.no_grad()
def assign(boxes: Tensor, class_logits: Tensor, targets: PaddedTargets) -> Assignment:
    """Give each ground truth box the anchor points that fit it best.

    Of the points inside a box the 10 with the highest score ** 0.5 * CIoU ** 6 are its own. A
    point wanted by several boxes goes to the one it overlaps most, even one that did not want it.
    Target scores are metrics scaled so that the best point of a box gets its best overlap.

    Args:
        boxes: (4, B, A) decoded predictions, x1 y1 x2 y2 in px, float32 or float64.
        class_logits: (B, C, A).
        targets: of the same B images and A points, with segments; M may be 0, then T is 0.

    Raises:
        ValueError: the targets are of other images or points; on the CPU also: of other classes.
    """
    segments = targets.segments
    assert segments is not None, "pad_targets was told to leave the segments out"
    images, classes, anchors = class_logits.shape
    points = sum(height * width for height, width in targets.shapes)
    if (len(targets.labels), points) != (images, anchors):
        raise ValueError(
            f"the targets are of {len(targets.labels)} images with {points} points each, the "
            f"predictions of {images} with {anchors}"
        )
    places = targets.labels.shape[1]
    scene = _Scene(
        predicted=Columns.of(boxes.reshape(4, -1)),
        logits=class_logits.detach().reshape(-1).contiguous(),
        truth=Columns(targets.table.to(boxes.dtype)),
        labels=targets.labels.view(-1),
        images=images,
        classes=classes,
        anchors=anchors,
        places=places,
    )
    if on_cpu(boxes.device) and boxes.dtype == torch.float32:
        return _assigned_on_cpu(scene, segments)
    # (N, 10), (N, 10), (B * A,)
    metric, anchor, ranking = _candidates(scene, segments, len(targets.shapes))
    own = segments.rows[:, None].expand_as(anchor).reshape(-1)  # (N * 10,)
    return _scored(scene, *_resolve(scene, metric.view(-1) > 0, anchor.view(-1), own, ranking))


def _assigned_on_cpu(scene: _Scene, segments: Segments) -> Assignment:
    from hsrloop.ops import assign_cpu  # compiles, which a GPU need not wait for

    labels = segments.table[SEGMENT.index("label")].numpy()
    if len(labels) and not 0 <= labels.min() <= labels.max() < scene.classes:
        raise ValueError(f"a label is none of {scene.classes} classes")
    images, threads = scene.images, torch.get_num_threads()
    predicted, truth = scene.predicted.table.numpy(), scene.truth.table.numpy()
    tables = predicted, scene.logits.float().numpy(), truth
    chosen = assign_cpu.settled_pairs(
        *tables, segments.table.numpy(), images=images, topk=TOPK, threads=threads
    )
    scores = assign_cpu.scored_pairs(
        *tables, scene.labels.numpy(), *chosen, images=images, threads=threads
    )
    image, anchor, place, ciou, slope, weight = map(torch.from_numpy, (*chosen, *scores))
    box = torch.add(place, image, alpha=scene.places)
    logit = scene.logit(image, anchor, scene.labels.index_select(0, box))
    given = scene.truth.table[:4].index_select(1, box)
    return Assignment(image, anchor, box, logit, weight, given, ciou, slope)


def _candidates(scene: _Scene, segments: Segments, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return metric and anchor point of each box's best 10, and who overlaps each point most.

    Unused places have metric 0. The ranking is a key per (image, point): overlap, then the lowest
    place, so that a maximum over boxes finds both.
    """
    device, dtype = segments.rows.device, scene.predicted.area.dtype
    best = torch.zeros((len(segments.rows) * levels, TOPK), device=device, dtype=dtype)
    where = torch.zeros((len(segments.rows) * levels, TOPK), device=device, dtype=torch.int64)
    ranking = torch.zeros(scene.images * scene.anchors, device=device, dtype=torch.int64)
    numbers = segments.table[:5].float()
    for block, longest in _blocks(segments.cells, _BLOCK):
        slot, *_, row, image, label = segments.table[:, block, None].unbind(0)  # (g, 1)
        _, first, width, skipped, last = numbers[:, block, None].unbind(0)
        k = torch.arange(longest, device=device, dtype=torch.float32)  # (K,)
        inside = k <= last  # (g, K)
        k = torch.minimum(k, last)  # padding repeats the last cell
        line = ((k + 0.5) * (1 / width)).floor_()  # exact: no rectangle has 2**20 cells
        anchor = k.add_(first).addcmul_(line, skipped).to(torch.int64)
        point = torch.add(anchor, image, alpha=scene.anchors)
        overlap = scene.pairs(point, row).ciou().clamp_(min=0)
        metric = scene.metric(scene.logit(image, anchor, label), overlap)
        keys = _keys(overlap, row)
        ranking.scatter_reduce_(0, point.view(-1), keys.view(-1), "amax")
        top, index = (metric * inside).topk(TOPK, dim=1)
        best[slot.squeeze(1)] = top
        where[slot.squeeze(1)] = anchor.gather(1, index)
    best, where = best.view(-1, levels * TOPK), where.view(-1, levels * TOPK)
    best, index = best.topk(TOPK, dim=1)
    return best, where.gather(1, index), ranking


def _blocks(cells: Sequence[int], pairs: int) -> Iterator[tuple[slice, int]]:
    """Cut segments of falling size into blocks, each padded to its first segment.

    A block holds at most `pairs` padded cells, but at least one segment.
    """
    start = 0
    while start < len(cells):
        longest = max(cells[start], TOPK)
        stop = min(start + max(1, pairs // longest), len(cells))
        yield slice(start, stop), longest
        start = stop


def _keys(overlap: Tensor, row: Tensor) -> Tensor:
    """Return integers ordered by overlap, and among equals by falling row.

    A float that is not negative orders as its bits do. float32 is kept whole; of float64 the
    lowest 28 bits of 52 give way to the row.
    """
    if overlap.dtype == torch.float64:
        bits = overlap.view(torch.int64) & ~_ROWS
    else:
        bits = overlap.view(torch.int32).to(torch.int64) << _ROW_BITS
    return bits.add_(_ROWS - row)


def _resolve(scene: _Scene, wanted: Tensor, anchor: Tensor, own: Tensor, ranking: Tensor) -> _Slots:
    """Settle points wanted by several boxes; all (N * 10,)."""
    total = scene.images * scene.anchors
    image = own // max(scene.places, 1)
    point = torch.add(anchor, image, alpha=scene.anchors)
    slot = torch.arange(len(own), device=own.device)
    first = torch.full((total,), len(own), device=own.device)
    first.scatter_reduce_(0, point, torch.where(wanted, slot, len(own)), "amin")
    last = torch.full((total,), -1, device=own.device)
    last.scatter_reduce_(0, point, torch.where(wanted, slot, -1), "amax")
    first, last = first[point], last[point]
    nearest = _ROWS - (ranking[point] & _ROWS)
    box = torch.where(first < last, nearest, own)
    used = wanted & (first == slot)
    if len(own) > total:  # more slots than points: the used ones come first and all fit
        order = used.int().argsort(descending=True, stable=True)[:total]
        image, anchor, box, used = image[order], anchor[order], box[order], used[order]
    return image, anchor, box, used


def _scored(scene: _Scene, image: Tensor, anchor: Tensor, box: Tensor, used: Tensor) -> Assignment:
    """Score points given to boxes; all (T,)."""
    pairs = scene.pairs(torch.add(anchor, image, alpha=scene.anchors), box)
    ciou = pairs.ciou()
    overlap = ciou.clamp(min=0).mul_(used)
    logit = scene.logit(image, anchor, scene.labels.index_select(0, box))
    metric = scene.metric(logit, overlap)  # 0 where unused, as the overlap is
    highest = torch.zeros((2, len(scene.labels)), device=box.device, dtype=metric.dtype)
    highest[0].scatter_reduce_(0, box, metric, "amax")
    highest[1].scatter_reduce_(0, box, overlap, "amax")
    weight = metric * (highest[1] / (highest[0] + _EPS)).index_select(0, box)
    truth = pairs.b.table[:4]
    return Assignment(image, anchor, box, logit, weight, truth, ciou, pairs.by_sides())
