"""Draw a synthetic image ahead of its pixels: cut-outs over a photograph.

Source: Dwibedi et al. 2017, Cut, Paste and Learn, arXiv:1708.01642 (blending drawn at random for
each object, distractors, occlusion and truncation); Ghiasi et al. 2021, arXiv:2012.07177. Constants
without another source are a guess, judged by eye.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from hsrloop.config import TrainConfig
from hsrloop.data.plan import (
    Affine,
    AugmentPlan,
    AugmentSettings,
    Layer,
    Paste,
    draw_hsv,
    extent,
    plan_labels,
)
from hsrloop.data.sampler import sample_rng
from hsrloop.data.scenes.cover import fill, outline_px
from hsrloop.data.scenes.cutouts import MARGIN, Cutout
from hsrloop.data.scenes.palette import gains_towards, place_mean
from hsrloop.data.sets.dataset import ImageRef

GRID = 64  # side of the map on which places are tried
TRIES = 8  # places tried for an object before it is left out
EDGE = 0.02  # centres of objects keep this far from the frame
ZOOM = 1.6  # largest enlargement of a photograph beyond covering the frame
SPREAD = 1.4  # sizes within a scene differ by this factor either way
SHARP_PX = 320.0  # px of the object's crop for a size of 1: at imgsz 640 enlarged twice at most
DISTRACTORS = 0.25  # of the objects in a scene, where there are any
SHADED = 0.7  # of the scenes cast shadows
EDGES = 3  # hard, feathered, Gaussian


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneSettings:
    """How scenes are composed; fields as in `TrainConfig`."""

    max_objects: int = 8
    object_scale_min: float = 0.08
    object_scale_max: float = 0.5
    object_degrees: float = 30.0
    max_occlusion: float = 0.5
    negative_share: float = 0.05

    @classmethod
    def from_config(cls, config: TrainConfig) -> SceneSettings:
        """Take the fields of a configuration."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True, eq=False)
class Scenes:
    """What synthetic images are made of, and how many an epoch has."""

    cutouts: tuple[Cutout, ...]
    backgrounds: tuple[ImageRef, ...]  # no labels; empty: objects lie on the training images
    palette: np.ndarray  # (n, 16, 16, 3) uint8 RGB: small versions of what lies below
    odds: np.ndarray  # (cut-outs,) cumulative probability; distractors have none of their own
    sizes: np.ndarray  # (cut-outs,) usual size relative to the others'
    settings: SceneSettings
    count: int  # synthetic images in an epoch
    distractors: int = 0  # the last of the cut-outs, which have no label


def odds_of(cutouts: Sequence[Cutout], seen: np.ndarray) -> np.ndarray:
    """Return cumulative probabilities by which cut-outs are drawn: rare classes more often.

    A class weighs one by the root of its boxes, at most 10 times less than the rarest; its cut-outs
    share that.

    Args:
        seen: (nc,) boxes of each class in the training images.
    """
    labels = np.array([cutout.label for cutout in cutouts])
    weights = np.zeros(len(cutouts))
    for label in np.unique(labels[labels >= 0]):
        own = labels == label
        weights[own] = 1 / min(10.0, math.sqrt(max(1.0, seen[label]))) / np.count_nonzero(own)
    summed = np.cumsum(weights)
    odds: np.ndarray = summed / summed[-1]  # ends at 1 exactly: every draw below 1 finds one
    return odds


def usual_sizes(cutouts: Sequence[Cutout]) -> np.ndarray:
    """Return how large each cut-out's class looks in its photographs, beside the others.

    Photographs of different distances say little: the root of the ratio counts, within 0.6 to 1.6.
    """
    if not cutouts:
        return np.zeros(0)
    labels = np.array([cutout.label for cutout in cutouts])
    shares = np.array([cutout.share for cutout in cutouts])
    usual = np.array([np.median(shares[labels == label]) for label in labels])
    sizes: np.ndarray = np.clip(np.sqrt(usual / np.median(shares)), 0.6, 1.6)
    return sizes


