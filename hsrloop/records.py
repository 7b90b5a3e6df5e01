"""Values that pass between the parts; frozen, without behaviour worth a test of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    free_bytes: int = 0  # of the GPU, as far as this process may take them
    capability: tuple[int, int] = (0, 0)
    bf16: bool = False
    driver: str = ""
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
    bank: str  # where a GPU renders images from: "device", "pinned" (RAM), or "cv2": not at all
    cuda_graphs: bool = True  # steps are recorded where there is room for that


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
class LevelLogits:
    """What the head says, a tensor for each level, finest first."""

    boxes: Sequence[Tensor]  # (B, 4 * R, h, w)
    classes: Sequence[Tensor]  # (B, C, h, w)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of each level."""
        return tuple((x.shape[2], x.shape[3]) for x in self.classes)


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


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with one file of a data set; as text it is one line of a warning."""

    kind: str  # of a finding; a word of its own for each
    file: Path
    text: str
    line: int = 0  # from 1; 0 when it is no matter of a line

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else str(self.file)
        return f"{place}: {self.text}" if self.text else place


Severity = Literal["error", "warning", "note"]  # no training; a worse model; worth knowing


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """All problems of one kind in one split, what they do to training, and what helps."""

    kind: str
    severity: Severity
    split: str  # empty when it is a matter of the whole set
    title: str
    effect: str
    remedy: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCount:
    """What one split holds; `images` counts the readable ones, backgrounds those without a box."""

    split: str
    images: int
    backgrounds: int
    unreadable: int
    boxes: int
    classes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCount:
    """Usable boxes of one class, and the images they are in, by split."""

    name: str
    boxes: dict[str, int]
    images: dict[str, int]
    median_px: float  # square root of a box's area at imgsz, over all splits; 0 without a box


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckReport:
    """What a look at a data set found; arrays cover the usable boxes of all splits."""

    yaml: Path
    root: Path
    imgsz: int
    splits: tuple[SplitCount, ...]
    classes: tuple[ClassCount, ...]
    findings: tuple[Finding, ...]  # worst first
    boxes_cxcywh: np.ndarray  # (N, 4) float32, fractions of the image
    sides_px: np.ndarray  # (N, 2) float32, width and height at imgsz

    @property
    def suffers(self) -> bool:
        """Return whether training would fail or give a worse model than it could."""
        return any(finding.severity != "note" for finding in self.findings)
