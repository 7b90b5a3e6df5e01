"""Assignment and loss on CUDA, as `loss.cu` computes them: a dozen launches, forward and backward.

Their shapes depend on the number of places for boxes only, not on the boxes: so a step may be
recorded with them. What they allocate is small beside the logits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hsrloop.ops.assign import TOPK
from hsrloop.ops.ranges import named
from hsrloop.ops.targets import PaddedTargets, smallest_side
from hsrloop.records import RawPredictions

SOURCE = Path(__file__).with_name("loss.cu")

# As in `loss.cu`, as TOPK is.
_LANES = 128
_MANY = 16  # the most bins, too
_MOST_LEVELS = 8
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TENSORS = (
    *("box_logits", "class_logits", "truth", "labels", "levels"),
    *("predicted", "ranking", "earliest", "latest", "wanted", "given", "ciou", "metric"),
    *("highest", "weight", "parts", "sums"),
    *("by_box", "by_cls", "by_dfl", "box_gradient", "class_gradient"),
)
_NUMBERS = ("kind", "images", "anchors", "classes", "places", "depth", "bins", "threads")

_THREADS = 128  # of a block, where they have nothing to do with each other
_SUMS = 1 << 17  # threads that add up softplus

Launch = Callable[..., None]


class _Pass(ctypes.Structure):
    """What each kernel is given; see `loss.cu`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_int) for name in _NUMBERS),
        ("smallest", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class _Scene:
    """What the logits are compared with, and by what."""

    kernels: Mapping[str, Launch]
    truth: Tensor  # (6, B * M) float32
    labels: Tensor  # (B, M) int64
    levels: Tensor  # (L, 4) int32
    smallest: int  # px
    bins: int

    def of(self, box_logits: Tensor, class_logits: Tensor, **tensors: Tensor) -> _Pass:
        """Return the kernels' argument; what it names must live until they are started."""
        images, classes, anchors = class_logits.shape
        own = {"truth": self.truth, "labels": self.labels, "levels": self.levels}
        given = {"box_logits": box_logits, "class_logits": class_logits, **own, **tensors}
        return _Pass(
            **{name: tensor.data_ptr() for name, tensor in given.items()},
            kind=_KINDS[class_logits.dtype],
            images=images,
            anchors=anchors,
            classes=classes,
            places=self.labels.shape[1],
            depth=len(self.levels),
            bins=self.bins,
            threads=_SUMS,
            smallest=self.smallest,
        )

    def start(self, name: str, given: _Pass, *, threads: int) -> None:
        """Start a kernel with so many threads."""
        if threads:
            grid, block = (-(-threads // _THREADS), 1, 1), (_THREADS, 1, 1)
            self.kernels[name](grid, block, self.truth.device, given)

    def search(self, given: _Pass) -> None:
        """Start `search`, with a block for each place."""
        if self.labels.numel():
            grid, block = (self.labels.numel(), 1, 1), (_LANES, 1, 1)
            self.kernels["search"](grid, block, self.truth.device, given)


def suits(strides: Sequence[int], *, reg_max: int) -> bool:
    """Return whether the kernels can take what a head of such levels and bins says."""
    return len(strides) <= _MOST_LEVELS and reg_max <= _MANY


def kernel_loss(
    raw: RawPredictions,
    strides: Sequence[int],
    targets: PaddedTargets,
    *,
    reg_max: int,
    kernels: Mapping[str, Launch],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `detection_loss` does.

    Args:
        raw: logits, both float32, float16 or bfloat16, of a head that `suits`.
        kernels: of `loss.cu`, on the device of the logits.

    Returns:
        Sums of box, class and distribution terms, with a gradient, and of target scores; 0-dim.
    """
    truth, labels = targets.table.contiguous(), targets.labels.contiguous()
    levels = _levels(raw.shapes, tuple(strides), truth.device)
    scene = _Scene(kernels, truth, labels, levels, smallest_side(strides), reg_max)
    logits = raw.box_logits.contiguous(), raw.class_logits.contiguous()
    box, cls, dfl, scores = _KernelLoss.apply(*logits, scene)
    return box, cls, dfl, scores


@functools.cache
def _levels(
    shapes: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device
) -> Tensor:
    rows, first = [], 0
    for (height, width), stride in zip(shapes, strides, strict=True):
        rows.append((first, height, width, stride))
        first += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)


class _KernelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, box_logits: Tensor, class_logits: Tensor, scene: _Scene) -> Any:
        images, _, anchors = class_logits.shape
        points, boxes = images * anchors, scene.labels.numel()
        slots, device = boxes * TOPK, class_logits.device
        # In one piece, since all begin at 0: a point's key takes two places.
        zeros = torch.zeros(4 * points + 2 * boxes, dtype=torch.int32, device=device)
        ranking, earliest, latest, highest = torch.split(
            zeros, [2 * points, points, points, 2 * boxes]
        )
        predicted = torch.empty((6, points), device=device)
        wanted, given = torch.empty((2, slots), dtype=torch.int32, device=device)
        ciou, metric, weight = torch.empty((3, slots), device=device)
        parts, sums = torch.empty((4, slots), device=device), torch.empty(_SUMS, device=device)
        found = {"predicted": predicted, "wanted": wanted, "given": given, "weight": weight}
        work = scene.of(
            box_logits,
            class_logits,
            **found,
            ranking=ranking,
            earliest=earliest,
            latest=latest,
            highest=highest,
            ciou=ciou,
            metric=metric,
            parts=parts,
            sums=sums,
        )
        with named("assign"):
            scene.start("decode", work, threads=points)
            scene.search(work)
            scene.start("settle", work, threads=slots)
        with named("loss"):
            scene.start("terms", work, threads=slots)
            scene.start("softplus", work, threads=_SUMS)
            box, dfl, scored, scores = parts.sum(1).unbind(0)
        ctx.save_for_backward(box_logits, class_logits)
        ctx.scene, ctx.found = scene, found
        ctx.mark_non_differentiable(scores)
        return box, sums.sum() - scored, dfl, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        box_logits, class_logits = ctx.saved_tensors
        by_box, by_cls, by_dfl, _ = grads
        box_gradient = torch.zeros_like(box_logits)
        class_gradient = torch.empty_like(class_logits)
        work = ctx.scene.of(
            box_logits,
            class_logits,
            **ctx.found,
            by_box=by_box,
            by_cls=by_cls,
            by_dfl=by_dfl,
            box_gradient=box_gradient,
            class_gradient=class_gradient,
        )
        ctx.scene.start("background", work, threads=-(-class_logits.numel() // _MANY))
        ctx.scene.start("foreground", work, threads=4 * len(ctx.found["wanted"]))
        return box_gradient, class_gradient, None
