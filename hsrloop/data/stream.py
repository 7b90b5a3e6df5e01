"""The training stream as a pure function of (seed, epoch, index): which plan stands where.

Of an epoch's samples the first stand for the real images, one each, the others are synthetic.
No pixels and no state: loaders of any kind, with any number of workers, ask the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hsrloop.config import TrainConfig
from hsrloop.data.plan import AugmentPlan, AugmentSettings, draw_plan
from hsrloop.data.sampler import epoch_order
from hsrloop.data.scenes.cover import labels_of
from hsrloop.data.scenes.cutouts import Cutout
from hsrloop.data.scenes.scene import Scenes, draw_scene
from hsrloop.data.sets.dataset import ImageRef


@dataclass(frozen=True, slots=True)
class TrainStream:
    """Training images and how they are augmented, with the scenes that are made up beside them."""

    refs: Sequence[ImageRef]  # real images; may be empty where there are scenes
    settings: AugmentSettings
    seed: int
    scenes: Scenes | None = None
    images: Sequence[ImageRef] = field(init=False)  # what `Layer.source` counts in

    def __post_init__(self) -> None:
        backgrounds = self.scenes.backgrounds if self.scenes else ()
        images = (*self.refs, *backgrounds) if backgrounds else self.refs
        object.__setattr__(self, "images", images)

    @classmethod
    def of(
        cls, refs: Sequence[ImageRef], config: TrainConfig, scenes: Scenes | None = None
    ) -> TrainStream:
        """Return the stream that a configuration asks for."""
        return cls(refs, AugmentSettings.from_config(config), config.seed, scenes)

    @property
    def n_samples(self) -> int:
        """Return the number of samples in an epoch."""
        return len(self.refs) + (self.scenes.count if self.scenes else 0)

    @property
    def cutouts(self) -> Sequence[Cutout]:
        """Return what `Paste.cutout` counts in."""
        return self.scenes.cutouts if self.scenes else ()

    def order(self, epoch: int) -> np.ndarray:
        """Return the permutation of 0..n_samples-1 in which an epoch visits its samples."""
        return epoch_order(self.seed, epoch, self.n_samples)

    def plan(self, epoch: int, index: int, *, mosaic: bool) -> AugmentPlan:
        """Return the plan of one sample; `mosaic` False closes mosaic and mixup."""
        if index < len(self.refs):
            return draw_plan(self.seed, epoch, index, self.refs, self.settings, mosaic=mosaic)
        assert self.scenes is not None
        return draw_scene(self.seed, epoch, index, self.images, self.scenes, self.settings)

    def labels(self, plan: AugmentPlan, imgsz: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the labels of a plan; see `labels_of`."""
        return labels_of(plan, self.images, self.cutouts, imgsz)
