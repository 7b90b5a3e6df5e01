"""Validation: a network, a set of images, and the metrics as Ultralytics 8.4.190 defines them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hsrloop.data.loader import ValBatch, ValLoader
from hsrloop.model.yolo import forward_eval, fuse_for_inference, reg_max, strides
from hsrloop.ops.anchors import predictions
from hsrloop.ops.ap import Evaluator
from hsrloop.ops.nms import nms
from hsrloop.records import Metrics
from hsrloop.train.precision import place
from hsrloop.train.step import to_input

CONF = 0.001  # what counts as a detection at all; Source: ultralytics@8.4.190, val mode
IOU = 0.7  # NMS threshold; same source
MAX_DETECTIONS = 300


def for_inference(module: nn.Module, device: torch.device, *, half: bool) -> nn.Module:
    """Return a fused copy whose weights are rounded to half, as best.pt stores them.

    It computes in float32, or in half on a GPU when `half`; metrics are thus those of the file.
    """
    rounded = copy.deepcopy(module).half().float()
    fused = place(fuse_for_inference(rounded), device)
    return fused.half() if half else fused


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    loader: ValLoader,
    *,
    names: tuple[str, ...],
    device: torch.device,
    half: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Metrics | None:
    """Validate `module`; it is not changed.

    Args:
        module: a detection network in float32, BatchNorm not folded.
        half: compute in fp16; CUDA only.
        on_progress: called with images done and images in all.
        stop: asked after each batch.

    Returns:
        The metrics, or None when `stop` ended it early.
    """
    network = for_inference(module, device, half=half)
    evaluator = Evaluator(names)
    done = 0
    for batch in loader:
        for index, detections in enumerate(detect(network, batch.images, device)):
            boxes, labels = _of_image(batch, index)
            evaluator.add(detections, boxes, labels)
        done += len(batch.images)
        if on_progress is not None:
            on_progress(done, loader.n_samples)
        if stop is not None and stop():
            return None
    return evaluator.compute()


@torch.inference_mode()
def detect(
    network: nn.Module,
    images: Tensor,
    device: torch.device,
    *,
    conf: float = CONF,
    multi_label: bool = True,
) -> list[Tensor]:
    """Run a network prepared by `for_inference` on uint8 (B, 3, S, S) images.

    Returns:
        One (n, 6) float32 CPU tensor an image: x1 y1 x2 y2 in px of the input, conf, class.
    """
    inputs = to_input(images, device, next(network.parameters()).dtype)
    raw = forward_eval(network, inputs)
    boxes, scores = predictions(raw, strides(network), reg_max=reg_max(network))
    found = nms(boxes, scores, conf=conf, iou=IOU, max_det=MAX_DETECTIONS, multi_label=multi_label)
    counts = [len(detections) for detections in found]
    joined = torch.cat(found).cpu()  # one copy, since the host waits for each
    return list(torch.split(joined, counts))


def _of_image(batch: ValBatch, index: int) -> tuple[Tensor, Tensor]:
    mine = batch.image_index == index
    return batch.boxes_xyxy_px[mine], batch.labels[mine]
