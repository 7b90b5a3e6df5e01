"""Thousands of boxes in a batch: what the loss needs is bounded, and stays what it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.profiler import ProfilerActivity, profile

from hsrloop.ops import assign as assign_module
from hsrloop.ops.loss import GAINS, detection_loss, pad_targets
from hsrloop.ops.paths import as_on_a_gpu
from hsrloop.records import RawPredictions
from tests.ops.peer import STRIDES, Scene, scene

BYTES_PER_POINT = 2_000  # of image times anchor point: slots of the assignment, and gradients
BYTES_PER_BOX = 2_000
BYTES_PER_PAIR = 110  # of a box and a cell inside it, in one block


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most bytes that torch held on the CPU at once, above where it began."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        function()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes, "the profiler saw no allocation"
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def peak_of_loss(s: Scene) -> int:
    images = len(s.box_logits)
    targets = pad_targets(s.boxes, s.labels, s.image, images=images, imgsz=s.imgsz)
    box, cls = s.box_logits.requires_grad_(), s.class_logits.requires_grad_()

    def loss_and_gradient() -> None:
        sums = detection_loss(RawPredictions(box, cls, s.shapes), STRIDES, targets)
        GAINS.weigh(sums).backward()
        box.grad = cls.grad = None

    return peak_bytes(loss_and_gradient)


def allowed_bytes(s: Scene, pairs: int) -> int:
    images, _, points = s.class_logits.shape
    of_points = BYTES_PER_POINT * images * points
    return of_points + BYTES_PER_BOX * len(s.boxes) + BYTES_PER_PAIR * pairs


@pytest.mark.parametrize("size", [0.03, 0.6])
@pytest.mark.parametrize("boxes", [10, 300, 3000])
def test_memory_grows_with_boxes_and_with_points_but_not_with_their_product(
    boxes: int, size: float
) -> None:
    s = scene([boxes, 1], imgsz=320, size=size)
    assert peak_of_loss(s) < allowed_bytes(s, pairs=0)


def test_a_block_on_the_gpu_is_bounded_too() -> None:
    s = scene([1400], imgsz=320, size=0.9)
    bound = allowed_bytes(s, assign_module._BLOCK)
    assert bound < 256 * 2**20
    with as_on_a_gpu():
        assert bound / 3 < peak_of_loss(s) < bound  # the bound is what one block takes, not ten
