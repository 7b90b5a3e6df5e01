"""Detections whose shapes are known ahead, on CUDA by two kernels: `detect.cu`."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hsrloop.ops.anchors import joined, predictions
from hsrloop.ops.nms import CANDIDATES, CLASS_OFFSET_PX, ROUNDS, Found, nms, nms_ahead
from hsrloop.ops.nvrtc import Kernels, proved_kernels
from hsrloop.ops.silu import KINDS
from hsrloop.ops.targets import STRIDES
from hsrloop.records import LevelLogits

SOURCE = Path(__file__).with_name("detect.cu")
_LOG = logging.getLogger(__name__)
_MOST, _LEVELS = 2048, 4  # as in `detect.cu`
_THREADS = 1024
_PROOF_CONF, _PROOF_MOST = 0.001, 40  # detections
# Subtracted from logits, candidates tried: they are enough, they are all, they may not be enough.
_PROOF_CASES = ((4, 1024), (11, 1024), (4, 40))
_PROOF_SIDES = (64, 6, 3)  # cells: more than a block reads at a time, and an odd number
_PX_APART = 1e-3  # what rounding may do to a box
_MARGIN = 1e-3  # of a logit: many times what rounding does to it


class _Level(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("boxes", "classes")),
        *((name, ctypes.c_int) for name in ("width", "cells")),
        ("stride", ctypes.c_float),
    )


class _Head(ctypes.Structure):
    """What `candidates` is given; see `detect.cu`."""

    _fields_ = (
        ("levels", _Level * _LEVELS),
        *((name, ctypes.c_int) for name in ("count", "classes", "anchors", "bins", "kind")),
        *((name, ctypes.c_float) for name in ("least", "conf")),
    )


def detections_ahead(
    levels: LevelLogits,
    strides: Sequence[int],
    *,
    kernels: Mapping[str, Callable[..., None]] | None,
    reg_max: int = 16,
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    candidates: int = CANDIDATES,
    rounds: int = ROUNDS,
) -> Found:
    """Decode what the head says and suppress, without waiting for the device.

    Args:
        levels: of B images.
        strides: px, one a level.
        kernels: of `detect_kernels`, used where they can take the levels; None: torch's operators.
        reg_max: bins of a side's distribution.
        conf, iou, max_det, candidates, rounds: as for `nms.nms_ahead`; conf above 0. The kernels
            need no rounds.
    """
    if kernels is not None and not _suits(levels, candidates):
        _say_otherwise()
        kernels = None
    if kernels is None:
        boxes, scores = predictions(joined(levels), strides, reg_max=reg_max)
        return nms_ahead(
            boxes,
            scores,
            conf=conf,
            iou=iou,
            max_det=max_det,
            candidates=candidates,
            rounds=rounds,
        )
    head = _head(levels, strides, reg_max=reg_max, conf=conf)
    tried = min(candidates, head.classes * head.anchors)
    images, device = len(levels.classes[0]), levels.classes[0].device
    rows = torch.empty((images, tried, 6), device=device)
    counts = torch.empty(images, dtype=torch.int32, device=device)
    found = torch.empty((images, min(max_det, tried), 6), device=device)
    settled = torch.empty(images, dtype=torch.bool, device=device)
    grid, block = (images, 1, 1), (_THREADS, 1, 1)
    kernels["candidates"](grid, block, device, head, rows, counts, tried)
    given = (rows, counts, found, settled, tried, found.shape[1], iou, float(CLASS_OFFSET_PX))
    kernels["suppress"](grid, block, device, *given)
    return Found(found, settled)


def detect_kernels(device: torch.device) -> Kernels | None:
    """Return what does it in two launches; None where torch's operators have to."""
    return proved_kernels(SOURCE, device, _proves) if device.type == "cuda" else None


@functools.cache
def _say_otherwise() -> None:
    _LOG.warning("%s is not used: the head's levels are not what it takes", SOURCE.name)


def _suits(levels: LevelLogits, candidates: int) -> bool:
    """Return whether the kernels can take it: channels_last, of one type, few candidates."""
    parts = (*levels.boxes, *levels.classes)
    kind = parts[0].dtype
    return (
        kind in KINDS
        and len(levels.classes) <= _LEVELS
        and candidates <= _MOST
        and all(t.dtype is kind and t.numel() > 0 for t in parts)
        and all(t.is_contiguous(memory_format=torch.channels_last) for t in parts)
    )


def _head(levels: LevelLogits, strides: Sequence[int], *, reg_max: int, conf: float) -> _Head:
    shapes = levels.shapes
    each = zip(levels.boxes, levels.classes, shapes, strides, strict=True)
    own = [
        _Level(boxes.data_ptr(), classes.data_ptr(), width, height * width, stride)
        for boxes, classes, (height, width), stride in each
    ]
    return _Head(
        levels=(_Level * _LEVELS)(*own),
        count=len(own),
        classes=levels.classes[0].shape[1],
        anchors=sum(height * width for height, width in shapes),
        bins=reg_max,
        kind=KINDS[levels.classes[0].dtype],
        least=math.log(conf / (1 - conf)) - _MARGIN,
        conf=conf,
    )


def _proves(kernels: Mapping[str, Callable[..., None]], device: torch.device) -> bool:
    """Return whether they find what `nms` finds in a crowd on the CPU, but for rounding.

    On a GPU torch's operators would have to be loaded, for this alone.
    """
    g = torch.Generator().manual_seed(0)

    def noise(channels: int, side: int, kind: torch.dtype) -> Tensor:
        numbers = 2 * torch.randn(3, channels, side, side, generator=g)
        numbers = numbers.half().to(kind)  # few are close to each other
        return numbers.contiguous(memory_format=torch.channels_last)

    for kind in KINDS:
        boxes, classes = ([noise(n, side, kind) for side in _PROOF_SIDES] for n in (64, 5))
        for shift, tried in _PROOF_CASES:
            lower = [x - shift for x in classes]
            levels = LevelLogits([x.to(device) for x in boxes], [x.to(device) for x in lower])
            found = detections_ahead(
                levels,
                STRIDES,
                kernels=kernels,
                conf=_PROOF_CONF,
                max_det=_PROOF_MOST,
                candidates=tried,
            )
            here = LevelLogits([x.float() for x in boxes], [x.float() for x in lower])
            if not _agrees(found, tried, *predictions(joined(here), STRIDES)):
                return False
    return True


def _agrees(found: Found, tried: int, boxes: Tensor, scores: Tensor) -> bool:
    """Return whether `nms` finds the same, where that many candidates say what it finds."""
    ends = scores.flatten(1).topk(tried + 1).values[:, -2:].tolist()
    expected = nms(boxes, scores, conf=_PROOF_CONF, max_det=_PROOF_MOST)
    for rows, settled, wanted, (last, beyond) in zip(
        found.rows.cpu(), found.settled.tolist(), expected, ends, strict=True
    ):
        enough = len(wanted) == _PROOF_MOST and float(wanted[-1, 4]) > last
        if settled is not (enough or beyond <= _PROOF_CONF):
            return False
        if settled:
            apart = rows - F.pad(wanted, (0, 0, 0, _PROOF_MOST - len(wanted)))
            if not float(apart.abs().max()) <= _PX_APART:
                return False
    return True
