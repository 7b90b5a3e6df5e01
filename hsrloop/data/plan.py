"""Draw the augmentation of one training image ahead of its pixels, and compute its labels.

Lengths are in units of imgsz: the output is the unit square, and an image whose long side is 1 is
put into it by one affine map that composes mosaic offset, rotation, zoom, shear, shift and flips.

Source: distributions and filters of ultralytics@8.4.190, data/augment.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsrloop.config import TrainConfig
from hsrloop.data.polygon import polygon_extent
from hsrloop.data.sampler import sample_rng
from hsrloop.data.sets.dataset import ImageRef

MIXUP_BETA = 32.0  # both parameters: weights near one half. Source: as above, MixUp
SMALLEST_PX = 2.0  # boxes no larger than this are dropped. Source: as above, box_candidates
LONGEST_ASPECT = 100.0
KEPT_AREA = 0.1  # of a box's area must stay in view
KEPT_AREA_POLYGON = 0.01

Affine = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentSettings:
    """How strongly to augment; fields as in `TrainConfig`."""

    hsv_h: float = 0.0
    hsv_s: float = 0.0
    hsv_v: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.0
    mosaic: float = 0.0
    mixup: float = 0.0

    @classmethod
    def from_config(cls, config: TrainConfig) -> AugmentSettings:
        """Take the augmentation fields of a configuration."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Layer:
    """One source image under one map; `visible` is the part of it that is drawn, xyxy."""

    source: int
    affine: Affine  # row-major 2 x 3: source units to output units
    visible: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Paste:
    """One cut-out put over everything below it."""

    cutout: int  # index into the cut-outs
    affine: Affine  # row-major 2 x 3: cut-out units (see `Cutout`) to output units
    label: int  # class; -1: a distractor, without a label
    alpha: int  # which edge: 0 hard, 1 feathered, 2 Gaussian
    gains: tuple[float, float, float]  # RGB factors that match it to its place
    shadow: tuple[float, float, float]  # dx, dy in output units, opacity in [0, 1]; 0: none


@dataclass(frozen=True, slots=True)
class AugmentPlan:
    """Everything random about one training image; no pixels.

    Drawn in this order: layers, pastes, the mixup partner, HSV gains.
    """

    layers: tuple[Layer, ...]  # later ones lie on top; in a mosaic they only touch
    zoom: float
    hsv_gains: tuple[float, float, float] | None = None  # hue shift, saturation and value change
    mix: AugmentPlan | None = None
    mix_weight: float = 1.0  # of this plan; the partner has the rest
    pastes: tuple[Paste, ...] = ()  # later ones lie on top


def draw_plan(
    seed: int,
    epoch: int,
    index: int,
    refs: Sequence[ImageRef],
    settings: AugmentSettings,
    *,
    mosaic: bool = True,
) -> AugmentPlan:
    """Draw the plan of image `index` in an epoch; a pure function of its arguments.

    Args:
        mosaic: False closes mosaic and mixup, as for the last epochs.
    """
    place = (seed, epoch, index)
    up, left = sample_rng(*place, "flip").random(2).tolist()
    flips = (left < settings.fliplr, up < settings.flipud)
    layers, zoom = _draw_layers(place, "", index, refs, settings, flips, mosaic)
    gains, mix, weight = draw_hsv(place, settings), None, 1.0
    if mosaic and settings.mixup:
        rng = sample_rng(*place, "mixup")
        if rng.random() < settings.mixup:
            partner = int(rng.integers(len(refs)))
            weight = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
            mix = AugmentPlan(
                *_draw_layers(place, "mixup.", partner, refs, settings, flips, mosaic)
            )
    return AugmentPlan(layers, zoom, gains, mix, weight)


def draw_hsv(
    place: tuple[int, int, int], settings: AugmentSettings
) -> tuple[float, float, float] | None:
    """Draw hue shift, saturation and value change; None when all are off."""
    if not (settings.hsv_h or settings.hsv_s or settings.hsv_v):
        return None
    h, s, v = sample_rng(*place, "hsv").random(3).tolist()
    return (
        (2 * h - 1) * settings.hsv_h,
        (2 * s - 1) * settings.hsv_s,
        (2 * v - 1) * settings.hsv_v,
    )


def _draw_layers(
    place: tuple[int, int, int],
    prefix: str,
    first: int,
    refs: Sequence[ImageRef],
    settings: AugmentSettings,
    flips: tuple[bool, bool],
    mosaic: bool,
) -> tuple[tuple[Layer, ...], float]:
    """Draw a mosaic or a single image under a random map, and its zoom."""
    sources, offsets, canvas = [first], [(0.0, 0.0)], extent(refs[first])
    limit = canvas
    if mosaic and settings.mosaic:
        chance, x, y, *others = sample_rng(*place, prefix + "mosaic").random(6).tolist()
        if chance < settings.mosaic:
            cx, cy = 0.5 + x, 0.5 + y
            sources += [int(other * len(refs)) for other in others]
            extents = [extent(refs[source]) for source in sources]
            corners = ((0, 0), (0, 1), (1, 0), (1, 1))
            offsets = [
                (cx if right else cx - w, cy if low else cy - h)
                for (w, h), (low, right) in zip(extents, corners, strict=True)
            ]
            canvas = limit = (2.0, 2.0)
    draws = sample_rng(*place, prefix + "affine").random(6).tolist()
    (a, b, c, d, e, f), zoom = _affine(draws, settings, canvas, flips)
    layers = []
    for source, (x, y) in zip(sources, offsets, strict=True):
        w, h = extent(refs[source])
        visible = (max(0.0, -x), max(0.0, -y), min(w, limit[0] - x), min(h, limit[1] - y))
        layers.append(Layer(source, (a, b, a * x + b * y + c, d, e, d * x + e * y + f), visible))
    return tuple(layers), zoom