def draw_scene(
    seed: int,
    epoch: int,
    index: int,
    refs: Sequence[ImageRef],
    scenes: Scenes,
    augment: AugmentSettings,
) -> AugmentPlan:
    """Draw a synthetic image's plan; a pure function of its arguments.

    Args:
        refs: all images; the backgrounds, where there are any, come last.
        augment: for the probabilities of flips and the colours of the whole.
    """
    place = (seed, epoch, index)
    first = len(refs) - len(scenes.palette)
    chance, which, zoom, x, y, left, up = sample_rng(*place, "scene.base").random(7).tolist()
    base = int(which * len(scenes.palette))
    layer, factor = _base(
        first + base,
        extent(refs[first + base]),
        1 + zoom * (ZOOM - 1),
        (x, y),
        (left < augment.fliplr, up < augment.flipud),
    )
    gains = draw_hsv(place, augment)
    if scenes.backgrounds and chance < scenes.settings.negative_share:
        return AugmentPlan((layer,), factor, gains)
    ground = _Ground(AugmentPlan((layer,), factor), refs, scenes.settings.max_occlusion)
    pastes = _draw_pastes(place, layer, scenes.palette[base], ground, scenes, augment)
    return AugmentPlan((layer,), factor, gains, pastes=pastes)


def _base(
    source: int,
    size: tuple[float, float],
    zoom: float,
    shift: tuple[float, float],
    flips: tuple[bool, bool],
) -> tuple[Layer, float]:
    """Return a photograph that covers the whole output, its aspect kept, and its scale."""
    w, h = size
    factor = zoom / min(w, h)
    c, f = -shift[0] * (factor * w - 1), -shift[1] * (factor * h - 1)
    a = d = factor
    if flips[0]:
        a, c = -factor, 1 - c
    if flips[1]:
        d, f = -factor, 1 - f
    return Layer(source, (a, 0.0, c, 0.0, d, f), (0.0, 0.0, w, h)), factor


def _draw_pastes(
    place: tuple[int, int, int],
    layer: Layer,
    palette: np.ndarray,
    ground: _Ground,
    scenes: Scenes,
    augment: AugmentSettings,
) -> tuple[Paste, ...]:
    """Draw the objects of a scene; one that finds no place is left out."""
    rules, slots = scenes.settings, scenes.settings.max_objects
    amount, size, shaded, dark, sway = sample_rng(*place, "scene").random(5).tolist()
    wanted = 1 + int(amount * slots)
    low, high = math.log(rules.object_scale_min), math.log(rules.object_scale_max)
    size = math.exp(low + size * (high - low))
    objects = sample_rng(*place, "scene.object").random((slots, 3)).tolist()
    poses = sample_rng(*place, "scene.pose").random((slots, 4)).tolist()
    spots = sample_rng(*place, "scene.place").random((slots, TRIES, 2)).tolist()
    edges = sample_rng(*place, "scene.edge").random(slots).tolist()
    colours = sample_rng(*place, "scene.colour").random((slots, 2)).tolist()
    shadows = sample_rng(*place, "scene.shadow").random(slots).tolist()
    pastes: list[Paste] = []
    for slot in range(wanted):
        which = _pick(scenes, objects[slot], first=slot == 0)
        cutout = scenes.cutouts[which]
        turn, grow, left, up = poses[slot]
        long = _long_side(scenes, which, size * SPREAD ** (2 * grow - 1))
        linear = _turned(
            long * (1 + 2 * MARGIN),
            math.radians((2 * turn - 1) * rules.object_degrees),
            (left < augment.fliplr, up < augment.flipud),
        )
        affine = ground.settle(cutout, linear, spots[slot])
        if affine is None:
            continue
        x, y = _centre(cutout, affine)
        gains = gains_towards(
            cutout.mean_rgb, place_mean(palette, layer, (x, y), long / 2), colours[slot]
        )
        opacity = (0.2 + 0.35 * dark) * (0.7 + 0.3 * shadows[slot]) if shaded < SHADED else 0.0
        shadow = ((2 * sway - 1) * 0.06 * long, 0.05 * long, opacity)
        edge = int(edges[slot] * EDGES)
        pastes.append(Paste(which, affine, cutout.label, edge, gains, shadow))
    return tuple(pastes)


def _pick(scenes: Scenes, draws: Sequence[float], *, first: bool) -> int:
    """Return which cut-out is pasted; the first of a scene is no distractor."""
    distract, which, other = draws
    if scenes.distractors and not first and distract < DISTRACTORS:
        return len(scenes.cutouts) - scenes.distractors + int(other * scenes.distractors)
    return int(np.searchsorted(scenes.odds, which, side="right"))


