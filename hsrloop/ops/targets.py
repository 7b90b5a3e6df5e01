"""Ground truth of a batch, prepared on the host so that the loss never waits for the device.

Which anchor points lie inside a box depends on the box alone. On each level of the pyramid they
form a rectangle of cells, so a box is (image, level) rectangles, here called segments, whose sizes
are known before anything reaches the device. They are laid out by falling size: the assigner cuts
them into dense blocks with little padding and static shapes. `loss.cu` finds them by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from hsrloop.ops.boxes import Columns, cxcywh_to_xyxy, xyxy_to_cxcywh

STRIDES = (8, 16, 32)
"""Levels of every YOLOv8 detector, px."""

SEGMENT = ("slot", "first", "width", "skipped", "last", "row", "image", "label")
"""Rows of `Segments.table`.

The slot is box * L + level; the rectangle begins at cell `first`, is `width` cells wide, and from
the end of a line to the next one `skipped` cells are not inside; `last` is one less than the cells
of it; `row` is image * M + place.
"""

_INSIDE_PX = 1e-9  # a centre must be further inside than this; ultralytics@8.4.190


@dataclass(frozen=True, slots=True)
class Segments:
    """The cells inside N boxes, as G rectangles that are not empty."""

    rows: Tensor  # (N,) int64: image * M + place of each box
    table: Tensor  # (8, G) int64: see `SEGMENT`
    cells: tuple[int, ...]  # (G,) cells of each, falling; kept on the host


@dataclass(frozen=True, slots=True)
class PaddedTargets:
    """Boxes of B images, each padded to M."""

    table: Tensor  # (6, B * M) float32 `Columns` of the boxes, px, 0 where padded; M may be 0
    labels: Tensor  # (B, M) int64, -1 where padded
    shapes: tuple[tuple[int, int], ...]  # (h, w) of each level
    segments: Segments | None  # where torch's operators or the CPU's loop assign

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        own = self.segments
        return [self.table, self.labels, *(() if own is None else (own.rows, own.table))]

    def to(self, device: torch.device) -> PaddedTargets:
        """Return a copy whose tensors are on the device; to a GPU they go in one copy.

        It starts from page-locked memory, so that the host need not wait for it.
        """
        parts = [part.contiguous().view(-1).view(torch.int64) for part in self.tensors]
        ends = list(accumulate(len(part) for part in parts))
        host = torch.empty(ends[-1], dtype=torch.int64, pin_memory=device.type == "cuda")
        sent = torch.cat(parts, out=host).to(device, non_blocking=True)
        table, labels, *others = (
            sent[end - len(part) : end].view(old.dtype).view(old.shape)
            for part, end, old in zip(parts, ends, self.tensors, strict=True)
        )
        segments = self.segments
        if segments is not None:
            rows, own = others
            segments = Segments(rows, own, segments.cells)
        return PaddedTargets(table, labels, self.shapes, segments)


def pad_targets(
    boxes_cxcywh: Tensor,
    labels: Tensor,
    image_index: Tensor,
    *,
    images: int,
    imgsz: int,
    strides: Sequence[int] = STRIDES,
    places: int = 0,
    segments: bool = True,
) -> PaddedTargets:
    """Arrange the boxes of a batch for the loss; for tensors on the host.

    Args:
        boxes_cxcywh: (N, 4) float, fractions of imgsz; N may be 0. A box may have no area.
        labels: (N,) class numbers.
        image_index: (N,) in [0, images), in rising order.
        images: B, images in the batch.
        imgsz: side of the square network input, px; a multiple of the largest stride.
        strides: px, one a level, as the head's.
        places: M, if no image has more boxes.
        segments: whether they are needed.

    Returns:
        Targets on the host, boxes in the order given; `.to(device)` moves them.
    """
    image = image_index.long()
    count = torch.bincount(image, minlength=images)
    width = max(int(count.max()) if len(image) else 0, places)
    place = places_within(image, count)
    rows = image * width + place
    flat = cxcywh_to_xyxy(boxes_cxcywh.float() * imgsz)
    boxes = torch.zeros(4, images * width).index_copy_(1, rows, flat.t())
    table = Columns.of(boxes).table
    classes = torch.full((images * width,), -1).index_copy_(0, rows, labels.long())
    shapes = tuple((imgsz // stride, imgsz // stride) for stride in strides)
    found = None
    if segments:
        enlarged = _enlarged(flat, strides).numpy()
        found = _segments(enlarged, (rows, image, labels.long()), shapes, strides)
    return PaddedTargets(table, classes.view(images, width), shapes, found)


def places_within(image: Tensor, count: Tensor) -> Tensor:
    """Return (N,) how many boxes of its image come before each: boxes lie image by image.

    Args:
        image: (N,) int64 of each box, rising.
        count: (B,) boxes of each image.
    """
    return torch.arange(len(image)) - (count.cumsum(0) - count)[image]


def smallest_side(strides: Sequence[int]) -> int:
    """Return the px that sides count as at least, so that small boxes hold anchor points too.

    Source: ultralytics@8.4.190, TaskAlignedAssigner.select_candidates_in_gts.
    """
    return strides[1] if len(strides) > 1 else strides[0]


def _enlarged(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Widen sides below `smallest_side` to it."""
    boxes = xyxy_to_cxcywh(boxes)
    boxes[:, 2:].clamp_(min=smallest_side(strides))
    return cxcywh_to_xyxy(boxes)


