"""The training stream as a pure function of (seed, epoch, index): which plan stands where.

No pixels and no state: loaders of any kind, with any number of workers, ask the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsrloop.config import TrainConfig
from hsrloop.data.dataset import ImageRef
from hsrloop.data.plan import AugmentPlan, AugmentSettings, draw_plan, plan_labels
from hsrloop.data.sampler import epoch_order


@dataclass(frozen=True, slots=True)
class TrainStream:
    """Training images and how they are augmented."""

    refs: Sequence[ImageRef]
    settings: AugmentSettings
    seed: int

    @classmethod
    def of(cls, refs: Sequence[ImageRef], config: TrainConfig) -> TrainStream:
        """Return the stream that a configuration asks for."""
        return cls(refs, AugmentSettings.from_config(config), config.seed)

    @property
    def n_samples(self) -> int:
        """Return the number of samples in an epoch."""
        return len(self.refs)

    def order(self, epoch: int) -> np.ndarray:
        """Return the permutation of 0..n_samples-1 in which an epoch visits its samples."""
        return epoch_order(self.seed, epoch, self.n_samples)

    def plan(self, epoch: int, index: int, *, mosaic: bool) -> AugmentPlan:
        """Return the plan of one sample; `mosaic` False closes mosaic and mixup."""
        return draw_plan(self.seed, epoch, index, self.refs, self.settings, mosaic=mosaic)

    def labels(self, plan: AugmentPlan, imgsz: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the labels of a plan; see `plan_labels`."""
        return plan_labels(plan, self.refs, imgsz)
