"""Levels of the head, anchor points and the decoding of box distributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hsrloop.ops.paths import on_cpu
from hsrloop.records import LevelLogits, RawPredictions

_IMAGES_CPU = 4  # decoded at a time


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32, anything wider as it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def joined(levels: LevelLogits) -> RawPredictions:
    """Return the logits of all levels as one tensor of each kind."""
    boxes, classes = (
        torch.cat([x.flatten(2) for x in kind], dim=2) for kind in (levels.boxes, levels.classes)
    )
    return RawPredictions(boxes, classes, levels.shapes)


def anchor_table(
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the centre of every grid cell and its stride, level by level, row by row.

    Args:
        shapes: (height, width) of each level, in cells.
        strides: px of a cell's side, one a level.

    Returns:
        (3, A): x and y in px of the network input, stride in px.
    """
    levels = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        x, y = (
            torch.arange(stride / 2, cells * stride, stride, device=device, dtype=dtype)
            for cells in (width, height)
        )
        size = torch.full((1, 1), stride, device=device, dtype=dtype)
        rows = (x.expand(height, width), y[:, None].expand(height, width))
        levels.append(torch.stack((*rows, size.expand(height, width))).view(3, -1))
    return torch.cat(levels, 1)


def anchor_points(
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return `anchor_table` as (A, 2) centres and (A, 1) strides, px."""
    table = anchor_table(shapes, strides, device=device, dtype=dtype)
    return table[:2].t(), table[2, :, None]


def mean_distances(box_logits: Tensor, *, reg_max: int) -> Tensor:
    """Return the mean of each side's distribution: (B, 4R, A) logits to (B, 4, A), in strides.

    On the CPU it goes by a few images, so that the exponentials need no fresh memory each time:
    twice as fast at 640 where freed memory is not kept (measured, 1 thread).
    """
    images, _, points = box_logits.shape
    bins = torch.arange(reg_max, device=box_logits.device, dtype=torch.float32)
    step = _IMAGES_CPU if on_cpu(box_logits.device) else max(images, 1)
    parts = []
    with torch.autocast(box_logits.device.type, enabled=False):
        for part in torch.split(box_logits, step):
            logits = at_least_float32(part).view(-1, 4, reg_max, points)
            parts.append(torch.matmul(bins.to(logits.dtype), torch.softmax(logits, 2)))
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def decode(box_logits: Tensor, points: Tensor, strides: Tensor, *, reg_max: int = 16) -> Tensor:
    """Decode side distributions into boxes.

    Args:
        box_logits: (B, 4 * reg_max, A), any float; sides in the order left, top, right, bottom.
        points, strides: (A, 2) and (A, 1) px, of `anchor_points`.

    Returns:
        (B, A, 4) xyxy px, float32 (float64 for float64), not clipped to the image.

    Source: Li et al. 2020, arXiv:2006.04388, equation 4.
    """
    distances = mean_distances(box_logits, reg_max=reg_max).transpose(1, 2) * strides  # (B, A, 4)
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1)


def predictions(
    raw: RawPredictions, strides: Sequence[int], *, reg_max: int = 16
) -> tuple[Tensor, Tensor]:
    """Turn what the head says into boxes and scores.

    Returns:
        (B, A, 4) xyxy px and (B, A, C) in (0, 1), both float32 (float64 for float64). The scores
        are a view of (B, C, A) memory.
    """
    logits = at_least_float32(raw.class_logits)
    points, sizes = anchor_points(raw.shapes, strides, device=logits.device, dtype=logits.dtype)
    boxes = decode(raw.box_logits, points, sizes, reg_max=reg_max)
    return boxes, logits.sigmoid().transpose(1, 2)