def _long_side(scenes: Scenes, which: int, size: float) -> float:
    """Return an object's long side in output units: as its class usually looks, within limits."""
    cutout, rules = scenes.cutouts[which], scenes.settings
    long = size * float(scenes.sizes[which])
    long = min(max(long, rules.object_scale_min), rules.object_scale_max)
    return min(long, max(cutout.height, cutout.width) / SHARP_PX)


def _turned(
    factor: float, angle: float, flips: tuple[bool, bool]
) -> tuple[float, float, float, float]:
    """Return the linear part of a map that flips, then turns and scales."""
    cos, sin = factor * math.cos(angle), factor * math.sin(angle)
    x, y = (-1 if flips[0] else 1), (-1 if flips[1] else 1)
    return x * cos, -y * sin, x * sin, y * cos


def _centre(cutout: Cutout, affine: Affine) -> tuple[float, float]:
    (w, h), (a, b, c, d, e, f) = cutout.extent, affine
    return a * w / 2 + b * h / 2 + c, d * w / 2 + e * h / 2 + f


class _Ground:
    """Where objects of one scene already lie, on a coarse map, and whether another one fits."""

    def __init__(self, below: AugmentPlan, refs: Sequence[ImageRef], max_occlusion: float) -> None:
        self._least = 1 - max_occlusion
        self._owners = np.zeros((GRID, GRID), np.uint8)
        self._whole = [0.0]  # px that each object has; index 0: nothing
        self._visible = [0]
        boxes = np.zeros((0, 4), np.float32)
        if any(len(refs[layer.source].labels) for layer in below.layers):
            boxes = plan_labels(below, refs, GRID)[0]
        self._corners = np.rint(boxes).astype(int).T  # (4, n) of objects in the photograph
        self._sizes = np.maximum(1, np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))

    def settle(
        self,
        cutout: Cutout,
        linear: tuple[float, float, float, float],
        spots: Sequence[Sequence[float]],
    ) -> Affine | None:
        """Put an object at the first spot where it hides too much of nothing; None without any."""
        a, b, d, e = linear
        w, h = cutout.extent
        whole = cutout.area * abs(a * e - b * d) * GRID**2
        centred = (a, b, 0.5 - (a * w + b * h) / 2, d, e, 0.5 - (d * w + e * h) / 2)
        contours = outline_px(cutout, centred, GRID)
        mask = np.empty((GRID, GRID), np.uint8)
        for u, v in spots:
            dx, dy = (EDGE + (1 - 2 * EDGE) * draw - 0.5 for draw in (u, v))
            mask.fill(0)
            fill(mask, [points + (dx * GRID, dy * GRID) for points in contours], 1)
            inside = int(np.count_nonzero(mask))
            if inside < self._least * whole or not self._spares(mask):
                continue
            self._take(mask, whole if cutout.label >= 0 else 0.0, inside)
            return (a, b, centred[2] + dx, d, e, centred[5] + dy)
        return None

    def _spares(self, mask: np.ndarray) -> bool:
        """Return whether enough would be left of each object."""
        hidden = self._hidden(mask)
        for visible, lost, whole in zip(self._visible, hidden, self._whole, strict=True):
            if lost and visible - lost < self._least * whole:
                return False
        if not len(self._sizes):
            return True
        taken: np.ndarray = (self._owners > 0).view(np.uint8)
        covered = cv2.integral(mask | taken)
        x0, y0, x1, y1 = self._corners
        area = covered[y1, x1] - covered[y0, x1] - covered[y1, x0] + covered[y0, x0]
        return bool((area <= (1 - self._least) * self._sizes).all())

    def _hidden(self, mask: np.ndarray) -> list[int]:
        lost = np.bincount(self._owners[mask > 0], minlength=len(self._whole))
        return [0, *lost[1:].tolist()]

    def _take(self, mask: np.ndarray, whole: float, inside: int) -> None:
        hidden = self._hidden(mask)
        self._visible = [v - lost for v, lost in zip(self._visible, hidden, strict=True)]
        self._owners[mask > 0] = len(self._whole)
        self._whole.append(whole)
        self._visible.append(inside)
