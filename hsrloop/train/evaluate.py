"""Validation: a network, a set of images, and the metrics as Ultralytics 8.4.190 defines them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hsrloop.data.loader import ValLoader
from hsrloop.ops.ap import Evaluator
from hsrloop.ops.nms import Found
from hsrloop.records import Metrics
from hsrloop.train.detector import Detector


def evaluate(
    module: nn.Module,
    loader: ValLoader,
    *,
    names: tuple[str, ...],
    device: torch.device,
    half: bool = False,
    ahead: bool | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Metrics | None:
    """Validate `module`; it is not changed.

    Args:
        module: a detection network in float32, BatchNorm not folded.
        half: compute in fp16; CUDA only.
        ahead: wait for the device once, at the end, instead of several times for each image; the
            few images that this does not settle are looked at again. When not given, on a GPU: on
            the CPU waiting costs nothing, and less is to be computed. Changes no metric.
        on_progress: called with images done and images in all.
        stop: asked after each batch.

    Returns:
        The metrics, or None when `stop` ended it early.
    """
    detector = Detector.of(module, device, half=half)
    evaluator = Evaluator(names)
    if ahead is None:
        ahead = device.type != "cpu"
    done = 0
    for batch in loader:
        images = batch.images
        found = detector.detect_ahead(images) if ahead else Found.of(detector.detect(images))
        evaluator.add(found, batch.boxes_xyxy_px, batch.labels, batch.image_index)
        done += len(images)
        if on_progress is not None:
            on_progress(done, loader.n_samples)
        if stop is not None and stop():
            return None
    for batch in loader.of(evaluator.settle()):
        found = Found.of(detector.detect(batch.images))
        evaluator.add(found, batch.boxes_xyxy_px, batch.labels, batch.image_index)
    return evaluator.compute()