def extent(ref: ImageRef) -> tuple[float, float]:
    """Return (width, height) with the long side at 1."""
    longest = max(ref.height, ref.width)
    return ref.width / longest, ref.height / longest


def _affine(
    draws: Sequence[float],
    settings: AugmentSettings,
    canvas: tuple[float, float],
    flips: tuple[bool, bool],
) -> tuple[Affine, float]:
    """Return the map of a canvas whose centre goes to about the output's centre, and its zoom.

    Args:
        draws: six numbers in [0, 1): turn, zoom, shear x and y, shift x and y.
        flips: left-right, upside-down; the last thing to be done.
    """
    turn, zoom, shear_x, shear_y, shift_x, shift_y = (2 * draw - 1 for draw in draws)
    angle, factor = math.radians(turn * settings.degrees), 1 + zoom * settings.scale
    cos, sin = factor * math.cos(angle), factor * math.sin(angle)
    kx = math.tan(math.radians(shear_x * settings.shear))
    ky = math.tan(math.radians(shear_y * settings.shear))
    a, b = cos - kx * sin, sin + kx * cos
    d, e = ky * cos - sin, ky * sin + cos
    c = 0.5 + shift_x * settings.translate - (a * canvas[0] + b * canvas[1]) / 2
    f = 0.5 + shift_y * settings.translate - (d * canvas[0] + e * canvas[1]) / 2
    if flips[0]:
        a, b, c = -a, -b, 1 - c
    if flips[1]:
        d, e, f = -d, -e, 1 - f
    return (a, b, c, d, e, f), factor


def plan_labels(
    plan: AugmentPlan, refs: Sequence[ImageRef], imgsz: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the labels of a plan from geometry alone.

    Returns:
        boxes_xyxy_px (n, 4) float32 inside the image, labels (n,) int64, source image (n,) int64.
    """
    found = [_plan_labels(part, refs, imgsz) for part in (plan, plan.mix) if part is not None]
    if len(found) == 1:
        return found[0]
    boxes, labels, sources = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return boxes, labels, sources


def _plan_labels(
    plan: AugmentPlan, refs: Sequence[ImageRef], imgsz: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    layers = plan.layers
    owners = [refs[layer.source] for layer in layers]
    which = np.repeat(np.arange(len(layers)), [len(ref.labels) for ref in owners])  # (n,)
    numbers = [(*extent(r), *x.visible, *x.affine) for r, x in zip(owners, layers, strict=True)]
    w, h, left, top, right, bottom, a, b, c, d, e, f = np.array(numbers).T[:, which]
    cx, cy, wide, high = np.concatenate([ref.boxes_cxcywh for ref in owners]).astype(np.float64).T
    x0, x1 = _within(w * (cx - wide / 2), w * (cx + wide / 2), left, right)
    y0, y1 = _within(h * (cy - high / 2), h * (cy + high / 2), top, bottom)
    cx, cy, wide, high = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    area = 4 * wide * high * (imgsz * plan.zoom) ** 2
    # The corners of a mapped box reach this far from its mapped centre.
    x, reach_x = a * cx + b * cy + c, np.abs(a) * wide + np.abs(b) * high
    y, reach_y = d * cx + e * cy + f, np.abs(d) * wide + np.abs(e) * high
    x0, x1 = _within(x - reach_x, x + reach_x, 0.0, 1.0)
    y0, y1 = _within(y - reach_y, y + reach_y, 0.0, 1.0)
    boxes = np.stack((x0, y0, x1, y1), axis=1)  # (n, 4) in output units
    share = np.full(len(which), KEPT_AREA)
    _tighten(boxes, share, plan, owners)
    boxes *= imgsz
    keep = _candidates(boxes, area, share)
    labels = np.concatenate([ref.labels for ref in owners])
    sources = np.array([layer.source for layer in layers])[which]
    return boxes[keep].astype(np.float32), labels[keep], sources[keep]


def _within(
    low: np.ndarray, high: np.ndarray, floor: np.ndarray | float, ceiling: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of intervals, clipped; np.clip costs five times as much on few numbers."""
    return (
        np.minimum(np.maximum(low, floor), ceiling),
        np.minimum(np.maximum(high, floor), ceiling),
    )


def _tighten(
    boxes: np.ndarray, share: np.ndarray, plan: AugmentPlan, owners: Sequence[ImageRef]
) -> None:
    """Replace, in place, the boxes of polygon rows by those of the mapped polygons."""
    row = 0
    for layer, ref in zip(plan.layers, owners, strict=True):
        matrix = np.array(layer.affine).reshape(2, 3)
        for polygon in ref.polygons:
            if polygon is not None:
                points = polygon * np.array(extent(ref))
                boxes[row] = polygon_extent(points, np.array(layer.visible), matrix)
                share[row] = KEPT_AREA_POLYGON
            row += 1


def _candidates(boxes: np.ndarray, area: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return which boxes are still worth learning.

    Args:
        boxes: (n, 4) xyxy px.
        area: (n,) px, before the image's edge cut anything off.
        share: (n,) of that area that must be left.
    """
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    slim = np.maximum(w, h) < LONGEST_ASPECT * np.minimum(w, h)
    keep: np.ndarray = slim & (np.minimum(w, h) > SMALLEST_PX) & (w * h > share * area) & (area > 0)
    return keep
