"""What assignment and loss cost, alone: on logits of noise and boxes of many sizes."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hsrloop.bench.counting import DeviceWatch
from hsrloop.bench.meters import in_turn, rates, repeat
from hsrloop.bench.results import Row
from hsrloop.model.yolo import import_ultralytics
from hsrloop.ops.loss import GAINS, PaddedTargets, detection_loss, loss_kernels, pad_targets
from hsrloop.ops.targets import STRIDES
from hsrloop.records import RawPredictions

REG_MAX = 16
PEERS = "Ultralytics' criterion"
_SIDE = 0.1  # median side of a box, fraction of the image


@dataclass(frozen=True, slots=True)
class CriterionInput:
    """Logits that want a gradient, and what they are compared with, all on one device."""

    raw: RawPredictions
    targets: PaddedTargets
    boxes_cxcywh: Tensor  # (N, 4), as is what follows: of which the targets are made
    labels: Tensor  # (N,)
    image_index: Tensor  # (N,)

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
        truth = (
            torch.cat((centre, side), 1),
            torch.randint(0, classes, (images * objects,), generator=g),
            torch.arange(images).repeat_interleave(objects),
        )
        targets = pad_targets(
            *truth, images=images, imgsz=imgsz, segments=loss_kernels(device) is None
        )

        def logits(channels: int, shift: float) -> Tensor:
            noise = torch.randn(images, channels, points, generator=g) + shift
            return noise.to(device, dtype).requires_grad_()

        raw = RawPredictions(logits(4 * REG_MAX, 0.0), logits(classes, -2.0), shapes)
        return cls(raw, targets.to(device), *(part.to(device) for part in truth))

    def run(self) -> Tensor:
        """Compute loss and gradient once; return the loss of a mean image."""
        sums = detection_loss(self.raw, STRIDES, self.targets, reg_max=REG_MAX)
        loss = GAINS.weigh(sums) / sums.target_scores.clamp(min=1)
        torch.autograd.backward(loss)
        self.raw.box_logits.grad = self.raw.class_logits.grad = None
        return loss.detach()

    def resident(self) -> list[Tensor]:
        """Return the tensors that lie on the device."""
        here = [self.boxes_cxcywh, self.labels, self.image_index]
        return [self.raw.box_logits, self.raw.class_logits, *self.targets.tensors, *here]


def peers_loss(*, classes: int, device: torch.device) -> Any:
    """Return Ultralytics' `v8DetectionLoss`, which reads what it needs off a model.

    Raises:
        ImportError: Ultralytics is not installed.
    """
    import_ultralytics()
    loss: Any = importlib.import_module("ultralytics.utils.loss")
    head: Any = nn.Module()
    head.nc, head.reg_max = classes, REG_MAX
    head.stride = torch.tensor([float(stride) for stride in STRIDES], device=device)
    model: Any = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1, device=device))
    model.args = SimpleNamespace(box=GAINS.box, cls=GAINS.cls, dfl=GAINS.dfl)
    model.model = nn.ModuleList([head])
    return loss.v8DetectionLoss(model)


class PeersCriterion:
    """Ultralytics' own loss on the same input.

    Raises:
        ImportError: Ultralytics is not installed.
    """

    def __init__(self, given: CriterionInput) -> None:
        box, cls = given.raw.box_logits, given.raw.class_logits
        self._criterion = peers_loss(classes=cls.shape[1], device=box.device)
        self._raw = given.raw
        self._levels = [torch.zeros(1, 1, *shape, device=box.device) for shape in given.raw.shapes]
        self._batch = {
            "batch_idx": given.image_index.float(),
            "cls": given.labels.float(),
            "bboxes": given.boxes_cxcywh,
        }

    def run(self) -> Tensor:
        """Do what `CriterionInput.run` does."""
        box, cls = self._raw.box_logits, self._raw.class_logits
        terms, _ = self._criterion(
            {"boxes": box, "scores": cls, "feats": self._levels}, self._batch
        )
        loss = terms.sum() / len(box)
        torch.autograd.backward(loss)
        box.grad = cls.grad = None
        detached: Tensor = loss.detach()
        return detached

    def resident(self) -> list[Tensor]:
        """Return the tensors that lie on the device."""
        here = [self._criterion.stride, self._criterion.proj, *self._levels, *self._batch.values()]
        return [self._raw.box_logits, self._raw.class_logits, *here]


Criterion = CriterionInput | PeersCriterion


def kernels_of(criterion: Criterion) -> int:
    """Count the operators that launch work, forward and backward."""
    return sum(watched(criterion).kernels.values())


def watched(criterion: Criterion) -> DeviceWatch:
    """Run it once and return what it asked of its device."""
    resident = criterion.resident()
    with DeviceWatch(resident[0].device, resident) as watch:
        criterion.run()
    return watch


def measure_criterion(
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    images: int = 16,
    imgsz: int = 640,
    objects: tuple[int, ...] = (10, 100, 300),
) -> list[Row]:
    """Return a row for each number of objects an image, and one of the peer's where it is there."""
    has_peer = importlib.util.find_spec("ultralytics") is not None
    works: dict[str, Criterion] = {}
    for count in objects:
        given = CriterionInput.of_noise(device, images=images, objects=count, imgsz=imgsz)
        works[f"criterion, {count} objects an image"] = given
        if has_peer:
            name = f"{PEERS}, {count} objects an image"
            works[name] = PeersCriterion(given)
    times = in_turn(
        {name: repeat(work.run) for name, work in works.items()},
        rounds=rounds,
        seconds=seconds,
        device=device,
    )
    rows = [
        Row(
            name=name,
            images_per_s=rates(times[name], images),
            note=f"{kernels_of(work)} kernels",
        )
        for name, work in works.items()
    ]
    if not has_peer:
        rows.append(Row(name=PEERS, note="skipped: ultralytics is not installed"))
    return rows
