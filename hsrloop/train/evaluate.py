"""Validation: a network, a set of images, and the metrics as Ultralytics 8.4.190 defines them.

Boxes that reach beyond an image are cut at its edge, as they are for training; there they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from hsrloop.data.val_loader import ValLoader
from hsrloop.ops.ap import Evaluator
from hsrloop.records import Metrics
from hsrloop.train.detector import Detector, KeptDetector, RecordedDetections
from hsrloop.train.precision import untuned


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
    kept: KeptDetector | None = None,
    recorded: RecordedDetections | None = None,
) -> Metrics | None:
    """Validate `module`; it is not changed.

    Args:
        module: a detection network in float32, BatchNorm not folded.
        half: compute in fp16; CUDA only.
        ahead: see `Detector.find`. Images that are not settled are looked at again at the end.
        on_progress: called with images done and images in all.
        stop: asked after each batch.
        kept, recorded: from an earlier validation, for the next.

    Returns:
        The metrics, or None when `stop` ended it early.
    """
    kept = kept or KeptDetector()
    detector: Detector | None = None
    evaluator = Evaluator(names)
    done = 0

    def look(places: Sequence[int] | None, ahead: bool | None) -> bool:
        """Look at the images at these places, or at all of them; False when stopped."""
        nonlocal detector, done
        total = loader.n_samples + len(places or ())
        for batch in loader if places is None else loader.of(places):
            if detector is None:  # made ready while the second batch is on its way
                detector = kept.of(module, device, half=half, recorded=recorded)
            # Kernels are looked for where most batches find them: each size costs seconds.
            with untuned(when=len(batch.images) < loader.batch):
                found = detector.find(batch.images, ahead=ahead, recorded=recorded)
            own = None if places is None else batch.indices.tolist()
            evaluator.add(found, batch.boxes_xyxy_px, batch.labels, batch.image_index, places=own)
            done += len(batch.images)
            if on_progress is not None:
                on_progress(done, total)
            if stop is not None and stop():
                return False
        return True

    if not look(None, ahead):
        return None
    again = evaluator.settle()
    with untuned():
        if not look(again, False):
            return None
    return evaluator.compute()
