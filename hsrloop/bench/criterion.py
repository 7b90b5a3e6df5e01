"""What assignment and loss cost, alone: on logits of noise and boxes of many sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsrloop.bench.counting import DeviceWatch
from hsrloop.bench.meters import in_turn, rates
from hsrloop.bench.results import Row
from hsrloop.ops.loss import GAINS, PaddedTargets, detection_loss, pad_targets
from hsrloop.ops.targets import STRIDES
from hsrloop.records import RawPredictions

REG_MAX = 16
_SIDE = 0.1  # median side of a box, fraction of the image


@dataclass(frozen=True, slots=True)
class CriterionInput:
    """Logits that want a gradient, and what they are compared with, all on one device."""

    raw: RawPredictions
    targets: PaddedTargets

    @classmethod
    def of_noise(
        cls,
        device: torch.device,
        *,
        images: int = 16,
        objects: int = 100,
        imgsz: int = 640,
        classes: int = 20,
        dtype: torch.dtype = torch.float32,
    ) -> CriterionInput:
        """Return `objects` boxes in each image; the same at every call."""
        g = torch.Generator().manual_seed(0)
        shapes = tuple((imgsz // stride, imgsz // stride) for stride in STRIDES)
        points = sum(h * w for h, w in shapes)
        side = (_SIDE * torch.exp(0.6 * torch.randn(images * objects, 2, generator=g))).clamp(max=1)
        centre = side / 2 + (1 - side) * torch.rand(images * objects, 2, generator=g)
        targets = pad_targets(
            torch.cat((centre, side), 1),
            torch.randint(0, classes, (images * objects,), generator=g),
            torch.arange(images).repeat_interleave(objects),
            images=images,
            imgsz=imgsz,
        )

        def logits(channels: int, shift: float) -> Tensor:
            noise = torch.randn(images, channels, points, generator=g) + shift
            return noise.to(device, dtype).requires_grad_()

        raw = RawPredictions(logits(4 * REG_MAX, 0.0), logits(classes, -2.0), shapes)
        return cls(raw, targets.to(device))

    def run(self) -> None:
        """Compute loss and gradient once."""
        sums = detection_loss(self.raw, STRIDES, self.targets, reg_max=REG_MAX)
        loss = GAINS.weigh(sums) / sums.target_scores.clamp(min=1)
        torch.autograd.backward(loss)
        self.raw.box_logits.grad = self.raw.class_logits.grad = None

    def resident(self) -> list[Tensor]:
        """Return the tensors that lie on the device."""
        t = self.targets
        here = [t.table, t.labels, t.rows, t.segments]
        return [self.raw.box_logits, self.raw.class_logits, *here]


def kernels_of(given: CriterionInput) -> int:
    """Count the operators that launch work, forward and backward."""
    device = given.raw.box_logits.device
    with DeviceWatch(device, given.resident()) as watch:
        given.run()
    return sum(watch.kernels.values())


def measure_criterion(
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    images: int = 16,
    imgsz: int = 640,
    objects: tuple[int, ...] = (10, 100, 300),
) -> list[Row]:
    """Return a row for each number of objects an image."""
    inputs = {
        f"criterion, {count} objects an image": CriterionInput.of_noise(
            device, images=images, objects=count, imgsz=imgsz
        )
        for count in objects
    }

    def repeat(given: CriterionInput) -> Callable[[int], None]:
        def work(steps: int) -> None:
            for _ in range(steps):
                given.run()

        return work

    works = {name: repeat(given) for name, given in inputs.items()}
    times = in_turn(works, rounds=rounds, seconds=seconds, device=device)
    return [
        Row(
            name=name,
            images_per_s=rates(times[name], images),
            note=f"{kernels_of(given)} kernels",
        )
        for name, given in inputs.items()
    ]