def _segments(
    boxes: np.ndarray,
    owners: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
) -> Segments:
    """Return the rectangles of cells whose centres lie in (N, 4) boxes.

    Args:
        owners: row, image and label of each box, (N,) each.
    """
    tables, before = [], 0
    for level, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
        x0, columns = _span(boxes[:, 0], boxes[:, 2], width, stride)
        y0, lines = _span(boxes[:, 1], boxes[:, 3], height, stride)
        table = np.empty((5, len(boxes)), dtype=np.int64)
        table[0] = np.arange(len(boxes)) * len(shapes) + level
        table[1] = before + y0 * width + x0
        table[2] = columns
        table[3] = width - columns
        table[4] = columns * lines
        tables.append(table)
        before += height * width
    merged = np.concatenate(tables, 1)
    merged = merged[:, np.argsort(-merged[4], kind="stable")]
    merged = merged[:, merged[4] > 0]
    cells, box = merged[4], merged[0] // len(shapes)
    whose = (part.numpy()[box] for part in owners)
    table = np.stack((*merged[:4], cells - 1, *whose))
    return Segments(owners[0], torch.from_numpy(table), tuple(cells.tolist()))


def _span(low: np.ndarray, high: np.ndarray, cells: int, stride: int) -> tuple[np.ndarray, ...]:
    """Return the first cell whose centre is inside (low, high), and how many are; (N,) each.

    A quotient says where the ends are but for its rounding; the cells around it are looked at.
    """
    size = np.float32(stride)

    def centre(cell: np.ndarray) -> np.ndarray:
        return (cell.astype(np.float32) + np.float32(0.5)) * size

    first = _near(low, cells, size)  # a cell too early
    last = _near(high, cells, size) + 3  # a cell too late
    for _ in range(3):
        first += ~(centre(first) - low > _INSIDE_PX)
        last -= ~(high - centre(last) > _INSIDE_PX)
    first, last = np.maximum(first, 0), np.minimum(last, cells - 1)
    count = np.maximum(last - first + 1, 0)
    return np.where(count > 0, first, 0), count


def _near(place: np.ndarray, cells: int, size: np.float32) -> np.ndarray:
    """Return a cell whose centre lies one to two cells before a place, where there are any."""
    return np.clip(np.floor(place / size - np.float32(0.5)), -2, cells).astype(np.int64) - 1
