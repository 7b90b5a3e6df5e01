"""A trained network made ready to detect: what best.pt will do on the robot."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from hsrloop.model.yolo import (
    forward_eval,
    forward_levels,
    fuse_for_inference,
    refold,
    reg_max,
    strides,
)
from hsrloop.ops.anchors import predictions
from hsrloop.ops.detections import detect_kernels, detections_ahead
from hsrloop.ops.nms import Found, nms
from hsrloop.ops.paths import on_cpu
from hsrloop.train.precision import place
from hsrloop.train.recording import Recorder, Replay, reason_of
from hsrloop.train.step import to_input

CONF = 0.001  # what counts as a detection at all; Source: ultralytics@8.4.190, val mode
IOU = 0.7  # NMS threshold; same source
MAX_DETECTIONS = 300
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Detector:
    """A fused copy of a network, on the device that it computes on."""

    module: nn.Module
    device: torch.device
    strides: tuple[int, ...]
    reg_max: int

    @classmethod
    def of(cls, module: nn.Module, device: torch.device, *, half: bool) -> Detector:
        """Round the weights to half, as best.pt stores them.

        It computes in float32, or in half on a GPU when `half`; metrics are thus those of the file.

        Args:
            module: in float32, BatchNorm not folded; it is not changed.
        """
        rounded = copy.deepcopy(module).half().float()
        fused = place(fuse_for_inference(rounded), device)
        return cls(fused.half() if half else fused, device, strides(module), reg_max(module))

    def refresh(self, module: nn.Module) -> None:
        """Take over the weights of a module that is like the one it was made of, as `of` does."""
        refold(self.module, module, rounding=torch.half)

    def inputs(self, images: Tensor) -> Tensor:
        """Return uint8 (B, 3, S, S) images as the network takes them."""
        return to_input(images, self.device, next(self.module.parameters()).dtype)

    @torch.inference_mode()
    def detect(
        self, images: Tensor, *, conf: float = CONF, multi_label: bool = True
    ) -> list[Tensor]:
        """Find objects in uint8 (B, 3, S, S) images, B at least 1.

        Returns:
            One (n, 6) float32 tensor an image, on the device: x1 y1 x2 y2 in px of the input, conf,
            class. Waits for the device.
        """
        boxes, scores = self._predicted(images)
        return nms(
            boxes, scores, conf=conf, iou=IOU, max_det=MAX_DETECTIONS, multi_label=multi_label
        )

    @torch.inference_mode()
    def find(
        self,
        images: Tensor,
        *,
        ahead: bool | None = None,
        recorded: RecordedDetections | None = None,
    ) -> Found:
        """Do what `detect` does, as a validation needs it.

        Args:
            ahead: do not wait for the device, though an image may then remain unsettled. When not
                given, on a GPU: on the CPU waiting costs nothing, and less is to be computed.
            recorded: does it for sizes that come again, if it goes ahead.
        """
        if ahead is None:
            ahead = not on_cpu(self.device)
        if not ahead:
            return Found.of(self.detect(images))
        found = None if recorded is None else recorded.find(self, images)
        return self.find_ahead(images) if found is None else found

    def find_ahead(self, images: Tensor) -> Found:
        """Do what `find` does ahead."""
        levels = forward_levels(self.module, self.inputs(images))
        return detections_ahead(
            levels,
            self.strides,
            kernels=detect_kernels(self.device),
            reg_max=self.reg_max,
            conf=CONF,
            iou=IOU,
            max_det=MAX_DETECTIONS,
        )

    def _predicted(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, A, 4) boxes and (B, A, C) scores."""
        raw = forward_eval(self.module, self.inputs(images))
        return predictions(raw, self.strides, reg_max=self.reg_max)


class KeptDetector:
    """Keeps a network's detector from one validation to the next: refreshing one costs little."""

    def __init__(self) -> None:
        self._detector: Detector | None = None
        self._of: tuple[object, ...] = ()

    def of(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        half: bool,
        recorded: RecordedDetections | None = None,
    ) -> Detector:
        """Return what `Detector.of` does; the one returned before is changed by it.

        Args:
            recorded: refreshes it, if it can.
        """
        if self._detector is not None and self._of == (module, device, half):
            if recorded is None:
                self._detector.refresh(module)
            else:
                recorded.refresh(self._detector, module)
        else:
            self._detector, self._of = (
                Detector.of(module, device, half=half),
                (module, device, half),
            )
        return self._detector


@dataclass(frozen=True, slots=True)
class _Recorded:
    images: Tensor  # read by `replay`
    replay: Replay
    found: Found  # written by it


class RecordedDetections:
    """Detections in batches whose shape comes again, recorded as CUDA graphs; of one detector.

    Weights are read where they lie: refreshing a detector reaches recordings too. That is recorded
    as well, from where the weights come to where they go.

    Args:
        recorder: that of the steps, whose memory is idle during a validation.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._detector: Detector | None = None
        self._made: dict[torch.Size, _Recorded | None] = {}  # None: seen once, or impossible
        self._refreshed: tuple[Detector, nn.Module] | None = None
        self._refresh: Replay | None = None
        self._impossible: set[str] = set()
        self.recordings = 0  # made so far

    def refresh(self, detector: Detector, module: nn.Module) -> None:
        """Do what `Detector.refresh` does, recorded when it is done for the second time."""
        if self._refreshed != (detector, module):
            self._refreshed, self._refresh = (detector, module), None
        elif self._refresh is None:
            made = self._recorded("refreshing", lambda: detector.refresh(module))
            self._refresh = None if made is None else made[0]
        if self._refresh is None:
            detector.refresh(module)
        else:
            self._refresh()

    def find(self, detector: Detector, images: Tensor) -> Found | None:
        """Return what `Detector.find_ahead` does; None: it is not recorded, or not yet."""
        if detector is not self._detector:
            self._detector, self._made = detector, {}
        shape = images.shape
        if shape not in self._made:
            self._made[shape] = None
            return None
        own = self._made[shape]
        if own is None:
            own = self._made[shape] = self._record(detector, images)
        if own is None:
            return None
        own.images.copy_(images, non_blocking=True)
        own.replay()
        return Found(own.found.rows.clone(), own.found.settled.clone())

    def _record(self, detector: Detector, images: Tensor) -> _Recorded | None:
        own = images.clone()

        def work() -> tuple[Tensor, Tensor]:
            found = detector.find_ahead(own)
            return found.rows, found.settled

        made = self._recorded("validation", work)
        return None if made is None else _Recorded(own, made[0], Found(*made[1]))

    def _recorded(self, what: str, work: Callable[[], T]) -> tuple[Replay, T] | None:
        """Record work that may be done once more; None: it cannot be, now and later."""
        if what in self._impossible:
            return None
        try:
            if self._recorder.has_room():
                self._recorder.warm(work)
                made = self._recorder.record(work)
                self.recordings += 1
                return made
        except (RuntimeError, AssertionError) as error:
            why = reason_of(error)
            _LOG.warning("%s cannot be recorded as CUDA graphs (%s)", what, why)
        self._impossible.add(what)
        return None
