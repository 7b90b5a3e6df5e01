"""Values that pass between the parts; frozen, without behaviour worth a test of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What the probe saw of the machine; byte counts, cores as this process may use them."""

    kind: str  # "cuda" or "cpu"
    index: int = 0
    name: str = "CPU"
    uuid: str = ""
    total_bytes: int = 0  # of the GPU; 0 on the CPU
    free_bytes: int = 0
    capability: tuple[int, int] = (0, 0)
    bf16: bool = False
    driver: str = ""
    ram_total_bytes: int = 0  # cgroup limits counted in
    ram_free_bytes: int = 0
    shm_free_bytes: int = 0
    cores: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One row of the tier table; sizes are nominal GiB, `below_gib` exclusive (inf: no bound)."""

    name: str
    from_gib: float
    below_gib: float
    model: str
    batch: int
    imgsz: int


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in the stream of training samples: epoch from 0, samples already committed in it."""

    epoch: int
    sample: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """Where on the ladder a run stands: the settings that recovery may change, as they are now."""

    micro_batch: int
    imgsz: int  # of training; validation keeps the size that was asked for
    cache: bool | str
    workers: int
    val_batch: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its labels, as training or validation sees it before batching."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    boxes_xyxy_px: np.ndarray  # (n, 4) float32
    labels: np.ndarray  # (n,) int64


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of the training stream; N boxes over B images, N may be 0."""

    images: Tensor  # (B, 3, S, S) uint8 RGB, channels_last
    boxes_cxcywh: Tensor  # (N, 4) float32 in [0, 1]
    labels: Tensor  # (N,) int64
    image_index: Tensor  # (N,) int64, sorted, 0..B-1
    after: Position  # where the stream stands once this micro-batch is used
    ends_step: bool  # the last micro-batch of its optimizer step


@dataclass(frozen=True, slots=True)
class RawPredictions:
    """What the head says in training, before decoding; A anchor points over all levels."""

    box_logits: Tensor  # (B, 4 * R, A)
    class_logits: Tensor  # (B, C, A)
    shapes: tuple[tuple[int, int], ...]  # (h, w) of each level


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """Validation of one class; ap in [0, 1], `images` and `boxes` count the ground truth."""

    name: str
    images: int
    boxes: int
    precision: float
    recall: float
    ap50: float
    ap50_95: float
    best_conf: float  # confidence of this class's best F1


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Validation of a model; means over the classes that have ground truth."""

    ap50: float
    ap50_95: float
    precision: float
    recall: float
    best_conf: float  # confidence of the best mean F1
    classes: tuple[ClassScore, ...] = ()
