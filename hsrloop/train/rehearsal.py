"""One step at its worst, before the first real one: memory runs out then, or hardly ever.

The worst step has the largest images and the most boxes that this run can bring, beside weights,
their average and the optimizer's state. Nothing of it stays: it is never committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hsrloop.config import TrainConfig
from hsrloop.data.scenes.scene import Scenes
from hsrloop.data.sets.dataset import ImageRef
from hsrloop.events import Event, Note
from hsrloop.hardware.memory import GIB
from hsrloop.records import Batch, Position
from hsrloop.train.build import Built
from hsrloop.train.detector import Detector
from hsrloop.train.fits import Fits, key_of
from hsrloop.train.ladder import given_up
from hsrloop.train.loop import set_modes
from hsrloop.train.state import TrainState
from hsrloop.train.step import (
    MAX_GRADIENT_NORM,
    StepSettings,
    Transaction,
    forward_backward,
    trained_parameters,
)

MOSAIC_IMAGES = 4
_MADE_AHEAD = 2  # batches: one ready, one being made


class RehearsalFailed(RuntimeError):
    """A rehearsal raised its `__cause__`; says whether while validating."""

    def __init__(self, *, validating: bool) -> None:
        super().__init__("the rehearsal failed")
        self.validating = validating


def most_boxes(refs: Sequence[ImageRef], scenes: Scenes | None, config: TrainConfig) -> int:
    """Return the most boxes that one training image can hold.

    A mosaic may draw the fullest image four times, and mixup lays two of them over each other. A
    synthetic image has what is pasted and, where it has no background of its own, what the
    photograph below shows.
    """
    own = max((len(ref.labels) for ref in refs), default=0)
    fullest = own * (MOSAIC_IMAGES if config.mosaic else 1) * (2 if config.mixup else 1)
    if scenes is None or not scenes.count:
        return fullest
    return max(fullest, config.max_objects + (0 if scenes.backgrounds else own))


def worst_batch(*, images: int, imgsz: int, boxes: int, classes: int) -> Batch:
    """Return noise with `boxes` boxes of all sizes in each image; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    count = images * boxes
    sides = torch.rand(count, 2, generator=generator).mul_(0.5).add_(0.02)
    centres = sides / 2 + (1 - sides) * torch.rand(count, 2, generator=generator)
    return Batch(
        images=_noise(images, imgsz, generator),
        boxes_cxcywh=torch.cat((centres, sides), 1),
        labels=torch.arange(count) % classes,
        image_index=torch.arange(images).repeat_interleave(boxes),
        after=Position(0, 0),
        ends_step=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What a rehearsal needs to know of a run.

    `config` is as asked for, what recovery may change is taken from the state's rung; `boxes` are
    in each image, see `most_boxes`. With `wanted` False `run` does nothing.
    """

    state: TrainState
    config: TrainConfig
    settings: StepSettings
    transaction: Transaction
    boxes: int
    classes: int
    fits: Fits
    emit: Callable[[Event], None]
    wanted: bool = True

    @classmethod
    def of(
        cls,
        built: Built,
        transaction: Transaction,
        emit: Callable[[Event], None],
        fits: Path | None = None,
    ) -> Rehearsal:
        """Return that of a run's worst step, wanted where the user and the device want it.

        Args:
            fits: file of what is known to fit in GPU memory; None: the user's.
        """
        config, state = built.resolved.config, built.state
        boxes = most_boxes(built.spec.train, built.synthesis.scenes, config)
        classes = len(built.spec.names)
        key = key_of(
            built.info,
            config,
            parameters=sum(p.numel() for p in state.model.parameters()),
            classes=classes,
            boxes=boxes,
            images=len(built.images),
        )
        return cls(
            state=state,
            config=config,
            settings=built.settings,
            transaction=transaction,
            boxes=boxes,
            classes=classes,
            fits=Fits.of(key, fits),
            emit=emit,
            wanted=config.rehearsal == "always"
            or (config.rehearsal == "auto" and state.device.type == "cuda"),
        )

    def run(self) -> None:
        """Try the state's rung out, unless it is known to fit, and remember that it does.

        Raises:
            RehearsalFailed: from what went wrong, such as running out of memory.
        """
        if not self.wanted:
            return
        # Recorded steps are no part of a rehearsal: that they did not fit says nothing of it.
        steps = [row for row in self.state.recoveries if "cuda_graphs" not in given_up([row])]
        foretold = all(row.get("rehearsed") for row in steps)
        if not foretold:
            self.fits.forget()  # what had fitted ran out of memory in training
        elif self.fits.covers(self.state.rung):
            return
        self.rehearse()
        if foretold:
            self.fits.remember(self.state.rung)
        if self.state.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.state.device) / GIB
            self.emit(Note(text=f"the largest step fits: {peak:.1f} GiB of GPU memory at most"))

    def rehearse(self) -> None:
        """Train and validate once at the state's rung; the state stays as it was, bit for bit.

        Raises:
            RehearsalFailed: see `run`.
        """
        state, validating = self.state, False
        try:
            # Kept between validations.
            detector = Detector.of(state.ema.module, state.device, half=self.settings.amp)
            with self.unchanged():
                set_modes(state, self.config)
                self.accumulate()
            validating = True
            with torch.random.fork_rng(_cuda(state)):
                self._validate(detector)
        except Exception as error:
            raise RehearsalFailed(validating=validating) from error

    def accumulate(self) -> None:
        """Do all of a step but its commit, on two micro-batches where a step has several.

        From the second on there are gradients beside the activations, and all the while the images
        of the step and those made ahead.
        """
        state, size = self.state, self.state.rung.micro_batch
        waiting = self.config.batch - size + _MADE_AHEAD * size
        held = _pixels(waiting, state.rung.imgsz, state.device)
        for count in (size, min(size, self.config.batch - size)):
            if count > 0:
                batch = worst_batch(
                    images=count,
                    imgsz=state.rung.imgsz,
                    boxes=self.boxes,
                    classes=self.classes,
                )
                forward_backward(state, batch, self.settings)
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(trained_parameters(state), MAX_GRADIENT_NORM)
        del held

    def _validate(self, detector: Detector) -> None:
        imgsz = self.config.imgsz
        noise = _noise(self.state.rung.val_batch, imgsz, torch.Generator().manual_seed(0))
        held = _pixels(_MADE_AHEAD * len(noise), imgsz, self.state.device)
        detector.find(noise)
        del held

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Roll back what happens meanwhile, however it ends."""
        self.transaction.begin()
        with torch.random.fork_rng(_cuda(self.state)):
            try:
                yield
            finally:
                self.transaction.roll_back()


def _noise(images: int, imgsz: int, generator: torch.Generator) -> Tensor:
    pixels = torch.randint(
        0, 256, (images, imgsz, imgsz, 3), generator=generator, dtype=torch.uint8
    )
    return pixels.permute(0, 3, 1, 2)


def _pixels(images: int, imgsz: int, device: torch.device) -> Tensor:
    return torch.empty((images, 3, imgsz, imgsz), dtype=torch.uint8, device=device)


def _cuda(state: TrainState) -> list[torch.device]:
    return [state.device] if state.device.type == "cuda" else []
