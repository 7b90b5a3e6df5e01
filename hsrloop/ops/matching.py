"""Which detections are right, for all images of a validation at once.

Source: ultralytics@8.4.190, DetectionValidator.match_predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hsrloop.ops.boxes import iou_matrix
from hsrloop.ops.nms import Found
from hsrloop.ops.nvrtc import Kernel, Kernels, proved_kernels
from hsrloop.ops.targets import places_within

IOUS = torch.linspace(0.5, 0.95, 10).numpy()
"""Thresholds of a match: 0.5, 0.55, ... 0.95 (float32, as the peer has them)."""

_NO_CLASS = -1
MATCH = Path(__file__).with_name("match.cu")
_MOST_BOXES = 1024  # as it can take
_WARP = 32
_PAIRS = 1 << 21  # of boxes and detections at a time; 50 bytes of temporaries each (a guess)


def match(detections: Tensor, gt_boxes_xyxy: Tensor, gt_labels: Tensor) -> Tensor:
    """Say which detections are right, at each IoU threshold; image by image, all at once.

    Each detection of an image in turn takes, among the boxes of its class that none before it took,
    the one it overlaps most; it is right if the IoU reaches the threshold. Nothing here waits for
    the device.

    Args:
        detections: (B, D, 6) xyxy, score, class; best first; padded with boxes of no area.
        gt_boxes_xyxy: (B, M, 4) in the same frame, on the same device; M may be 0.
        gt_labels: (B, M) class numbers, -1 where padded.

    Returns:
        (B, D, 10) bool.
    """
    images, most = gt_labels.shape
    device = detections.device
    thresholds = torch.from_numpy(IOUS).to(device, non_blocking=True)
    if not most:
        shape = (images, detections.shape[1], len(IOUS))
        return torch.zeros(shape, dtype=torch.bool, device=device)
    same_class = gt_labels[:, :, None] == detections[:, None, :, 5]  # (B, M, D)
    iou = iou_matrix(gt_boxes_xyxy.float(), detections[..., :4].float()).mul_(same_class)
    if (kernel := _kernel_for(iou)) is not None:
        return _greedy(kernel, iou, thresholds)
    return _in_turn(iou, thresholds)


def _in_turn(iou: Tensor, thresholds: Tensor) -> Tensor:
    """Let the detections of (B, M, D) overlaps choose one after the other; (B, D, 10) bool."""
    images, most, detections = iou.shape
    by_detection = iou.permute(2, 0, 1)[..., None].contiguous()  # (D, B, M, 1)
    shape = (detections, images, 1, len(thresholds))
    right = torch.zeros(shape, dtype=torch.bool, device=iou.device)
    taken = torch.zeros((images, most, len(thresholds)), dtype=torch.bool, device=iou.device)
    places = torch.arange(most, device=iou.device)[:, None]
    nothing = torch.zeros((), device=iou.device)
    for overlap, hit in zip(by_detection, right, strict=True):
        free = torch.where(taken, nothing, overlap)  # (B, M, 10)
        best, which = free.max(1, keepdim=True)  # (B, 1, 10)
        torch.ge(best, thresholds, out=hit)
        taken |= hit & (places == which)
    return right[:, :, 0].transpose(0, 1)


def _kernel_for(iou: Tensor) -> Kernel | None:
    """Return what matches (B, M, D) overlaps in one go; None where `_in_turn` has to."""
    if iou.device.type != "cuda" or iou.dtype != torch.float32 or iou.shape[1] > _MOST_BOXES:
        return None
    kernels = proved_kernels(MATCH, iou.device, _proves)
    return None if kernels is None else kernels["match"]


def _greedy(kernel: Callable[..., None], iou: Tensor, thresholds: Tensor) -> Tensor:
    """Do what `_in_turn` does with `match.cu`."""
    images, most, detections = iou.shape
    levels = len(thresholds)
    right = torch.empty((images, detections, levels), dtype=torch.bool, device=iou.device)
    if right.numel():
        grid, block = (images * levels, 1, 1), (_WARP, 1, 1)
        given = (iou.contiguous(), thresholds, right, images, most, detections, levels)
        kernel(grid, block, iou.device, *given)
    return right


def _proves(kernels: Kernels, device: torch.device) -> bool:
    """Return whether one finds what `_in_turn` finds on the CPU."""
    iou = torch.rand(5, 40, 60, generator=torch.Generator().manual_seed(0))
    thresholds = torch.from_numpy(IOUS)
    found = _greedy(kernels["match"], iou.to(device), thresholds.to(device))
    return torch.equal(found.cpu(), _in_turn(iou, thresholds))


def match_all(
    found: Sequence[Found], boxes: Tensor, labels: Tensor, counts: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Match all images and bring the result to the host, in one piece.

    Args:
        boxes, labels: (N, 4) and (N,), on the host, image by image.
        counts: (B,) boxes of each image.

    Returns:
        (B, D, 3): score, class, and the thresholds reached as bits; (B,) whether it is settled.
    """
    most = max(batch.rows.shape[1] for batch in found)
    rows = torch.cat([_padded(batch.rows, most) for batch in found]).float()
    bits = torch.tensor([1 << i for i in range(len(IOUS))], dtype=torch.float32)
    bits = bits.to(rows.device, non_blocking=True)
    hits, ends = [], counts.cumsum()
    for images in _groups(counts, most):
        first, last = ends[images.start] - counts[images.start], ends[images.stop - 1]
        apart = _apart(boxes[first:last], labels[first:last], counts[images])
        truth, classes = (t.to(rows.device, non_blocking=True) for t in apart)
        right = match(rows[images], truth, classes)
        hits.append((right * bits).sum(2))
    settled = torch.cat([batch.settled for batch in found])
    sent = torch.cat((settled[:, None], rows[..., 4], rows[..., 5], torch.cat(hits)), 1).cpu()
    said = sent.numpy()
    return said[:, 1:].reshape(len(said), 3, most).transpose(0, 2, 1), said[:, 0] > 0


def _apart(boxes: Tensor, labels: Tensor, counts: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return (B, M, 4) boxes and (B, M) labels of each image; 0 and no class where padded."""
    count = torch.from_numpy(counts)
    image = torch.repeat_interleave(count)
    place = places_within(image, count)
    shape = (len(counts), int(counts.max()))
    truth, classes = boxes.new_zeros((*shape, 4)), labels.new_full(shape, _NO_CLASS)
    truth[image, place], classes[image, place] = boxes, labels
    return truth, classes


def _padded(rows: Tensor, most: int) -> Tensor:
    missing = most - rows.shape[1]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _groups(counts: NDArray[np.int64], detections: int) -> Iterator[slice]:
    """Cut images into groups whose boxes, padded, make at most `_PAIRS` with the detections."""
    start, most = 0, 1  # an image without boxes needs memory too
    for i, count in enumerate(counts.tolist()):
        wider = max(most, count)
        if i > start and (i - start + 1) * wider * detections > _PAIRS:
            yield slice(start, i)
            start, wider = i, max(count, 1)
        most = wider
    yield slice(start, len(counts))
